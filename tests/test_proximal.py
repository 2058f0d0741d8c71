"""The proximal form: soft threshold, independence of the units of the loss, terms that end at exactly 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import Even, Quadratic, batches, network, regression, relaxed_network, symmetric_batches

import ace
from ace.problem import PRIMAL_RATE
from ace.proximal import ProximalGradient


@given(
    st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=4),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.lists(st.floats(0, 3), min_size=4, max_size=4),
    st.floats(0.01, 0.3),
)
def test_step_is_the_proximal_operator(values, gradients, multipliers, lr):
    r"""γ ← argmin_x ½(x - γ + η g)² + η λ |x| with η = lr/s, by brute force; at the first step s = |g|."""
    gradients = [g if abs(g) > 1e-3 else 1.0 for g in gradients]
    gammas = [nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in values]
    multiplier = torch.tensor(multipliers[: len(values)], dtype=torch.float64)
    optimizer = ProximalGradient(gammas, multiplier, lr=lr)
    for gamma, gradient in zip(gammas, gradients, strict=False):
        gamma.grad = torch.tensor([gradient], dtype=torch.float64)
    optimizer.step()
    for gamma, value, gradient, price in zip(gammas, values, gradients, multipliers, strict=False):
        eta = lr / abs(gradient)
        grid = np.append(np.linspace(-1.5, 1.5, 300_001), 0.0)
        objective = 0.5 * (grid - value + eta * gradient) ** 2 + eta * price * np.abs(grid)
        best = grid[objective.argmin()]
        if abs(best) <= 1:
            assert gamma.item() == pytest.approx(best, abs=1.1e-5)


def test_running_scale_is_the_bias_corrected_rms():
    gamma = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ProximalGradient([gamma], torch.zeros(1, dtype=torch.float64), lr=1e-3)
    gradients = torch.randn(50, dtype=torch.float64)
    for gradient in gradients:
        gamma.grad = gradient.reshape(1)
        optimizer.step()
    weights = 0.99 ** torch.arange(49, -1, -1, dtype=torch.float64)
    rms = ((weights * gradients.square()).sum() / weights.sum()).sqrt()
    mean = (weights * gradients).sum() / weights.sum()
    torch.testing.assert_close(optimizer.scale, rms.reshape(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.mean, mean.reshape(1), rtol=1e-5, atol=1e-7)


def test_a_term_that_no_gradient_reaches_keeps_everything():
    gammas = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    multiplier = torch.zeros(2, dtype=torch.float64)
    optimizer = ProximalGradient(gammas, multiplier, lr=1e-3, carry=True)
    for gradient in (3.0, 1.0):
        for gamma in gammas:
            gamma.grad = torch.full((1,), gradient, dtype=torch.float64)
        optimizer.step()
    multiplier.fill_(0.5)
    scale, mean = optimizer.scale.clone(), optimizer.mean.clone()
    gammas[0].grad = None
    with torch.no_grad():
        gammas[0].zero_()
    optimizer.step()
    assert torch.equal(optimizer.scale[0], scale[0])
    assert torch.equal(optimizer.mean[0], mean[0])
    assert multiplier[0] == 0.5
    assert gammas[0].item() == 0.0
    assert optimizer.scale[1] < scale[1]
    torch.testing.assert_close(multiplier[1], 0.5 * optimizer.scale[1] / scale[1])  # carried with the scale


def descend(optimizer, gammas, gradients):
    for gamma, gradient in zip(gammas, gradients, strict=True):
        gamma.grad = gamma.detach().new_tensor([gradient])
    optimizer.step()
    return [gamma.item() for gamma in gammas]


def disturbed(gammas, how):
    """What users do to parameters between two steps."""
    if how == "moved":
        for gamma in gammas:
            gamma.data = gamma.data.clone()
    elif how == "one replaced":
        gammas[1].data = torch.full_like(gammas[1], 0.5)
    elif how == "loaded":
        nn.ParameterList(gammas).load_state_dict({str(i): torch.full((1,), 0.5 + i / 9) for i in range(3)})
    elif how == "set":
        with torch.no_grad():
            gammas[2].fill_(0.25)


@pytest.mark.parametrize("how", ["left", "moved", "one replaced", "loaded", "set"])
def test_the_common_vector_follows_what_happens_to_the_parameters(how):
    """As for optimizers of one γ each, which have no vector in common."""
    gradients = torch.randn(6, 3).tolist()
    together = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    apart = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    one = ProximalGradient(together, torch.tensor([0.1, 0.2, 0.3]), lr=0.1)
    each = [ProximalGradient([g], torch.tensor([m]), lr=0.1) for g, m in zip(apart, (0.1, 0.2, 0.3), strict=True)]
    for row in gradients[:3]:
        descend(one, together, row)
        for optimizer, gamma, gradient in zip(each, apart, row, strict=True):
            descend(optimizer, [gamma], [gradient])
    for gammas in (together, apart):
        disturbed(gammas, how)
    for row in gradients[3:]:
        found = descend(one, together, row)
        expected = [descend(o, [g], [x])[0] for o, g, x in zip(each, apart, row, strict=True)]
        assert found == pytest.approx(expected, rel=1e-6)
    assert [gamma.data_ptr() - together[0].data_ptr() for gamma in together] == [0, 4, 8]
    assert all(gamma.untyped_storage().nbytes() == 4 for gamma in together)  # saved as any other parameter


@pytest.mark.parametrize("why", ["dtypes", "shared"])
def test_gammas_that_cannot_be_joined_are_updated_apart(why):
    dtypes = (torch.float32, torch.float64) if why == "dtypes" else (torch.float32, torch.float32)
    gammas = [nn.Parameter(torch.ones(1, dtype=dtype)) for dtype in dtypes]
    if why == "shared":
        gammas[1].share_memory_()
    places = [gamma.data_ptr() for gamma in gammas]
    optimizer = ProximalGradient(gammas, torch.tensor([0.1, 0.2]), lr=0.1)
    alike = [nn.Parameter(torch.ones(1)) for _ in gammas]
    other = ProximalGradient(alike, torch.tensor([0.1, 0.2]), lr=0.1)
    for gradients in ([0.5, 0.5], [0.1, -2.0]):
        assert descend(optimizer, gammas, gradients) == pytest.approx(descend(other, alike, gradients), rel=1e-6)
    assert [gamma.dtype for gamma in gammas] == list(dtypes)
    assert [gamma.data_ptr() for gamma in gammas] == places


def test_a_graph_that_still_needs_the_old_gammas_is_refused():
    gammas = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = ProximalGradient(gammas, torch.tensor([0.1, 0.2]), lr=0.1)
    loss = torch.cat(gammas).sum() * gammas[0].square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closures_are_refused():
    optimizer = ProximalGradient([nn.Parameter(torch.ones(1))], torch.zeros(1), lr=0.1)
    with pytest.raises(NotImplementedError, match="closure"):
        optimizer.step(lambda: 0.0)


class EvenNetwork(nn.Module):
    """Two even layers in a row."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Even(), Even()

    def forward(self, x):
        return self.second(self.first(x) + 1.0)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("steps", [300, 1000])
