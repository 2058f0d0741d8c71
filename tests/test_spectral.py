"""The operator norm of a term as a measure of its size: right, cheap where large, kept within its bound."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import batches, network, regression

import ace
from ace.errors import AceError
from ace.terms import MLP, SMALL, SpectralLinear, linear, low_rank, matrix_of, operator_norm

WIDE = SMALL + 40


def largest(matrix):
    return torch.linalg.svdvals(matrix.detach().double())[0].item()


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, SMALL), st.integers(1, 200), st.integers(0, 99), st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=40)
def test_small_matrices_are_exact(rows, columns, seed, scale):
    for matrix in (scale * random(rows, columns, seed), scale * random(columns, rows, seed)):
        norm, start = operator_norm(matrix)
        assert start is None or min(matrix.shape) > SMALL
        assert norm.item() == pytest.approx(largest(matrix), rel=1e-12)


@pytest.mark.parametrize("shape", [(WIDE, WIDE), (WIDE, 300), (300, WIDE)])
def test_power_iteration_follows_a_large_matrix_that_moves(shape):
    matrix, drift = random(*shape), random(*shape, seed=1)
    _, start = operator_norm(matrix)
    for _ in range(200):
        matrix = matrix + 2e-3 * drift  # 20 % in all
        norm, start = operator_norm(matrix, start)
        assert 0.999 * largest(matrix) < norm.item() <= largest(matrix) * (1 + 1e-12)
    for _ in range(100):
        norm, start = operator_norm(matrix, start)
    assert norm.item() == pytest.approx(largest(matrix), rel=1e-7)


@pytest.mark.parametrize("width", [5, WIDE])
def test_the_gradient_is_the_outer_product_of_the_singular_vectors(width):
    matrix = random(width, width + 3).requires_grad_()
    operator_norm(matrix)[0].backward()
    left, _, right = torch.linalg.svd(matrix.detach())
    torch.testing.assert_close(matrix.grad, torch.outer(left[:, 0], right[0]))


def test_half_precision_and_zero():
    matrix = random(6, 5)
    assert operator_norm(matrix.bfloat16())[0].item() == pytest.approx(largest(matrix), rel=1e-2)
    zero = torch.zeros(4, 4, requires_grad=True)
    operator_norm(zero)[0].backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("make", [linear, low_rank(2), SpectralLinear])
def test_the_matrix_is_what_the_map_does(make):
    torch.manual_seed(0)
    inner = make(7, 5).eval()
    eye, zero = torch.eye(7), torch.zeros(7, 7)
    torch.testing.assert_close(matrix_of(inner), (inner(eye) - inner(zero)).T)


def test_maps_that_are_not_linear_have_no_matrix():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    for inner in (MLP(3, 3), nn.Identity(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), Doubled(2, 2), nn.Sequential()):
        assert matrix_of(inner) is None


def test_a_spectral_term_has_norm_one():
    torch.manual_seed(0)
    assert operator_norm(matrix_of(SpectralLinear(9, 6)))[0].item() == pytest.approx(1.0, rel=1e-6)


def relaxed(width=6, **options):
    torch.manual_seed(0)
    return ace.relax(network(width), layers=nn.Linear, example=torch.zeros(1, 4), **options)


def norms(model):
    return [largest(matrix_of(relaxation.term)) for relaxation in ace.relaxations(model).values()]


def train(constraint, width=6, steps=120, stop=None, state=None, **options):
    model = relaxed(width)
    problem = ace.Problem(model, regression, constraint)
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(model.parameters(), 3e-3), steps=steps, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    reports = [optimizer.roll(batch).cmp_state.misc for batch in batches(steps)[optimizer.step : stop]]
    return model, optimizer, reports


def test_the_violation_is_strength_times_norm_minus_bound(float64):
    model = relaxed()
    expected = torch.tensor(norms(model))
    problem = ace.Problem(model, regression, ace.Bounded(0.05, measure="spectral"))
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(model.parameters(), 0.1), steps=10)
    report = optimizer.update(regression(model, batches(1)[0])).cmp_state.misc  # no observing(): it needs no batch
    torch.testing.assert_close(report["violation"], expected - 0.05)


@pytest.mark.parametrize("width", [6, WIDE])
def test_a_bound_is_kept(width):
    eps = 0.02
    model, _, _ = train(ace.Bounded(eps, measure="spectral"), width)
    sizes = [
        abs(relaxation.gamma.item()) * norm
        for relaxation, norm in zip(ace.relaxations(model).values(), norms(model), strict=True)
    ]
    exact = [min(relaxation.term.map.weight.shape) <= SMALL for relaxation in ace.relaxations(model).values()]
    assert max(sizes) > 0.5 * eps  # the bound is used
    for size, is_exact in zip(sizes, exact, strict=True):
        assert size <= eps * (1 + (1e-6 if is_exact else 1e-3))
    assert all(exact) == (width == 6)


def test_the_other_constraints():
    model, _, _ = train(ace.Exact(measure="spectral"))
    assert [relaxation.gamma.item() for relaxation in ace.relaxations(model).values()] == [0.0] * 3
    for form in ({"form": "augmented"}, {"preset": "paper", "dual_lr": 0.01}):
        _, optimizer, reports = train(ace.Exact(measure="spectral"), **form)
        assert optimizer.cmp.multiplier.abs().max() > 0
        assert reports[-1]["violation"].max() < reports[0]["violation"].max()
    _, optimizer, reports = train(ace.Resilient(2.0, measure="spectral"))
    multiplier = torch.zeros(3)
    for report in reports:
        multiplier += 40 / 120 * (2.0 * report["violation"] - multiplier)
    torch.testing.assert_close(report["multiplier"], multiplier)
    assert multiplier.max() > 0


def test_resumed_training_is_bitwise_the_same():
    constraint = ace.Bounded(0.05, measure="spectral")
    whole, one, _ = train(constraint, WIDE, steps=40)
    _, half, _ = train(constraint, WIDE, steps=40, stop=20)
    assert any(start is not None for start in half.state_dict()["problem"]["singular"])
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed, two, _ = train(constraint, WIDE, steps=40, state=torch.load(file, weights_only=True))
    assert torch.equal(one.cmp.multiplier, two.cmp.multiplier)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])


@pytest.mark.parametrize(("options", "words"), [({"term": "mlp"}, "MLP"), ({"normalize": True}, "normalised")])
def test_terms_without_a_norm_are_listed(options, words):
    model = relaxed(**options)
    with pytest.raises(AceError, match=rf"0 \({words}\), 2 \({words}\), 4 \({words}\)\. Use"):
        ace.Problem(model, regression, ace.Bounded(0.1, measure="spectral"))
    ace.Problem(model, regression, ace.Bounded(0.1, measure="norm"))
