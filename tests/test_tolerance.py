"""A tolerance on, or a price of, the equivariance error of the whole model: measured as said, kept by no trick."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import ace
from ace.errors import AceError
from ace.exponentiated import ExponentiatedGradient
from ace.groups import act
from ace.symmetry import Watch, act_by_sample
from benchmarks.models.vector import VectorLayer, VectorNet
from benchmarks.tasks.broken import Broken

TYPES = {"inputs": {"pos": "vector"}, "outputs": "vector"}
SIZES = {"train": 1024, "valid": 64, "test": 2000}


class Field(nn.Module):
    """Vectors of a graph plus a fixed direction: breaks rotations by a known amount."""

    def __init__(self, break_=0.3):
        super().__init__()
        self.dense = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.dense.weight.copy_(torch.eye(3))
        self.offset = nn.Parameter(torch.tensor([0.0, 0.0, break_]))

    def forward(self, pos, batch=None, edge_index=None):
        return self.dense(pos) + self.offset


def measure(model, example, group, step=3, **options):
    watch = Watch(model, **{**TYPES, **options})
    with watch.watching():
        model(**example)
    return watch.squares(group, step)


GRAPHS = torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("layout", ["graphs", "dense", "one sample"])
@pytest.mark.parametrize(("group", "kind"), [(ace.O3(), "vector"), (ace.E3(2.0), "position"), (ace.SO3(), "1x1e")])
def test_each_sample_has_its_own_element(layout, group, kind, float64):
    model = Field()
    pos = torch.randn(3, 4, 3) if layout == "dense" else torch.randn(6, 3)
    inputs = {"pos": pos, **({"batch": GRAPHS} if layout == "graphs" else {})}
    found, sizes = measure(model, inputs, group, inputs={"pos": kind}, outputs=kind)
    count = 1 if layout == "one sample" else 3
    assert found.shape == sizes.shape == (count,)
    elements = group.sample(count, hash((0, 3, 0)) & 0x7FFFFFFF)
    for number, element in enumerate(elements):
        x = pos if layout == "one sample" else pos[number] if layout == "dense" else pos[number == GRAPHS]
        expected = (model(act(element, x, kind)) - act(element, model(x), kind)).square().sum()
        torch.testing.assert_close(found[number], expected)
        torch.testing.assert_close(sizes[number], model(x).square().sum())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.sampled_from(["vector", "position", "1x0e+1x1o"]))
def test_rows_of_a_sample_move_together(owners, kind):
    index = torch.tensor(sorted(owners))
    x = torch.randn(len(index), 4 if "+" in kind else 3, dtype=torch.float64)
    elements = ace.E3().sample(4)
    moved = act_by_sample(elements, index, x, kind)
    for row, owner in enumerate(index.tolist()):
        torch.testing.assert_close(moved[row : row + 1], act(elements[owner], x[row : row + 1], kind))


def test_both_passes_run_in_the_same_precision():
    model, pos = Field(), torch.randn(64, 5, 3)
    seen = []
    model.dense.register_forward_hook(lambda layer, args, output: seen.append(output.dtype))
    watch = Watch(model, **TYPES)
    with watch.watching(), torch.autocast("cpu", torch.bfloat16):
        model(pos)
    found, sizes = watch.squares(ace.O3(), 3)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert found.dtype == sizes.dtype == torch.float32
    expected, _ = measure(model, {"pos": pos}, ace.O3())
    torch.testing.assert_close(found.sum(), expected.sum(), rtol=0.02, atol=0)


def test_a_share_is_the_first_samples(float64):
    class Pull(Field):
        def forward(self, pos, batch=None, edge_index=None):
            return super().forward(pos) + torch.zeros_like(pos).index_add(0, edge_index[1], pos[edge_index[0]])

    edges = torch.tensor([[0, 1, 2, 4, 3], [1, 0, 3, 2, 4]])
    pos, model = torch.randn(6, 3), Pull()
    inputs = {"pos": pos, "batch": GRAPHS, "edge_index": edges}
    found, sizes = measure(model, inputs, ace.O3(), share=0.7)
    first = {"pos": pos[:5], "batch": GRAPHS[:5], "edge_index": edges}
    expected, expected_sizes = measure(model, first, ace.O3())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sizes, expected_sizes)


def test_a_smaller_output_is_not_a_more_symmetric_one(float64):
    """The derivative along the scale of the model vanishes: collapse is no way to keep a tolerance."""
    model = Field()
    scale = torch.ones(1, requires_grad=True)
    scaled = nn.Module()
    scaled.forward = lambda pos: scale * model(pos)
    found, sizes = measure(scaled, {"pos": torch.randn(8, 5, 3)}, ace.O3(), inputs={0: "vector"})
    (slope,) = torch.autograd.grad(found.sum() / sizes.sum(), scale, retain_graph=True)
    assert slope.abs().item() < 1e-12
    (detached,) = torch.autograd.grad(found.sum() / sizes.sum().detach(), scale)
    assert detached.item() > 0.01  # what a norm held fixed would reward


def test_dropout_drops_the_same_in_both_passes():
    class Dropped(nn.Module):
        def forward(self, pos):
            return pos * torch.nn.functional.dropout(torch.ones(pos.shape[:-1]), 0.5)[..., None]

    found, sizes = measure(Dropped(), {"pos": torch.randn(8, 5, 3)}, ace.O3())
    assert found.sum() < 1e-10 * sizes.sum()


def test_multiplication_reaches_the_solution_whatever_the_scale():
    """r = a ε²/(2λ): the solution of a loss that falls linearly with r."""
    for scale in (1e-3, 1.0, 1e4):
        multiplier = nn.Parameter(torch.tensor([1e-5 * scale], dtype=torch.float64))
        optimizer = ExponentiatedGradient([multiplier], lr=0.05)
        for _ in range(400):
            r = scale * 0.01 / (2 * multiplier.detach())
            multiplier.grad = (r / 0.1).log().clamp(-1, 1)
            optimizer.step()
        assert multiplier.item() == pytest.approx(0.05 * scale, rel=1e-4)


def train(eps, steps=700, seed=0, strength=0.3, scale=1.0, stop=None, resume=None, **options):
    torch.manual_seed(seed)
    task = Broken(strength=strength, seed=seed, **SIZES)
    model = VectorNet(0, 0, vectors=4)
    ace.relax(model, layers=VectorLayer, example=task.example())
    constraint = ace.EquivarianceError(options.pop("group", ace.O3()), eps, **TYPES, **options)
    problem = ace.Problem(model, lambda m, b: scale * task.loss(m, b), constraint)
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(model.parameters(), 3e-3), steps=steps)
    if resume is not None:
        optimizer.load_state_dict(resume)
    history = ace.History()
    while optimizer.step < (stop or steps):
        for count, batch in enumerate(task.batches("train", 64, shuffle_seed=optimizer.step // 16)):
            if count == optimizer.step % 16 and optimizer.step < (stop or steps):
                history.append(optimizer.roll(batch))
    return task, model, optimizer, history


def held_out(task, model, group=None, quantile=None):
    model.eval()
    inputs = next(task.batches("test", 2000)).inputs
    with torch.no_grad():
        found, sizes = measure(model, inputs, group or ace.O3(), step=99)
    value = found.mean() if quantile is None else torch.quantile(found, quantile)
    return (value / sizes.mean()).sqrt().item()


@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_a_tolerance_asked_for_is_kept_and_used(eps):
    task, model, optimizer, history = train(eps)
    found = held_out(task, model)
    assert 0.75 * eps < found <= eps
    assert optimizer.cmp.multiplier.item() > 0
    strict = Broken(strength=0.0, seed=0, **SIZES)  # the model did not collapse: it explains most of the target
    assert task.evaluate(model, "test")["mse"] < 0.25 * strict.splits["test"].target.square().mean()
    rows = history.frame()
    assert set(rows[rows.quantity == "multiplier"].layer) == {"O(3)"}
    assert set(rows[rows.quantity == "gamma"].layer) == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize(("detached", "steps"), [(False, 40), (False, 150), (False, 300), (True, 300)])
def test_the_model_collapses_only_if_the_norm_is_held_fixed(detached, steps, monkeypatch):
    """Were ‖f‖ not differentiated, a smaller f would pass for a more symmetric one. A short training does no harm.

    That the constraint weighs no more than the loss would save the task from the collapse as well.
    """
    squares = Watch.squares

    def held_fixed(self, group, step, divided):
        differences, sizes = squares(self, group, step)
        return differences, sizes.detach()

    if detached:
        monkeypatch.setattr(Watch, "squares", held_fixed)
        monkeypatch.setattr(ace.problem, "TOLERANCE_MOST", math.inf)
    task, model, _, _ = train(0.02, steps=steps)
    batch = next(task.batches("test", 2000))
    with torch.no_grad():
        size = model(**batch.inputs).square().mean() / batch.target.square().mean()
    assert size < 0.001 if detached else 0.3 < size < 1.5


def test_a_quantile_is_kept():
    task, model, _, _ = train(0.1, steps=1500, strength=1.0, quantile=0.95)
    assert 0.07 < held_out(task, model, quantile=0.95) <= 0.105
    assert held_out(task, model) < 0.075


def test_a_slack_tolerance_costs_nothing():
    task, model, optimizer, _ = train(0.5, strength=0.0)
    assert held_out(task, model) < 0.3
    assert optimizer.cmp.multiplier.item() < 1e-5


@pytest.mark.parametrize(("eps", "rho"), [(0.05, None), (None, 3.0)])
def test_the_units_of_the_loss_are_those_of_the_multiplier(eps, rho):
    multipliers = {
        scale: train(eps, steps=300, scale=scale, rho=rho)[2].cmp.multiplier.item() for scale in (1.0, 1024.0)
    }
    assert multipliers[1024.0] / multipliers[1.0] == pytest.approx(1024.0, rel=0.2)


def test_a_tolerance_out_of_reach_weighs_no_more_than_the_loss():
    """Nothing is wound up while the weights cannot follow; here they never can."""
    model, pos = Field(1.0), torch.randn(256, 3, generator=torch.Generator().manual_seed(0))
    ace.relax(model, layers=nn.Linear, example={"pos": pos})
    for scale in (1.0, 1e3):
        problem = ace.Problem(
            model, lambda m, b, scale=scale: scale * m(b).square().mean(), ace.EquivarianceError(ace.O3(), 0.1, **TYPES)
        )
        optimizer = ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.0), steps=400)
        prices = []
        for _ in range(200):
            rollout = optimizer.roll(pos)
            prices.append((problem.multiplier * problem.excess / rollout.loss).item())
        assert prices[0] == pytest.approx(0.01, rel=0.2)
        assert prices[-1] == pytest.approx(1.0, rel=0.2)  # one rate above at most, and the draws of the elements
        assert max(prices) < 1.2


def test_a_price_reaches_the_solution(float64):
    """y = x + d + noise and f(x) = x + b: J and r are known functions of b, and so is where J' + ρ J̄ r r' vanishes."""
    rho, noise, wind = 6.0, 0.3, 0.5
    generator = torch.Generator().manual_seed(0)
    pos = torch.randn(8192, 3, generator=generator)
    pos -= pos.mean(0)
    target = pos + torch.tensor([0.0, 0.0, wind]) + noise * torch.randn(pos.shape, generator=generator)
    model = Field(0.0)
    ace.relax(model, layers=nn.Linear, example={"pos": pos})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "offset")
    ace.relaxations(model)["dense"].gamma.data.zero_()
    problem = ace.Problem(
        model, lambda m, b: (m(b) - target).square().mean(), ace.EquivarianceError(ace.O3(), rho=rho, **TYPES)
    )
    optimizer = ace.PrimalDual(problem, torch.optim.Adam([*model.parameters()], 1e-2), steps=600)
    offsets, sizes, errors = [], [], []
    for _ in range(600):
        rollout = optimizer.roll(pos)
        offsets.append(model.offset[2].item())
        sizes.append(rollout.loss.item())
        errors.append(rollout.cmp_state.misc["violation"].item())
    found, size, error = (sum(values[-200:]) / 200 for values in (offsets, sizes, errors))
    assert problem.multiplier.item() == pytest.approx(rho * size * error, rel=0.02)

    grid = torch.linspace(0.01, wind, 5000)
    far = pos.square().sum(1).mean()  # E|b - g b|² = 2 |b|²
    square = 2 * grid.square() / (far + grid.square())
    loss = noise**2 + (grid - wind).square() / 3
    slope = torch.gradient(loss, spacing=(grid,))[0] + rho / 2 * loss * torch.gradient(square, spacing=(grid,))[0]
    expected = grid[slope.abs().argmin()].item()
    assert 0.2 < expected < 0.8 * wind
    assert found == pytest.approx(expected, rel=0.05)
    assert error == pytest.approx(math.sqrt(2 * expected**2 / (far + expected**2)), rel=0.05)


def test_a_higher_price_buys_more_symmetry():
    errors = []
    for rho in (0.1, 50.0):
        task, model, _, _ = train(None, steps=400, rho=rho)
        errors.append(held_out(task, model))
    assert errors[1] < 0.5 * errors[0]


def test_several_groups_have_a_multiplier_each():
    groups = {"about z": ace.SO2(), "about x": ace.SO2((1.0, 0.0, 0.0))}
    task, model, optimizer, _ = train({"about z": 0.05, "about x": 0.05}, steps=400, group=groups)
    free, paid = optimizer.cmp.multiplier.tolist()
    assert optimizer.cmp.names == ("about z", "about x")
    assert paid > 3 * free  # the data break rotations about x, not those about z
    assert held_out(task, model, groups["about x"]) < 0.055


@pytest.mark.parametrize(("eps", "rho"), [(0.05, None), (None, 3.0)])
def test_resumed_training_is_bitwise_the_same(eps, rho):
    _, whole, one, _ = train(eps, steps=40, rho=rho)
    _, _, half, _ = train(eps, steps=40, stop=20, rho=rho)
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    _, resumed, two, _ = train(eps, steps=40, resume=torch.load(file, weights_only=True), rho=rho)
    assert torch.equal(one.cmp.multiplier, two.cmp.multiplier)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


class Spread(nn.Module):
    """Sees distances only, so that the terms of its layers read the positions; may run them again going backward."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.first, self.second = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, pos, batch):
        centre = pos.new_zeros(3, 3).index_add(0, batch, pos) / batch.bincount()[:, None]
        out = pos - centre[batch]
        x = out.square().sum(-1, keepdim=True)
        for layer in (lambda x: self.first(x).tanh(), lambda x: self.second(x).tanh()):
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return {"way": x * out, "size": x}