def test_symmetric_data_end_with_every_gamma_exactly_zero(steps, kind):
    """No rate is set; the terms start on and the data do not need them."""
    model = EvenNetwork()
    data = symmetric_batches(steps)
    relaxed = ace.relax(model, layers=Even, example=data[0][0])
    problem = ace.Problem(relaxed, regression)
    optimizer = ace.PrimalDual(problem, kind(relaxed.parameters(), lr=0.02), steps=steps)
    path = torch.stack([optimizer.roll(batch).cmp_state.misc["gamma"] for batch in data])
    assert torch.equal(path[-1], torch.zeros(2))
    assert path.abs().max() <= 1.0
    assert path.abs()[: steps // 20].mean() > 0.3  # off because they were driven off, not from the start
    last = int(path.abs().sum(1).nonzero().max())
    assert last < 0.9 * steps  # by the multipliers, or at the latest when polishing begins
    x = data[0][0]
    ace.restore(relaxed)  # without a warning: warnings are errors
    assert torch.equal(model(x), model(-x))


@pytest.mark.parametrize("constraint", [ace.Exact(), ace.Bounded(0.1)], ids=["exact", "bounded"])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_paths_do_not_depend_on_the_units_of_the_loss(float64, constraint, factor):
    """J -> aJ with θ's rate divided by a: same θ and γ, λ -> aλ."""

    def train(a):
        torch.manual_seed(0)
        relaxed = relaxed_network()
        problem = ace.Problem(relaxed, lambda model, batch: a * regression(model, batch), constraint)
        primal = torch.optim.SGD(relaxed.parameters(), lr=0.05 / a)
        optimizer = ace.PrimalDual(problem, primal, steps=200)
        reports = [optimizer.roll(batch).cmp_state.misc for batch in batches(200)]
        gamma, multiplier = (torch.stack([report[key] for report in reports]) for key in ("gamma", "multiplier"))
        return gamma, multiplier / a, dict(relaxed.named_parameters())

    gamma, multiplier, parameters = train(1.0)
    scaled_gamma, scaled_multiplier, scaled_parameters = train(factor)
    assert gamma.std(0).min() > 0.05
    torch.testing.assert_close(scaled_gamma, gamma, rtol=0, atol=1e-9)
    torch.testing.assert_close(scaled_multiplier, multiplier, rtol=0, atol=1e-9)
    torch.testing.assert_close(scaled_parameters, parameters, rtol=0, atol=1e-9)


def test_gamma_moves_by_bounded_steps(float64):
    """No step is longer than κ_γ/T in units of the gradient, whatever the loss; at the end γ is 0."""
    quadratic = Quadratic()
    problem = ace.Problem(quadratic.model, quadratic.loss)
    primal = torch.optim.SGD(quadratic.model.parameters(), lr=0.0)  # θ is frozen
    optimizer = ace.PrimalDual(problem, primal, steps=300)
    path = torch.stack([optimizer.roll(quadratic.batch).cmp_state.misc["gamma"] for _ in range(300)])
    assert (path[1:].abs() <= path[:-1].abs() + PRIMAL_RATE / 300 + 1e-12).all()  # no step longer than κ_γ/T
    assert torch.equal(path[-1], torch.zeros(3))


def retired(model):
    return [relaxation.retired for relaxation in ace.relaxations(model).values()]


def test_retired_terms_leave_the_graph_and_stay_out():
    model = relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression)
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(relaxed.parameters(), 1e-3), steps=50, polish=0.2)
    data = batches(50)
    for step, batch in enumerate(data, start=1):
        optimizer.roll(batch)
        if step >= 40:
            assert retired(relaxed) == [True] * 3
    assert all(p.grad is None for r in ace.relaxations(relaxed).values() for p in r.parameters())
    terms = [p.detach().clone() for r in ace.relaxations(relaxed).values() for p in r.parameters()]
    weights = model[0].weight.detach().clone()
    optimizer.roll(data[0])
    after = [p for r in ace.relaxations(relaxed).values() for p in r.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(terms, after, strict=True))
    assert not torch.equal(model[0].weight, weights)


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("measure", ["norm", "relative"])
def test_measured_constraints_survive_retired_terms(measure, scale):
    """A retired term has no size on the batch; γ and λ stay finite, in any units of the loss."""
    data = symmetric_batches(200)
    relaxed = ace.relax(EvenNetwork(), layers=Even, example=data[0][0])
    problem = ace.Problem(relaxed, lambda m, b: scale * regression(m, b), ace.Exact(measure=measure))
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), lr=0.02 / scale), steps=200)
    for batch in data:
        report = optimizer.roll(batch).cmp_state.misc
        assert all(report[key].isfinite().all() for key in ("gamma", "multiplier", "violation"))
    assert torch.equal(report["gamma"], torch.zeros(2))
    ace.restore(relaxed)


def test_relative_measure_with_a_layer_that_starts_at_zero():
    """Zero-initialised layers are common; the relative size of their term is very large, not infinite."""
    model = network()
    nn.init.zeros_(model[4].weight)
    nn.init.zeros_(model[4].bias)
    relaxed = ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 4))
    problem = ace.Problem(relaxed, regression, ace.Exact(measure="relative"))
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(relaxed.parameters(), 1e-3), steps=50)
    for x, y in batches(50):
        batch = 10 * x, y
        report = optimizer.roll(batch).cmp_state.misc
        assert all(report[key].isfinite().all() for key in ("gamma", "multiplier", "violation"))
    assert torch.equal(report["gamma"], torch.zeros(3))
