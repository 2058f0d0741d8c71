import functools
import io
import math

import pytest
import torch
from e3nn import o3
from hypothesis import given
from hypothesis import strategies as st
from runs import METHODS, RIVALS, cache, tiny  # noqa: F401
from torch import nn

import ace
from ace.errors import ConfigError, NonFiniteLoss
from ace.groups import O3, SO2, SO3, Cyclic, Dihedral, Inversion, Octahedral
from ace.probing import default_dtype
from benchmarks.config import CONFIGS, load_run
from benchmarks.methods import METHODS as CLASSES
from benchmarks.methods.rivals import Scheduled
from benchmarks.models import MODELS
from benchmarks.regularizers import LieRegularizer, ProjectionRegularizer, not_from, on_irreps, project
from benchmarks.train import build_model, build_task, training_batches

pytestmark = pytest.mark.usefixtures("cache")
every_method = pytest.mark.parametrize("name", METHODS + RIVALS)


def start(name, *words):
    config = tiny(f"method={name}", *words)
    task = build_task(config)
    model = build_model(config, task)
    return CLASSES[name](config, model, task), config, task


def steps(method, config, task, count):
    batches = training_batches(config, task)
    return [method.step(next(batches)[1]).cmp_state.misc for _ in range(count)]


def test_every_configured_method_exists():
    assert set(CLASSES) == {*METHODS, *RIVALS}
    assert set(CLASSES) == {path.stem for path in (CONFIGS / "methods").glob("*.yaml")}


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
    for name in METHODS + RIVALS:
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
    if isinstance(method, Scheduled):  # its first forward pass has its γ, not the 1 that a new relaxation has
        for relaxation in ace.relaxations(method.model).values():
            relaxation.gamma.fill_(method.strength(1 / config.steps))
    batch = next(training_batches(config, task))[1]
    expected = task.loss(method.model, method.moved(batch) if name == "augmentation" else batch).item()
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


@pytest.mark.parametrize("final", [0.0, 0.25])
@pytest.mark.parametrize(("name", "middle"), [("linear-decay", 0.5), ("cosine-decay", 0.5)])
def test_decays_go_from_one_to_their_end_and_stay_there(name, middle, final):
    method, config, task = start(name, "steps=10", f"method.final={final}")
    gammas = [record["gamma"][0].item() for record in steps(method, config, task, 10)]
    assert gammas == sorted(gammas, reverse=True)
    assert method.strength(0.0) == 1
    assert gammas[3] == pytest.approx(1 - (1 - final) * middle)  # half of the way down after half of 0.8 of the steps
    assert gammas[7:] == pytest.approx([final] * 3, abs=0)
    assert method.ships_relaxed == (final > 0)


def test_a_model_on_the_way_down_is_not_shipped():
    method, config, task = start("linear-decay", "steps=10", "method.final=0.25")
    steps(method, config, task, 7)
    assert not method.admits(0.0)
    steps(method, config, task, 1)
    assert method.admits(1.0)


def test_the_control_of_cr_lacks_the_lie_derivative_only():
    prices = {}
    for name in ("cr", "cr-norm"):
        method, config, task = start(name, "method.weight=0.5")
        task.loss(method.model, next(training_batches(config, task))[1])
        parts = iter([method.regularizer.parts()] * 2)
        method.regularizer.parts = lambda copies, parts=parts: next(parts)
        prices[name] = method.price(), *next(parts)
    price, derivative, norm = prices["cr"]
    assert torch.equal(price, 0.5 * (derivative + norm))
    price, _, norm = prices["cr-norm"]
    assert torch.equal(price, 0.5 * norm)


def objective(method, config, task):
    """What a step descends on, with the batch it was computed for."""
    seen = []
    method.descend = lambda loss, total: seen.append((loss.item(), total.item()))
    batch = next(training_batches(config, task))[1]
    method.step(batch)
    return *seen[0], batch


def test_the_penalty_is_the_relative_size_of_the_terms():
    method, config, task = start("penalty", "method.weight=0.3")
    loss, total, batch = objective(method, config, task)
    sizes = []
    for path in ace.relaxations(method.model):
        layer = method.model.get_submodule(path)
        layer.register_forward_hook(lambda _, __, out: sizes.append([t.detach() for t in out]))
    method.model(**batch.inputs)
    relaxed = sizes[:]
    sizes.clear()
    price, attached = 0.0, list(ace.relaxations(method.model).values())
    for number, relaxation in enumerate(attached):  # the layers before keep their terms, so that this one sees the same
        relaxation.gamma.zero_()
        sizes.clear()
        method.model(**batch.inputs)
        relaxation.gamma.fill_(1.0)
        with_term, without = relaxed[number], sizes[number]
        neq = sum((a - b).square().sum() for a, b in zip(with_term, without, strict=True))
        price += neq / sum(b.square().sum() for b in without)
    assert total - loss == pytest.approx(0.3 * price.item(), rel=1e-3)


