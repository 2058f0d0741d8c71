import functools
import io
import math

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st
from runs import METHODS, cache, tiny  # noqa: F401
from torch import nn

import ace
from ace.errors import NonFiniteLoss
from benchmarks.config import load_run
from benchmarks.methods import METHODS as CLASSES
from benchmarks.models import MODELS
from benchmarks.regularizers import LieRegularizer
from benchmarks.train import build_model, build_task, training_batches

pytestmark = pytest.mark.usefixtures("cache")
every_method = pytest.mark.parametrize("name", METHODS)


def start(name, *words):
    config = tiny(f"method={name}", *words)
    task = build_task(config)
    model = build_model(config, task)
    return CLASSES[name](config, model, task), config, task


def steps(method, config, task, count):
    batches = training_batches(config, task)
    return [method.step(next(batches)[1]).cmp_state.misc for _ in range(count)]


def test_every_configured_method_exists():
    assert tuple(CLASSES) == METHODS


@every_method
def test_every_method_starts_from_the_same_equivariant_weights(name):
    method, _, _ = start(name)
    reference, _, _ = start("strict")
    ours, theirs = ace.base_state_dict(method.model), reference.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    other = build_model(tiny("seed=1"), reference.task).state_dict()
    assert not all(torch.equal(other[key], theirs[key]) for key in theirs)


def test_every_method_sees_the_same_batches_and_augmentation():
    seen = []
    for name in METHODS:
        _, config, task = start(name, "augment=true")
        batches = training_batches(config, task)
        seen.append([next(batches)[1] for _ in range(4)])
    for others in seen[1:]:
        for one, other in zip(seen[0], others, strict=True):
            assert torch.equal(one.target, other.target)
            assert all(torch.equal(one.inputs[key], other.inputs[key]) for key in one.inputs)


@every_method
def test_a_step_moves_the_weights_and_reports_the_task_loss(name):
    method, config, task = start(name)
    before = {key: value.clone() for key, value in ace.base_state_dict(method.model).items()}
    if name == "cr":  # its first forward pass has γ = θ(1), not the 1 that a new relaxation has
        for relaxation in ace.relaxations(method.model).values():
            relaxation.gamma.fill_(2 / config.steps)
    batch = next(training_batches(config, task))[1]
    expected = task.loss(method.model, batch).item()
    [record] = steps(method, config, task, 1)
    assert record["step"] == 1
    assert float(record["task_loss"]) == pytest.approx(expected, rel=1e-6)
    after = ace.base_state_dict(method.model)
    assert any(not torch.equal(after[key], before[key]) for key in before)


def test_unconstrained_keeps_the_relaxation_at_one():
    method, config, task = start("unconstrained")
    records = steps(method, config, task, 5)
    assert all((record["gamma"] == 1).all() for record in records)
    assert method.finish() is method.model
    assert ace.relaxations(method.model)


def test_cr_follows_the_triangle_to_exactly_zero():
    method, config, task = start("cr", "steps=8")
    records = steps(method, config, task, 8)
    assert [record["gamma"].tolist() for record in records] == [
        [t] * 2 for t in (0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0)
    ]


@pytest.mark.parametrize("name", ["ace", "ace-resilient", "ace-paper"])
def test_constrained_methods_report_what_the_history_records(name):
    method, config, task = start(name)
    record = steps(method, config, task, 3)[-1]
    assert record["layers"] == tuple(ace.relaxations(method.model)) == ("layers.0", "layers.1")
    assert all(record[quantity].shape == (2,) for quantity in ("gamma", "violation", "multiplier"))


def test_ace_meets_its_constraint_and_the_published_form_does_not():
    largest = {}
    for name in ("ace", "ace-paper"):
        method, config, task = start(name)
        largest[name] = steps(method, config, task, config.steps)[-1]["gamma"].abs().max()
    assert largest["ace"] == 0
    assert largest["ace-paper"] > 0.5


@every_method
def test_the_shipped_model_is_relaxed_or_plain_as_declared(name):
    method, config, task = start(name)
    steps(method, config, task, 2)
    kept = method.ships_relaxed
    shipped = method.finish()
    assert bool(ace.relaxations(shipped)) == kept
    plain = build_model(config, task)
    assert kept or shipped.state_dict().keys() == plain.state_dict().keys()


@every_method
def test_a_state_brings_training_back_bitwise(name):
    method, config, task = start(name)
    batches = training_batches(config, task)
    for _ in range(3):
        method.step(next(batches)[1])
    state = torch.load(_saved(method.state_dict()), weights_only=True)
    for _ in range(3):
        method.step(next(batches)[1])
    again, _, _ = start(name, "seed=0")
    again.load_state_dict(state)
    batches = training_batches(config, task, start=3)
    for _ in range(3):
        again.step(next(batches)[1])
    ours, theirs = again.model.state_dict(), method.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@every_method
def test_a_loss_that_is_not_finite_ends_training(name):
    method, config, task = start(name)
    batch = next(training_batches(config, task))[1]
    batch.target[0, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="nan"):
        method.step(batch)


@pytest.mark.parametrize("name", ["strict", "ace"])
def test_clipping_bounds_the_step(name):
    moved = {}
    for clip in (1e-6, None):
        words = ("optimizer=sgd", "lr=1.0") + ((f"clip={clip}",) if clip else ())
        method, config, task = start(name, *words)
        before = torch.cat([p.flatten() for p in ace.base_state_dict(method.model).values()]).clone()
        steps(method, config, task, 1)
        after = torch.cat([p.flatten() for p in ace.base_state_dict(method.model).values()])
        moved[clip] = (after - before).norm().item()
    assert moved[1e-6] <= 1.1e-6 < moved[None]


