"""Problem and PrimalDual: reports, measures, clipping, accumulation, mixed precision, errors, resuming."""

from __future__ import annotations

import copy
import io
import pickle

import cooper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Even, batches, network, regression, relaxed_network, symmetric_batches

import ace
from ace.errors import (
    AceError,
    CheckpointMismatch,
    LayerNotCalled,
    NonFiniteLoss,
    OptimizerMismatch,
    ShapeMismatch,
)

SETUPS = {
    "proximal-exact": (ace.Exact(), {}),
    "proximal-bounded": (ace.Bounded(0.1), {}),
    "proximal-resilient": (ace.Resilient(0.5), {}),
    "proximal-relative": (ace.Exact(measure="relative"), {}),
    "augmented-exact": (ace.Exact(), {"form": "augmented"}),
    "augmented-bounded": (ace.Bounded(0.1), {"form": "augmented"}),
    "paper-exact": (ace.Exact(), {"preset": "paper"}),
    "paper-resilient": (ace.Resilient(0.5), {"preset": "paper"}),
}
DETERMINISTIC = [name for name in SETUPS if "relative" not in name]
KINDS = {"sgd": (torch.optim.SGD, 0.05), "adam": (torch.optim.Adam, 1e-2)}


def training(setup="proximal-exact", kind="sgd", steps=150, loss=regression, model=None, constraint=None, **options):
    torch.manual_seed(0)
    default, form = SETUPS[setup]
    relaxed = relaxed_network() if model is None else model
    problem = ace.Problem(relaxed, loss, default if constraint is None else constraint)
    optimizer, lr = KINDS[kind]
    return ace.PrimalDual(problem, optimizer(relaxed.parameters(), lr=lr), steps=steps, **form, **options)


def variables(optimizer):
    """Everything that is learnt."""
    problem = optimizer.cmp
    found = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    found["multiplier"] = problem.multiplier.detach().clone()
    if problem.slack is not None:
        found["slack"] = problem.slack.detach().clone()
    return found