def test_the_prior_of_rpp_is_on_the_weights_of_the_terms():
    method, config, task = start("rpp", "method.weight=0.3")
    loss, total, _ = objective(method, config, task)
    weights = [p for name, p in method.model.named_parameters() if ".relaxation.term." in name]
    assert total - loss == pytest.approx(0.3 * sum(p.square().sum().item() for p in weights), rel=1e-5)


@pytest.mark.parametrize("name", ["augmentation", "remul"])
def test_each_sample_is_moved_by_an_element_of_its_own(name):
    method, config, task = start(name)
    batch = next(training_batches(config, task))[1]
    moved = method.moved(batch)
    turns = []
    for graph in range(3):
        rows = batch.inputs["batch"] == graph
        turn = torch.linalg.lstsq(batch.inputs["vel"][rows], moved.inputs["vel"][rows]).solution
        assert torch.allclose(turn @ turn.T, torch.eye(3), atol=1e-4)
        shift = moved.inputs["pos"][rows] - batch.inputs["pos"][rows] @ turn
        assert torch.allclose(shift, shift[:1].expand_as(shift), atol=1e-4)
        assert torch.allclose(moved.target[rows] - batch.target[rows] @ turn, shift, atol=1e-4)
        turns.append(turn)
    assert not torch.allclose(turns[0], turns[1], atol=0.1)
    method.done += 1
    assert not torch.equal(method.moved(batch).target, moved.target)


def test_an_equivariant_model_cannot_tell_the_two_losses_of_remul_apart():
    method, config, task = start("remul", "method.weight=2")
    for relaxation in ace.relaxations(method.model).values():
        relaxation.gamma.zero_()
    loss, total, _ = objective(method, config, task)
    assert total == pytest.approx(3 * loss, rel=1e-4)


def test_gradnorm_descends_on_the_published_objective():
    method, config, task = start("remul-gradnorm", "method.balance_lr=0.01")
    batches = training_batches(config, task)
    for _ in range(3):
        method.step(next(batches)[1])
    losses, before = method.losses(next(batches)[1]), method.balance.clone()
    sizes = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(x, method.shared, retain_graph=True, allow_unused=True)
                if g is not None
            ]
        ).norm()
        for x in losses
    ]
    weights = before.clone().requires_grad_()
    G = weights * torch.stack(sizes)
    ratio = torch.stack(losses).detach() / method.first
    target = (G.mean() * (ratio / ratio.mean()) ** 1.5).detach()
    (G - target).abs().sum().backward()
    expected = before - 0.01 * weights.grad
    method.rebalance(losses)
    assert method.balance.sum().item() == pytest.approx(2)
    assert torch.allclose(method.balance, 2 * expected / expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["ace", "ace-resilient", "ace-paper"])
def test_constrained_methods_report_what_the_history_records(name):
    method, config, task = start(name)
    record = steps(method, config, task, 3)[-1]
    assert record["layers"] == tuple(ace.relaxations(method.model)) == ("layers.0", "layers.1")
    assert all(record[quantity].shape == (2,) for quantity in ("gamma", "violation", "multiplier"))


def test_the_error_of_the_model_may_be_paid_for():
    method, config, task = start("ace-resilient", "method.measure=equivariance", "method.rho=2")
    record = steps(method, config, task, 3)[-1]
    assert record["constraints"] == (str(task.group),)
    assert record["violation"].shape == record["multiplier"].shape == (1,)
    assert record["multiplier"].item() > 0


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
    with default_dtype(torch.float64):
        turns = [o3.axis_angle_to_matrix(torch.eye(3)[axis], torch.tensor(t)) for t in (angle, -angle)]
        forward, back = map(o3.Irreps(irreps).D_from_matrix, turns)
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


@given(IRREPS, IRREPS)
def test_the_projection_is_the_nearest_equivariant_map(reads, writes):
    weight = torch.randn(o3.Irreps(writes).dim, o3.Irreps(reads).dim, dtype=torch.float64)
    found = project(weight, o3.Irreps(reads), o3.Irreps(writes))
    linear, basis = o3.Linear(reads, writes).double(), []
    for number in range(linear.weight.numel()):  # e3nn's maps span the equivariant ones
        with torch.no_grad():
            linear.weight.zero_()[number] = 1.0
            basis.append(linear(torch.eye(weight.shape[1], dtype=torch.float64)).T.flatten())
    expected = torch.zeros_like(weight).flatten()
    if basis:
        span = torch.stack(basis, -1)
        expected = span @ torch.linalg.lstsq(span, weight.flatten()).solution
    assert torch.allclose(found.flatten(), expected, atol=1e-10)