IRREPS = st.sampled_from(["3x0e+2x1o", "1x1o+2x1o", "2x0e", "1x0e+1x1o+1x2e", "4x0e+1x1o+1x1o"])


class Layer(nn.Module):
    def __init__(self, reads, writes):
        super().__init__()
        self.reads, self.writes = reads, writes
        self.map = nn.Linear(o3.Irreps(reads).dim, o3.Irreps(writes).dim)

    def forward(self, x):
        return self.map(x)


def relaxed(reads, writes, rows=6, layers=2):
    model = nn.ModuleList(Layer(reads, writes) for _ in range(layers)).double()
    model.forward = lambda x: sum(layer(x) for layer in model)
    x = torch.randn(rows, o3.Irreps(reads).dim, dtype=torch.float64)
    ace.relax(model, layers=Layer, example=x)
    return model, x, LieRegularizer(model, lambda layer: layer.reads, lambda layer: layer.writes)


@given(IRREPS, IRREPS)
def test_the_lie_derivative_equals_a_slow_loop(reads, writes):
    model, x, regularizer = relaxed(reads, writes)
    model(x)
    derivative, norm = regularizer.parts()
    squares = norms = torch.zeros((), dtype=torch.float64)
    for relaxation in ace.relaxations(model).values():
        weight, bias = relaxation.term.map.weight.detach(), relaxation.term.map.bias.detach()
        for axis in range(3):
            into, out = (finite_difference(irreps, axis) for irreps in (reads, writes))
            for row in x:
                squares = squares + (weight @ (into @ row) - out @ (weight @ row + bias)).square().sum()
        norms = norms + sum((weight @ row + bias).square().sum() for row in x)
    # the oracle differentiates e3nn's representation by finite differences
    assert derivative.item() == pytest.approx(math.sqrt(squares), rel=1e-5, abs=1e-5)
    assert norm.item() == pytest.approx(math.sqrt(norms), rel=1e-12)


@functools.cache
def finite_difference(irreps, axis, angle=1e-4):
    """d/dt D(exp(t axis)) at 0 by central differences of e3nn's representation."""
    torch.set_default_dtype(torch.float64)
    try:
        turns = [o3.axis_angle_to_matrix(torch.eye(3)[axis], torch.tensor(t)) for t in (angle, -angle)]
        forward, back = map(o3.Irreps(irreps).D_from_matrix, turns)
    finally:
        torch.set_default_dtype(torch.float32)
    return (forward - back) / (2 * angle)


@given(IRREPS, IRREPS)
def test_the_lie_derivative_vanishes_on_equivariant_maps(reads, writes):
    model, x, regularizer = relaxed(reads, writes)
    linear = o3.Linear(reads, writes)
    basis = torch.eye(o3.Irreps(reads).dim)
    for relaxation in ace.relaxations(model).values():
        with torch.no_grad():
            relaxation.term.map.weight.copy_(linear(basis).T)
            relaxation.term.map.bias.zero_()
    model(x)
    derivative, _ = regularizer.parts()
    assert derivative.item() < 1e-12 * max(1.0, x.norm().item())


def test_the_regularizer_moves_the_term_and_nothing_else():
    method, config, task = start("cr")
    batch = next(training_batches(config, task))[1]
    task.loss(method.model, batch)
    sum(method.regularizer.parts()).backward()
    reached = {name for name, p in method.model.named_parameters() if p.grad is not None}
    assert reached == {f"layers.{i}.relaxation.term.map.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


def test_the_regularizer_has_a_gradient_at_zero():
    model, x, regularizer = relaxed("2x0e+1x1o", "1x1o", layers=1)
    dense = ace.relaxations(model)["0"].term.map
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    model(x)
    sum(regularizer.parts()).backward()
    assert dense.weight.grad.isfinite().all()


def test_evaluations_are_not_regularized():
    model, x, regularizer = relaxed("2x0e+1x1o", "1x1o")
    model.eval()
    model(100 * x)
    model.train()
    model(x)
    alone = regularizer.parts()
    model(x)
    assert [part.item() for part in regularizer.parts()] == [part.item() for part in alone]


@pytest.mark.parametrize("model", ["egnn", "segnn"])
def test_the_entries_of_the_models_name_the_representations_that_terms_see(model):
    """A term that is equivariant between the named representations leaves the model equivariant."""
    size = {"egnn": "model.hidden=8", "segnn": "model.features=8"}[model]
    samples = ("task.train=40", "task.valid=10", "task.test=10")
    config = load_run("nbody", [*samples, f"model={model}", size, "model.layers=2"])
    task = build_task(config)
    network = build_model(config, task).double()
    entry = MODELS[model]
    example = {k: v.double() if v.is_floating_point() else v for k, v in task.example().items()}
    ace.relax(network, layers=lambda path, module: type(module).__name__ in entry.layers, example=example)
    for path, relaxation in ace.relaxations(network).items():
        layer = network.get_submodule(path)
        linear = o3.Linear(entry.read_types(layer), entry.write_types(layer))
        basis = torch.eye(o3.Irreps(entry.read_types(layer)).dim)
        with torch.no_grad():
            relaxation.term.map.weight.copy_(linear(basis).T)
            relaxation.term.map.bias.zero_()
    error = ace.equivariance_error(network, example, task.group, inputs=task.input_types, outputs=task.output_type)
    assert error.max < 1e-6
    assert ace.projection_gap(network, example) > 1e-3