def gradients(again, groups):
    torch.manual_seed(0)
    model = Spread(again)
    example = {"pos": torch.randn(6, 3), "batch": GRAPHS}
    ace.relax(model, layers=nn.Linear, example=example)
    assert all(r.term.positions is not None for r in ace.relaxations(model).values())
    types = {"outputs": {"way": "vector", "size": "scalar"}}
    constraint = ace.EquivarianceError(groups, 0.1, **types)
    problem = ace.Problem(model, lambda m, b: m(**b)["way"].square().mean(), constraint)
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.01), steps=5)
    optimizer.roll({"pos": torch.randn(6, 3), "batch": GRAPHS})
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("groups", [{"all": ace.SO3()}, {"all": ace.O3(), "tilts": ace.Tilts()}], ids=["one", "two"])
def test_layers_run_again_in_the_backward_pass_see_the_positions_of_their_own_pass(groups, float64):
    expected = gradients(False, groups)
    assert expected["first.relaxation.term.map.weight"].abs().max() > 1e-4
    for name, found in gradients(True, groups).items():
        torch.testing.assert_close(
            found, expected[name], rtol=1e-10, atol=1e-14, msg=lambda text, name=name: name + text
        )


def test_accumulated_gradients():
    task = Broken(**SIZES)
    model = VectorNet(0, 0)
    ace.relax(model, layers=VectorLayer, example=task.example())
    problem = ace.Problem(model, task.loss, ace.EquivarianceError(ace.O3(), 0.05, **TYPES))
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(model.parameters(), 3e-3), steps=10, accumulate=2)
    for batch in task.batches("train", 64):
        optimizer.roll(batch)
    assert optimizer.step == 8
    assert problem.multiplier.item() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "must be positive"),
        (({"SO(3)": 0.1},), "the groups are"),
        ((0.1, {"rho": 1.0}), "either a tolerance eps or a price rho"),
        ((None,), "either a tolerance eps or a price rho"),
        ((None, {"rho": 0.0}), "a price must be positive"),
        ((0.1, {"quantile": 1.5}), "quantile"),
        ((0.1, {"share": 0.0}), "share"),
        ((0.1, {"margin": 1.0}), "margin"),
    ],
)
def test_refused(arguments, message):
    eps, options = arguments[0], arguments[1] if len(arguments) > 1 else {}
    with pytest.raises(AceError, match=message):
        ace.EquivarianceError(ace.O3(), eps, **options)