def test_the_distance_vanishes_exactly_on_equivariant_terms():
    model, _, _ = relaxed("2x0e+1x1o", "1x0e+2x1o")
    regularizer = ProjectionRegularizer(
        model, lambda layer, weight: [(1.0, on_irreps(layer.reads, layer.writes, weight))]
    )
    assert regularizer.distance() > 0.1
    for relaxation in ace.relaxations(model).values():
        dense = relaxation.term.map
        with torch.no_grad():
            dense.weight.copy_(project(dense.weight, o3.Irreps("2x0e+1x1o"), o3.Irreps("1x0e+2x1o")))
            dense.bias[1:].zero_()
    assert regularizer.distance() < 1e-12
    regularizer.distance().backward()
    assert dense.weight.grad.isfinite().all()


AXIS = (1.0, -2.0, 0.5)
GROUPS = {"octahedral": (Octahedral(), 48), "inversion": (Inversion(), 2), "c3": (Cyclic(3, AXIS), 3)}
GROUPS |= {"c4": (Cyclic(4, AXIS), 4), "d2": (Dihedral(2, AXIS), 4)}
by_group = pytest.mark.parametrize("group", ["o3", "so3", "so2", *GROUPS])


@functools.cache
def representation(group, count, irreps, seed=0):
    """e3nn's matrices of elements of a group."""
    with default_dtype(torch.float64):
        return [o3.Irreps(irreps).D_from_matrix(element.matrix) for element in group.sample(count, seed)]


def random_map(reads, writes):
    rows = o3.Irreps(writes).dim
    return torch.randn(rows, o3.Irreps(reads).dim, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)


@pytest.mark.parametrize("group", ["so2", *GROUPS])
@given(reads=IRREPS, writes=IRREPS)
def test_the_projection_is_the_mean_over_the_group(group, reads, writes):
    # of a continuous group over many more angles than needed
    sample = (GROUPS | {"so2": (Cyclic(19, AXIS), 19)})[group]
    elements = [representation(*sample, irreps) for irreps in (reads, writes)]
    weight, bias = random_map(reads, writes)
    found = on_irreps(reads, writes, weight, group, AXIS)(weight, bias)
    weights = [out.T @ weight @ into for into, out in zip(*elements, strict=True)]
    assert torch.allclose(found[0], torch.stack(weights).mean(0), atol=1e-10)
    assert torch.allclose(found[1], torch.stack([out.T @ bias for out in elements[1]]).mean(0), atol=1e-10)


@by_group
@given(reads=IRREPS, writes=IRREPS)
def test_the_projection_is_equivariant_and_its_own(group, reads, writes):
    sample = ({"o3": (O3(), 3), "so3": (SO3(), 3), "so2": (SO2(AXIS), 3)} | GROUPS)[group]
    weight, bias = random_map(reads, writes)
    projection = on_irreps(reads, writes, weight, group, AXIS)
    kept, kept_bias = projection(weight, bias)
    for into, out in zip(*(representation(*sample, irreps, seed=5) for irreps in (reads, writes)), strict=True):
        assert torch.allclose(kept @ into, out @ kept, atol=1e-10)
        assert torch.allclose(kept_bias, out @ kept_bias, atol=1e-10)
    again, again_bias = projection(kept, kept_bias)
    assert torch.allclose(again, kept, atol=1e-12)
    assert torch.allclose(again_bias, kept_bias, atol=1e-12)


def distance(model, *groups):
    def projections(layer, weight):
        return [(factor, on_irreps(layer.reads, layer.writes, weight, group, AXIS)) for group, factor in groups]

    return ProjectionRegularizer(model, projections).distance()


