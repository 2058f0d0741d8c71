"""What terms are worth: measured without a trace, against a slow oracle; terms worth nothing go, others stay."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Even, batches, regression, relaxed_network, symmetric_batches

import ace
import ace.saliency
from ace.errors import AceError
from ace.saliency import ENOUGH, Saliency


def noisy(layers=3):
    """Relaxed layers between BatchNorm and dropout, in training mode."""
    stages = []
    for features_out in [6] * (layers - 1) + [2]:
        stages += [nn.LazyLinear(features_out), nn.BatchNorm1d(features_out), nn.Dropout(0.3)]
    model = nn.Sequential(*stages)
    model(torch.zeros(2, 4))  # makes the weights
    return ace.relax(model, layers=nn.Linear, example=torch.randn(4, 4))


def posed(model, steps, loss=regression, constraint=None, lr=0.02, **options):
    return ace.PrimalDual(
        ace.Problem(model, loss, constraint), torch.optim.Adam(model.parameters(), lr), steps, **options
    )


def everything(model):
    return [t.detach().clone() for t in [*model.parameters(), *model.buffers()]]


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def slowly(model, batch, indices):
    """The loss of a copy of the model without some terms, with the random numbers that are next."""
    state = torch.get_rng_state()
    twin = copy.deepcopy(model)
    for index in indices:
        nn.init.zeros_(list(ace.relaxations(twin).values())[index].gamma)
    value = regression(twin, batch).item()
    torch.set_rng_state(state)
    return value


@given(seed=st.integers(0, 1000), strengths=st.lists(st.floats(0.1, 1), min_size=3, max_size=3), size=st.integers(2, 9))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_measured_as_copies_of_the_model_would(seed, strengths, size, float64):
    torch.manual_seed(seed)
    model, (batch, *_) = noisy(), batches(1, size, seed)
    batch = (batch[0], batch[1])
    attached = list(ace.relaxations(model).values())
    for relaxation, strength in zip(attached, strengths, strict=True):
        nn.init.constant_(relaxation.gamma, strength)
        nn.init.normal_(relaxation.term.map.weight)
    saliency = Saliency(attached, threshold=0.01, steps=1000)
    before, state = everything(model), torch.get_rng_state()
    base = slowly(model, batch, [])
    expected = [slowly(model, batch, [index]) / base - 1 for index in range(3)]
    assert not saliency.measure(model, lambda: regression(model, batch)).any()
    torch.testing.assert_close(saliency.mean.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    saliency.measure(model, lambda: 2 * regression(model, batch))  # the same in other units
    torch.testing.assert_close(saliency.mean.double(), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_equal(everything(model), before)
    assert_equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_does_not_notice_that_it_is_measured(monkeypatch):
    monkeypatch.setattr(ace.saliency, "ENOUGH", math.inf)  # nothing is let go for it

    def trained(threshold):
        torch.manual_seed(0)
        optimizer = posed(noisy(), 1000, saliency=threshold)
        reports = [optimizer.roll(batch).cmp_state.misc["gamma"] for batch in batches(120)]
        return everything(optimizer.cmp.model), torch.stack(reports), optimizer._saliency.count

    *measured, count = trained(0.01)
    *plain, never = trained(0.0)
    assert (count, never) == (4, 0)  # every 25 steps
    assert_equal(measured, plain)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**20])
def test_a_useless_term_goes_at_once_and_a_useful_one_stays(scale):
    """y = 2 |x| + b x, of which the model without its term can be the first part only."""

    def let_go(b, **options):
        torch.manual_seed(0)
        data = [(x, y + b * x) for x, y in symmetric_batches(400)]
        model = ace.relax(Even(), layers=Even, example=data[0][0])
        nn.init.constant_(model.weight, 2.0)
        (relaxation,) = ace.relaxations(model).values()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05 / scale)
        problem = ace.Problem(model, lambda model, batch: scale * (regression(model, batch) + 0.01))
        optimizer = ace.PrimalDual(problem, sgd, len(data), **options)
        for step, batch in enumerate(data):
            optimizer.roll(batch)
            if relaxation.retired:
                return step
        return None

    assert let_go(0.0) == ENOUGH * 10  # measured every 10 steps, and let go before the next
    assert let_go(0.0, saliency=0) > 60
    assert let_go(1.0) == let_go(1.0, saliency=0) > 150  # γ and λ decide


def test_terms_that_do_the_same_work_do_not_go_together():
    model = noisy()
    attached = list(ace.relaxations(model).values())
    saliency = Saliency(attached, threshold=0.01, steps=1000)

    def loss():
        """The first two do the same, the last adds nothing."""
        first, second, third = (relaxation.gamma.item() > 0 for relaxation in attached)
        return torch.tensor(1.0 if first or second else 2.0) + 1e-4 * second + 1e-3 * third

    found = [saliency.measure(model, loss) for _ in range(ENOUGH)]
    assert not torch.stack(found[:-1]).any()
    assert found[-1].tolist() == [False, False, True]  # together they cost too much: the least of them
    attached[2].retire()
    assert saliency.measure(model, loss).tolist() == [False, True, False]
    attached[1].retire()
    assert saliency.measure(model, loss).tolist() == [False, False, False]  # now worth all
    assert saliency.measure(model, lambda: torch.tensor(1.0)).tolist() == [False, False, False]  # a mean is kept
    found = [saliency.measure(model, lambda: torch.tensor(1.0)).tolist() for _ in range(10)]
    assert found[-1] == [True, False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_batch_without_a_finite_loss_tells_nothing(bad):
    model = noisy()
    saliency = Saliency(list(ace.relaxations(model).values()), threshold=0.5, steps=1000)
    for _ in range(2 * ENOUGH):
        assert not saliency.measure(model, lambda: torch.tensor(bad)).any()
    assert saliency.mean.tolist() == [math.inf] * 3


def test_terms_go_together_where_that_costs_little():
    model = noisy()
    saliency = Saliency(list(ace.relaxations(model).values()), threshold=0.01, steps=1000)
    for _ in range(ENOUGH):
        found = saliency.measure(model, lambda: torch.tensor(1.0))
    assert found.all()


def test_loops_of_their_own():
    rolled, updated, without = (posed(noisy_from(0), 1000) for _ in range(3))
    torch.manual_seed(0)
    for batch in batches(100):
        rolled.roll(batch)
    torch.manual_seed(0)
    for batch in batches(100):
        updated.probe(batch)
        updated.update(regression(updated.cmp.model, batch))
    for batch in batches(100):
        without.update(regression(without.cmp.model, batch))
    assert_equal(everything(rolled.cmp.model), everything(updated.cmp.model))
    assert updated._off.any()
    assert not without._off.any()


def noisy_from(seed):
    torch.manual_seed(seed)
    return noisy()


@given(split=st.integers(0, 120))
@settings(max_examples=10)
def test_resuming_is_bitwise(split):
    data = batches(120)
    straight, first, second = (posed(noisy_from(0), 1000) for _ in range(3))

    def roll(optimizer, part):
        return [optimizer.roll(batch).cmp_state.misc["gamma"] for batch in part]

    torch.manual_seed(0)
    expected = roll(straight, data)
    torch.manual_seed(0)
    roll(first, data[:split])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_equal(roll(second, data[split:]), expected[split:])
    assert_equal(everything(second.cmp.model), everything(straight.cmp.model))
    assert straight._off.any()


def test_a_compiled_model_is_compiled_once_and_its_retired_terms_stay_off():
    torch.manual_seed(0)
    model = relaxed_network()
    optimizer = posed(torch.compile(model, fullgraph=True, backend="aot_eager"), 1000)
    data = batches(110)
    optimizer.roll(data[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in data[1:]:
            optimizer.roll(batch)
    off = optimizer._off
    assert off.any()
    assert not off.all()
    assert not torch.cat(optimizer.cmp.gammas)[off].any()


def test_a_loss_with_forces():
    """The gradient of the output is part of the loss, so a forward pass without a graph would fail."""

    def loss(model, batch):
        x, y = batch
        x = x.clone().requires_grad_()
        (forces,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (forces - y).square().mean() + 1e-3

    torch.manual_seed(0)
    data = symmetric_batches(100)
    optimizer = posed(ace.relax(Even(), layers=Even, example=data[0][0]), 100, loss)
    for x, _ in data:
        optimizer.roll((x, 2 * x.sign()))
    assert optimizer._saliency.count >= ENOUGH


@pytest.mark.parametrize(
    ("constraint", "options"),
    [(ace.Bounded(0.1), {}), (ace.Resilient(), {}), (None, {"form": "augmented"}), (None, {"preset": "paper"})],
)
def test_measured_only_where_terms_are_to_vanish(constraint, options):
    optimizer = posed(noisy_from(0), 200, constraint=constraint, **options)
    for batch in batches(70):
        optimizer.roll(batch)
    assert optimizer._saliency.count == 0


@pytest.mark.parametrize("saliency", [-0.1, math.inf, math.nan])
def test_a_threshold_that_is_none(saliency):
    with pytest.raises(AceError, match=r"saliency=.*: a share of the loss, such as 0\.01; 0 keeps"):
        posed(noisy(), 10, saliency=saliency)


@pytest.mark.parametrize(
    ("steps", "layers", "interval"), [(4000, 3, 100), (500, 3, 20), (50_000, 60, 1250), (1000, 11, 60)]
)
def test_how_often(steps, layers, interval):
    """Forty times, but never so often that it takes more than a fifth as many forward passes as there are steps."""
    saliency = Saliency([None] * layers, 0.01, steps)
    assert saliency.interval == interval
    assert [step for step in range(2 * interval + 1) if saliency.due(step)] == [interval, 2 * interval]
    assert (layers + 1) / interval <= 1 / 5