def assert_bitwise(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_bitwise(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


# What roll returns


@pytest.mark.parametrize("setup", SETUPS)
def test_report(setup):
    optimizer = training(setup)
    problem = optimizer.cmp
    assert isinstance(optimizer, cooper.optim.ConstrainedOptimizer)
    assert isinstance(problem, cooper.ConstrainedMinimizationProblem)
    gamma_before = torch.ones(3)
    for step, batch in enumerate(batches(3), start=1):
        expected = regression(problem.model, batch).detach()
        rollout = optimizer.roll(batch)
        assert isinstance(rollout, cooper.optim.RollOut)
        report = rollout.cmp_state.misc
        assert torch.equal(report["task_loss"], expected)
        assert report["task_loss"].dim() == 0
        assert not report["task_loss"].requires_grad
        assert report["step"] == step == optimizer.step
        assert report["layers"] == ("0", "2", "4")
        assert report["skipped"] is False
        assert_bitwise(report["gamma"], torch.cat(problem.gammas).detach())
        assert_bitwise(report["multiplier"], problem.multiplier.detach())
        for key in ("gamma", "violation", "multiplier"):
            assert report[key].shape == (3,)
            assert not report[key].requires_grad
        if setup in {"proximal-exact", "augmented-exact", "paper-exact"}:
            signed = "proximal" not in setup
            assert_bitwise(report["violation"], gamma_before if signed else gamma_before.abs())
        gamma_before = report["gamma"].clone()
    kept = report["multiplier"].clone()
    optimizer.roll(batches(1)[0])
    assert torch.equal(report["multiplier"], kept)  # reports are copies


def test_update_is_the_second_half_of_roll():
    rolled, updated = training(), training()
    for batch in batches(5):
        rolled.roll(batch)
        updated.update(regression(updated.cmp.model, batch))
    assert_bitwise(variables(rolled), variables(updated))

    rolled, updated = training("proximal-relative"), training("proximal-relative")
    for batch in batches(5):
        rolled.roll(batch)
        with updated.cmp.observing():
            loss = regression(updated.cmp.model, batch)
        updated.update(loss)
    assert_bitwise(variables(rolled), variables(updated))
    forgot = training("proximal-relative")
    with pytest.raises(AceError, match=r"problem\.observing"):
        forgot.update(regression(forgot.cmp.model, batch))


@pytest.mark.parametrize("setup", ["proximal-exact", "augmented-exact", "augmented-bounded"])
def test_gamma_is_outside_the_primal_optimizer(setup):
    """Weight decay, momentum and schedule of θ do not act on γ."""
    torch.manual_seed(0)
    constraint, form = SETUPS[setup]
    relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression, constraint)
    primal = torch.optim.SGD(relaxed.parameters(), lr=0.05, weight_decay=0.5, momentum=0.9)
    optimizer = ace.PrimalDual(problem, primal, steps=150, **form)
    ids = {id(p) for group in primal.param_groups for p in group["params"]}
    assert ids.isdisjoint(map(id, problem.gammas))
    assert len(ids) == len(list(relaxed.parameters())) - 3
    plain = training(setup)
    batch = batches(1)[0]
    optimizer.roll(batch)
    plain.roll(batch)
    for mine, other in zip(problem.gammas, plain.cmp.gammas, strict=True):
        assert torch.equal(mine, other)


# Measures


class Slow:
    """The measures by their definition, from explicit passes."""

    def __init__(self, model, x):
        self.neq, self.eq, value = [], [], x
        for index, stage in enumerate(model):
            if isinstance(stage, nn.Linear):
                equivariant = nn.functional.linear(value, stage.weight, stage.bias)
                term = stage.relaxation.term.map(value)
                self.neq.append(term)
                self.eq.append(equivariant)
                value = equivariant + stage.relaxation.gamma * term
            else:
                value = stage(value)
            del index

    def __call__(self, measure):
        return torch.stack(
            [
                neq.square().mean().sqrt() if measure == "norm" else neq.norm() / eq.norm()
                for neq, eq in zip(self.neq, self.eq, strict=True)
            ]
        ).detach()


@pytest.mark.parametrize("measure", ["norm", "relative"])
@pytest.mark.parametrize("setup", ["proximal-exact", "proximal-bounded", "augmented-bounded", "paper-resilient"])
def test_measured_violations(setup, measure, float64):
    eps = 0.1
    constraint = ace.Bounded(eps, measure=measure) if "bounded" in setup else type(SETUPS[setup][0])(measure=measure)
    optimizer = training(setup, constraint=constraint)
    problem = optimizer.cmp
    with torch.no_grad():
        for gamma, value in zip(problem.gammas, (-0.9, 0.5, 0.2), strict=True):
            gamma.fill_(value)
    for batch in batches(4):
        gamma = torch.cat(problem.gammas).detach()
        expected = gamma.abs() * Slow(problem.model, batch[0])(measure)
        if "bounded" in setup:
            expected -= eps
        if problem.slack is not None:
            expected -= problem.slack.detach()
        report = optimizer.roll(batch).cmp_state.misc
        torch.testing.assert_close(report["violation"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measure", ["norm", "relative"])
def test_measured_constraint_pulls_on_gamma_and_term(measure, float64):
    """In the augmented form the gradient is that of J + λᵀh + c/2 |h|², term weights included."""
    optimizer = training("augmented-exact", constraint=ace.Exact(measure=measure), penalty=0.7)
    problem = optimizer.cmp
    batch = batches(1)[0]
    with torch.no_grad():
        problem.multiplier.fill_(0.3)
    state = problem.compute_cmp_state(batch)
    state.compute_primal_lagrangian().lagrangian.backward()
    found = {name: p.grad.clone() for name, p in problem.model.named_parameters() if p.grad is not None}
    problem.model.zero_grad()
    slow = Slow(problem.model, batch[0])
    sizes = torch.stack(
        [
            n.square().mean().sqrt() if measure == "norm" else n.norm() / e.detach().norm()
            for n, e in zip(slow.neq, slow.eq, strict=True)
        ]
    )
    violation = torch.cat(problem.gammas).abs() * sizes
    (regression(problem.model, batch) + 0.3 * violation.sum() + 0.35 * violation.square().sum()).backward()
    expected = {name: p.grad for name, p in problem.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


# Clipping, accumulation, mixed precision


@pytest.mark.parametrize("setup", ["paper-exact", "paper-resilient", "augmented-exact", "proximal-exact"])
def test_clipping_is_that_of_theta_only(setup, float64):
    limit = 0.05
    clipped, plain = training(setup, clip=limit), training(setup)
    problem = plain.cmp
    outside = {id(p) for p in [*problem.gammas, problem.slack]}
    weights = [p for group in plain.primal_optimizers[0].param_groups for p in group["params"] if id(p) not in outside]
    by_hand = plain.primal_step
    norms = []

    def primal_step():
        norm = torch.cat([p.grad.flatten() for p in weights if p.grad is not None]).norm()
        norms.append(norm.item())
        for p in weights:
            if p.grad is not None:
                p.grad.mul_(min(1.0, limit / (norm.item() + 1e-6)))
        by_hand()

    plain.primal_step = primal_step
    for batch in batches(20):
        clipped.roll(batch)
        plain.roll(batch)
    assert max(norms) > 2 * limit
    torch.testing.assert_close(variables(clipped), variables(plain), rtol=0, atol=1e-12)


@pytest.mark.parametrize("setup", DETERMINISTIC)
def test_accumulation_is_one_large_batch(setup, float64):
    small, large = training(setup, accumulate=4), training(setup)
    for x, y in batches(15, size=64):
        reports = [small.roll(part).cmp_state.misc for part in zip(x.split(16), y.split(16), strict=True)]
        large.roll((x, y))
        assert [report["step"] for report in reports] == [large.step - 1] * 3 + [large.step]
        torch.testing.assert_close(variables(small), variables(large), rtol=0, atol=1e-12)


def autocast_loss(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(batch[0])
    assert prediction.dtype == torch.bfloat16
    return (prediction - batch[1]).square().mean()


@pytest.mark.parametrize("setup", SETUPS)
def test_autocast_inside_the_loss(setup):
    low, full = training(setup, loss=autocast_loss), training(setup)
    for batch in batches(20):
        report = low.roll(batch).cmp_state.misc
        full.roll(batch)
        assert report["multiplier"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in variables(low).values())
    torch.testing.assert_close(variables(low)["multiplier"], variables(full)["multiplier"], rtol=0.05, atol=0.01)
    torch.testing.assert_close(torch.cat(low.cmp.gammas), torch.cat(full.cmp.gammas), rtol=0.05, atol=0.05)


def bfloat16_loss(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(batch[0]).square().mean().to(torch.bfloat16)


def test_a_loss_in_low_precision_is_widened():
    optimizer = training(loss=bfloat16_loss)
    assert optimizer.roll(batches(1)[0]).cmp_state.misc["task_loss"].dtype == torch.float32


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_gradient_scaler_changes_nothing_without_overflow(setup, clip):
    """Scaling by a power of two is exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
    scaled, plain = training(setup, scaler=scaler, clip=clip), training(setup, clip=clip)
    for batch in batches(12):
        scaled.roll(batch)
        plain.roll(batch)
    assert scaler.get_scale() == 2.0**12
    torch.testing.assert_close(variables(scaled), variables(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("setup", SETUPS)
def test_gradient_scaler_skips_an_overflow(setup, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    optimizer = training(setup, scaler=scaler, clip=clip, loss=lambda m, b: 1e3 * regression(m, b))
    before = variables(optimizer)
    batch = batches(1)[0]
    optimizer.roll(batch)
    after = variables(optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in {"multiplier"})
    assert scaler.get_scale() == 2.0**125
    for _ in range(60):
        report = optimizer.roll(batch).cmp_state.misc
    assert all(value.isfinite().all() for value in variables(optimizer).values())
    assert not torch.equal(variables(optimizer)["0.weight"], before["0.weight"])
    assert report["multiplier"].isfinite().all()


# Bad batches


def poisoned(kind):
    """A loss that is not finite for batches marked so."""

    def loss(model, batch):
        x, y, bad = batch
        value = regression(model, (x, y))
        return value * float(kind) if bad else value

    return loss


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("setup", SETUPS)
def test_non_finite_batches_are_skipped_and_counted(setup, kind, float64):
    good = batches(6)
    clean, dirty = training(setup), training(setup, loss=poisoned(kind))
    for batch in good:
        clean.roll(batch)
        bad = dirty.roll((*batch, True)).cmp_state.misc
        assert bad["skipped"] is True
        assert not bad["task_loss"].isfinite()
        assert all(bad[key].isfinite().all() for key in ("gamma", "multiplier"))
        report = dirty.roll((*batch, False)).cmp_state.misc
        assert report["skipped"] is False
        assert report["step"] == clean.step
    assert dirty.skipped == 6
    assert_bitwise(variables(dirty), variables(clean))


@pytest.mark.parametrize("setup", SETUPS)
def test_too_many_non_finite_batches_in_a_row(setup):
    optimizer = training(setup, loss=poisoned("nan"), max_skipped=3)
    x, y = batches(1)[0]
    optimizer.roll((x, y, False))
    before = variables(optimizer)
    for _ in range(2):
        optimizer.roll((x, y, True))
    with pytest.raises(NonFiniteLoss, match=r"3 batches in a row .* at step 1 .*lower the learning rate"):
        optimizer.roll((x, y, True))
    assert_bitwise(variables(optimizer), before)
    assert optimizer.skipped == 3
    optimizer = training(setup, loss=poisoned("nan"), max_skipped=3)
    for _ in range(5):  # not in a row
        optimizer.roll((x, y, True))
        optimizer.roll((x, y, True))
        optimizer.roll((x, y, False))
    assert optimizer.skipped == 10


def test_infinite_gradients_are_skipped_when_clipping():
    def loss(model, batch):
        x, y, bad = batch
        return regression(model, (x, y)) + (0 * model[0].weight.sum()).abs().sqrt() * float(bad)

    optimizer = training(loss=loss, clip=1.0)
    x, y = batches(1)[0]
    before = {name: p for name, p in variables(optimizer).items() if name != "multiplier"}
    report = optimizer.roll((x, y, True)).cmp_state.misc
    assert report["skipped"] is True
    after = variables(optimizer)
    assert_bitwise({name: after[name] for name in before}, before)
    optimizer.roll((x, y, False))
    assert all(value.isfinite().all() for value in variables(optimizer).values())


@pytest.mark.parametrize("setup", DETERMINISTIC)
def test_a_bad_batch_drops_its_accumulation(setup, float64):
    """The parts before it are dropped with it; what follows is a whole update."""
    clean, dirty = training(setup, accumulate=2), training(setup, accumulate=2, loss=poisoned("nan"))
    one, two, three = batches(3)
    for batch in (two, three):
        clean.roll(batch)
    for batch in ((*one, False), (*one, True), (*two, False), (*three, False)):
        dirty.roll(batch)
    assert clean.step == dirty.step == 1
    torch.testing.assert_close(variables(dirty), variables(clean), rtol=0, atol=1e-12)


# Errors before anything is changed


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda m, b: (m(b[0]) - b[1]).square(), r"got shape \(8, 2\)"),
        (lambda m, b: regression(m, b).reshape(1), r"got shape \(1,\)"),
        (lambda m, b: regression(m, b).item(), "got a float"),
    ],
)
def test_losses_of_the_wrong_shape(loss, found):
    optimizer = training(loss=loss)
    before = variables(optimizer)
    with pytest.raises(ShapeMismatch, match=found):
        optimizer.roll(batches(1)[0])
    assert_bitwise(variables(optimizer), before)


def test_an_optimizer_that_misses_gamma():
    relaxed = relaxed_network()
    strict = [p for name, p in relaxed.named_parameters() if "relaxation" not in name]
    problem = ace.Problem(relaxed, regression)
    with pytest.raises(OptimizerMismatch) as caught:
        ace.PrimalDual(problem, torch.optim.SGD(strict, lr=0.1), steps=10)
    assert "0.relaxation.gamma is missing" in str(caught.value)
    assert "4.relaxation.term.map.weight is missing" in str(caught.value)  # all at once
    assert problem.form is None  # the problem can still be posed
    ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), lr=0.1), steps=10)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
def test_an_optimizer_that_holds_gamma_twice():
    relaxed = relaxed_network()
    gamma = ace.relaxations(relaxed)["2"].gamma
    primal = torch.optim.SGD([*relaxed.parameters(), gamma], lr=0.1)
    with pytest.raises(OptimizerMismatch, match=r"2\.relaxation\.gamma is held 2 times"):
        ace.PrimalDual(ace.Problem(relaxed, regression), primal, steps=10)
    assert sum(len(group["params"]) for group in primal.param_groups) == 16  # as it was


def test_frozen_terms_need_no_optimizer():
    relaxed = relaxed_network()
    for relaxation in ace.relaxations(relaxed).values():
        relaxation.term.requires_grad_(False)
    held = [p for p in relaxed.parameters() if p.requires_grad]
    optimizer = ace.PrimalDual(ace.Problem(relaxed, regression), torch.optim.SGD(held, lr=0.1), steps=10)
    assert optimizer.roll(batches(1)[0]).cmp_state.misc["step"] == 1


def test_a_layer_that_is_never_called():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)
            self.tidy = True

        def forward(self, x):
            return self.two(self.one(x) if self.tidy else self.one.forward(x))

    relaxed = ace.relax(Sneaky(), layers=nn.Linear, example=torch.zeros(1, 4))
    relaxed.tidy = False
    optimizer = training(model=relaxed)
    before = variables(optimizer)
    with pytest.raises(LayerNotCalled, match=r"never run through __call__.*: one;"):
        optimizer.roll(batches(1)[0])
    assert_bitwise(variables(optimizer), before)


def test_all_bad_arguments_at_once():
    relaxed = relaxed_network()
    problem, primal = ace.Problem(relaxed, regression), torch.optim.SGD(relaxed.parameters(), lr=0.1)
    with pytest.raises(AceError) as caught:
        ace.PrimalDual(
            problem,
            primal,
            steps=0,
            form="fast",
            preset="book",
            penalty=0,
            polish=1.0,
            accumulate=0,
            clip=-1.0,
            max_skipped=0,
        )
    for name in (
        "steps=0",
        "form='fast'",
        "preset='book'",
        "penalty=0",
        "polish=1.0",
        "accumulate=0",
        "clip=-1.0",
        "max_skipped=0",
    ):
        assert name in str(caught.value)
    with pytest.raises(AceError, match="only preset='paper' takes a dual rate"):
        ace.PrimalDual(problem, primal, steps=10, dual_lr=0.1)
    assert problem.form is None
    assert sum(len(group["params"]) for group in primal.param_groups) == 15


def test_a_problem_is_posed_once():
    optimizer = training()
    with pytest.raises(AceError, match=r"make a new ace\.Problem"):
        ace.PrimalDual(optimizer.cmp, torch.optim.SGD(optimizer.cmp.model.parameters(), lr=0.1), steps=10)


def test_resilient_has_no_augmented_form():
    with pytest.raises(AceError, match="quadratic price already"):
        training("augmented-exact", constraint=ace.Resilient())


def test_violations_that_would_broadcast_are_refused():
    optimizer = training()
    problem = optimizer.cmp
    problem.multiplier = nn.Parameter(torch.zeros(1))
    with pytest.raises(ShapeMismatch, match=r"violations of shape \(3,\) for multipliers of shape \(1,\)"):
        problem.compute_violations()


# Copies and resuming


def test_problem_can_be_copied_and_pickled():
    optimizer = training(loss=regression)
    optimizer.roll(batches(1)[0])
    problem = optimizer.cmp
    for twin in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(twin.multiplier, problem.multiplier)
        assert twin.multiplier is not problem.multiplier
        attached = next(iter(ace.relaxations(twin.model).values()))
        assert attached.dual[0] is twin.multiplier
    fresh = ace.Problem(network_relaxed(), regression)
    assert copy.deepcopy(fresh).form is None


def network_relaxed():
    return ace.relax(network(), layers=nn.Linear, example=torch.zeros(1, 4))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setup", SETUPS)
@given(split=st.integers(0, 40), steps=st.sampled_from([40, 150]))
@settings(max_examples=5)
def test_resuming_is_bitwise(setup, kind, split, steps):
    """From any step, over the retirement of terms and the polishing (planned 40) or before them (planned 150)."""
    data = batches(40)
    straight, first, second = (training(setup, kind, steps, clip=0.5) for _ in range(3))
    expected = [straight.roll(batch).cmp_state.misc for batch in data]
    for batch in data[:split]:
        first.roll(batch)
    with torch.no_grad():
        for parameter in second.cmp.model.parameters():
            parameter.add_(1.0)  # nothing of the new model may survive
    second.load_state_dict(through_a_file(first.state_dict()))
    assert_bitwise(variables(second), variables(first))
    assert [r.retired for r in second.cmp.relaxations.values()] == [r.retired for r in first.cmp.relaxations.values()]
    for batch, report in zip(data[split:], expected[split:], strict=True):
        assert_bitwise(second.roll(batch).cmp_state.misc, report)
    assert_bitwise(variables(second), variables(straight))


def test_retired_terms_stay_retired_after_loading():
    data = symmetric_batches(100)

    def make():
        relaxed = ace.relax(Even(), layers=Even, example=data[0][0])
        return training(model=relaxed, steps=100)

    first, second = make(), make()
    for batch in data[:95]:
        first.roll(batch)
    (mine,), (other,) = first.cmp.relaxations.values(), second.cmp.relaxations.values()
    assert mine.retired
    assert not other.retired
    second.load_state_dict(through_a_file(first.state_dict()))
    assert other.retired
    second.roll(data[95])
    assert other.gamma.item() == 0.0
    assert other.term.map.weight.grad is None


@pytest.mark.parametrize("setup", ["proximal-exact", "proximal-relative"])
def test_going_back_to_an_earlier_state_brings_terms_back(setup):
    data = batches(150)
    optimizer = training(setup)
    for batch in data[:5]:
        optimizer.roll(batch)
    early = through_a_file(optimizer.state_dict())
    expected = [optimizer.roll(batch).cmp_state.misc for batch in data[5:]]
    assert all(relaxation.retired for relaxation in optimizer.cmp.relaxations.values())
    optimizer.load_state_dict(early)
    assert not any(relaxation.retired for relaxation in optimizer.cmp.relaxations.values())
    for batch, report in zip(data[5:], expected, strict=True):
        assert_bitwise(optimizer.roll(batch).cmp_state.misc, report)


def test_scaler_is_resumed():
    def make():
        return training(scaler=torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3))

    first, second = make(), make()
    for batch in batches(7):
        first.roll(batch)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert second.scaler.get_scale() == first.scaler.get_scale() == 16.0


def test_states_of_another_model_are_refused_whole():
    other = ace.relax(network(width=5), layers=nn.Linear, exclude="^2$", example=torch.zeros(1, 4))
    source, target = training(model=other), training()
    source.roll(batches(1)[0])
    before = variables(target)
    with pytest.raises(CheckpointMismatch) as caught:
        target.load_state_dict(source.state_dict())
    message = str(caught.value)
    assert "missing 2.relaxation.gamma" in message
    assert "0.weight has shape (5, 4), not (6, 4)" in message
    assert "nothing was loaded" in message
    assert_bitwise(variables(target), before)
    with pytest.raises(CheckpointMismatch, match="no entry 'problem'"):
        target.load_state_dict({"model": target.cmp.model.state_dict()})


@pytest.mark.parametrize(
    "there", ["proximal-exact", "proximal-resilient", "augmented-exact", "paper-exact", "paper-resilient"]
)
@pytest.mark.parametrize(
    "here", ["proximal-exact", "proximal-resilient", "augmented-exact", "paper-exact", "paper-resilient"]
)
def test_states_of_another_form_are_refused_whole(here, there):
    source, target = training(there), training(here)
    source.roll(batches(1)[0])
    if here == there:
        target.load_state_dict(source.state_dict())
        return
    before = variables(target)
    with pytest.raises(CheckpointMismatch, match="another"):
        target.load_state_dict(source.state_dict())
    assert_bitwise(variables(target), before)
    target.roll(batches(1)[0])