@by_group
def test_the_distance_from_a_group_vanishes_exactly_on_its_maps(group):
    model, _, _ = relaxed("2x0e+2x1o+1x1e", "1x0e+2x1o+1x2e")
    assert distance(model, (group, 1.0)) > 0.1
    for relaxation in ace.relaxations(model).values():
        dense = relaxation.term.map
        weight, bias = on_irreps("2x0e+2x1o+1x1e", "1x0e+2x1o+1x2e", dense.weight, group, AXIS)(
            dense.weight, dense.bias
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            dense.bias.copy_(bias)
    assert distance(model, (group, 1.0)) < 1e-12


def test_a_smaller_group_is_nearer():
    model, _, _ = relaxed("2x0e+2x1o+1x1e+1x2e", "1x0e+2x1o+1x2e")
    names = ("o3", "so3", "octahedral", "so2", "c3", "c1")
    found = {name: distance(model, (name, 1.0)).item() for name in names}
    for large, small in (("o3", "so3"), ("o3", "octahedral"), ("so3", "so2"), ("so2", "c3"), ("c3", "c1")):
        assert found[large] > found[small] + 1e-4, (large, small)
    assert found["c1"] < 1e-12
    both = distance(model, ("so2", 0.3), ("octahedral", 2.0))
    assert both.item() == pytest.approx(0.3 * found["so2"] + 2 * found["octahedral"], rel=1e-12)


def test_a_group_keeps_no_weight_that_reads_positions():
    weight, bias = random_map("2x0e+2x1o", "2x1o")
    for group in ("o3", "so2"):
        projection = on_irreps("2x0e+2x1o", "2x1o", weight, group)
        kept, kept_bias = not_from(slice(2, 5), projection)(weight, bias)
        assert not kept[:, 2:5].any()
        assert torch.equal(kept[:, 5:], projection(weight, bias)[0][:, 5:])
        assert torch.equal(kept_bias, projection(weight, bias)[1])


def test_without_groups_it_is_the_group_of_the_model_alone():
    plain, config, task = start("projection", "method.weight=0.3")
    named, _, _ = start("projection", "method.weight=0.3", "method.groups={o3: 1.0}")
    entry = MODELS["egnn"]
    distances = []
    for path, relaxation in ace.relaxations(plain.model).items():
        layer, dense = plain.model.get_submodule(path), relaxation.term.map
        into, out = o3.Irreps(entry.read_types(layer)), o3.Irreps(entry.write_types(layer))
        kept = project(dense.weight, into, out)
        kept[:, entry.read_positions(layer)] = 0
        bias = dense.bias - project(dense.bias[:, None], o3.Irreps("0e"), out)[:, 0]
        distances.append(((dense.weight - kept).square().sum() + bias.square().sum()).sqrt())
    expected = torch.stack(distances).sum()
    assert torch.equal(plain.regularizer.distance(), expected)
    assert torch.equal(named.regularizer.distance(), expected)
    loss, total, _ = objective(plain, config, task)
    assert total - loss == pytest.approx(0.3 * expected.item(), rel=1e-4)
    assert set(config.identity()["method"]) == {"name", "weight"}


def test_a_step_prices_each_group_with_its_factor():
    words = ("method.groups={so2: 0.1, octahedral: 0.2}", "method.axis=[1, -2, 0.5]")
    method, config, task = start("projection", "method.weight=0.3", *words)
    apart = [start("projection", f"method.groups={{{name}: 1}}", words[1])[0] for name in ("so2", "octahedral")]
    expected = sum(c * m.regularizer.distance().item() for c, m in zip((0.1, 0.2), apart, strict=True))
    loss, total, _ = objective(method, config, task)
    assert total - loss == pytest.approx(0.3 * expected, rel=1e-4)


def test_groups_are_part_of_the_identity(tmp_path):
    config = tiny("method=projection", "method.groups={so2: 0.1}", "method.axis=[1, 0, 0]")
    assert config.identity()["method"] == {
        "name": "projection",
        "weight": 0.01,
        "groups": {"so2": 0.1},
        "axis": [1, 0, 0],
    }
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_run(tmp_path / "run.yaml") == config
    for words in ({"so4": 1}, {"so2": -1}, {"c0": 1}):
        with pytest.raises(ConfigError, match=r"method\.groups"):
            tiny("method=projection", f"method.groups={words}")


def test_a_term_at_distance_zero_leaves_the_model_equivariant():
    method, _, task = start("projection")
    entry = MODELS["egnn"]
    for path, relaxation in ace.relaxations(method.model).items():
        layer, dense = method.model.get_submodule(path), relaxation.term.map
        with torch.no_grad():
            dense.weight.copy_(
                project(dense.weight, *(o3.Irreps(t(layer)) for t in (entry.read_types, entry.write_types)))
            )
            dense.weight[:, entry.read_positions(layer)] = 0
            dense.bias[-3:] = 0
    assert method.regularizer.distance() < 1e-5
    model, example = method.model.double(), task.example()
    example = {key: value.double() if value.is_floating_point() else value for key, value in example.items()}
    error = ace.equivariance_error(model, example, task.group, inputs=task.input_types, outputs=task.output_type)
    assert error.max < 1e-6
    assert ace.projection_gap(model, example) > 1e-3


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