@pytest.mark.parametrize("options", [{"form": "augmented"}, {"preset": "paper"}])
def test_it_has_a_form_of_its_own(options):
    model = ace.relax(VectorNet(0, 0), layers=VectorLayer, example=(torch.randn(8, 3),))
    problem = ace.Problem(model, lambda m, b: m(b).sum(), ace.EquivarianceError(ace.O3(), 0.1, **TYPES))
    with pytest.raises(AceError, match="a form of its own"):
        ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.1), steps=3, **options)


def test_a_loss_computed_elsewhere_needs_observing():
    model = ace.relax(VectorNet(0, 0), layers=VectorLayer, example=(torch.randn(8, 3),))
    problem = ace.Problem(model, lambda m, b: m(b).square().mean(), ace.EquivarianceError(ace.O3(), 0.1, **TYPES))
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.1), steps=3)
    x = torch.randn(8, 3)
    with pytest.raises(AceError, match="observing"):
        optimizer.update(model(x).square().mean())
    with problem.observing():
        loss = model(x).square().mean()
    assert math.isfinite(optimizer.update(loss).loss)


def test_types_that_do_not_fit_are_named():
    model = ace.relax(VectorNet(0, 0), layers=VectorLayer, example=(torch.randn(8, 3),))
    problem = ace.Problem(model, lambda m, b: m(b).square().mean(), ace.EquivarianceError(ace.O3(), 0.1))
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.1), steps=3)
    with pytest.raises(AceError, match="pass outputs="):
        optimizer.roll(torch.randn(8, 3))
