"""Convex problems with closed-form KKT points: weights, γ and multipliers within 1e-6."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import Quadratic

import ace
from ace.problem import PRIMAL_RATE

TOLERANCE = {"rtol": 0, "atol": 1e-6}
pytestmark = pytest.mark.usefixtures("float64")


def train(quadratic, constraint, steps, rolls, **options):
    problem = ace.Problem(quadratic.model, quadratic.loss, constraint)
    primal = torch.optim.SGD(quadratic.model.parameters(), lr=quadratic.lr)
    optimizer = ace.PrimalDual(problem, primal, steps=steps, **options)
    for _ in range(rolls):
        rollout = optimizer.roll(quadratic.batch)
    return rollout.cmp_state.misc


def assert_kkt(quadratic, report, theta, gamma, multiplier):
    np.testing.assert_allclose(quadratic.theta, theta, **TOLERANCE)
    np.testing.assert_allclose(quadratic.gamma, gamma, **TOLERANCE)
    np.testing.assert_allclose(report["multiplier"].numpy(), multiplier, **TOLERANCE)


@pytest.mark.parametrize("seed", [0, 1])
def test_exact_augmented(seed):
    """L = J + λᵀγ + ...: stationary in γ where λ = -∂J/∂γ at γ = 0; the sign of λ is free."""
    quadratic = Quadratic(seed=seed)
    report = train(quadratic, ace.Exact(), 600, 1200, form="augmented", penalty=10.0)
    theta, gamma, gradient = quadratic.solve(fixed=dict.fromkeys(range(3), 0.0))
    assert np.abs(gradient).min() > 1e-2
    assert_kkt(quadratic, report, theta, gamma, -gradient)
    np.testing.assert_allclose(report["violation"].numpy(), 0.0, **TOLERANCE)


def test_exact_proximal():
    """γ = 0 with λ at least |∂J/∂γ|: the threshold of an exact penalty, not the multiplier itself."""
    quadratic = Quadratic()
    report = train(quadratic, ace.Exact(), 1000, 1000)
    theta, _, gradient = quadratic.solve(fixed=dict.fromkeys(range(3), 0.0))
    assert np.array_equal(quadratic.gamma, np.zeros(3))
    np.testing.assert_allclose(quadratic.theta, theta, **TOLERANCE)
    assert (report["multiplier"].numpy() > 0).all()
    assert np.abs(gradient).min() > 1e-2


@pytest.mark.parametrize("rho", [1.0, 0.3])
@pytest.mark.parametrize("options", [{"preset": "paper", "dual_lr": 0.1}, {}], ids=["paper", "proximal"])
def test_resilient_is_ridge_regression(rho, options):
    """u = |γ| = λ/ρ: the solution of min J + ρ/2 |γ|²."""
    quadratic = Quadratic()
    report = train(quadratic, ace.Resilient(rho), 1500, 1500, **options)
    theta, gamma, gradient = quadratic.solve(extra=[rho] * 3)
    assert np.abs(gamma).min() > 0.1
    assert_kkt(quadratic, report, theta, gamma, rho * np.abs(gamma))
    np.testing.assert_allclose(report["multiplier"].numpy(), np.abs(gradient), **TOLERANCE)


def bounded_solution(quadratic, eps, measured):
    """Solution for a bound on |γ| r that is active in every layer."""
    _, free, _ = quadratic.solve()
    limit = eps / measured
    assert (np.abs(free) > limit).all()
    theta, gamma, gradient = quadratic.solve(fixed=dict(enumerate(limit * np.sign(free))))
    return theta, gamma, -gradient * np.sign(free) / measured


@pytest.mark.parametrize(
    "options",
    [{"form": "augmented", "penalty": 10.0}, {"preset": "paper", "dual_lr": 0.1}],
    ids=["augmented", "paper"],
)
@pytest.mark.parametrize(("measure", "measured"), [("strength", 1.0), ("norm", 1 / np.sqrt(2))])
def test_bounded_with_active_bounds(options, measure, measured):
    """At an active bound λ r = -∂J/∂|γ|. (Each term is a unit vector of 2 entries, so r = 1/√2.)"""
    quadratic = Quadratic()
    report = train(quadratic, ace.Bounded(0.1, measure=measure), 1000, 2000, **options)
    theta, gamma, multiplier = bounded_solution(quadratic, 0.1, measured)
    assert multiplier.min() > 0.1
    assert_kkt(quadratic, report, theta, gamma, multiplier)


def test_bounded_proximal_with_active_bounds():
    """The default form ends exactly on the bound; its multiplier, found by steps of fixed length, is near."""
    quadratic = Quadratic()
    report = train(quadratic, ace.Bounded(0.1), 1000, 1000)
    theta, gamma, multiplier = bounded_solution(quadratic, 0.1, 1.0)
    np.testing.assert_allclose(quadratic.theta, theta, **TOLERANCE)
    np.testing.assert_allclose(quadratic.gamma, gamma, **TOLERANCE)
    np.testing.assert_allclose(report["multiplier"].numpy(), multiplier, rtol=0.5)


@pytest.mark.parametrize("options", [{}, {"form": "augmented"}], ids=["proximal", "augmented"])
def test_bounded_with_slack_bounds(options):
    """A bound that does not bind has no multiplier and changes nothing."""
    quadratic = Quadratic()
    quadratic.b *= 0.2
    quadratic.linear *= 0.2
    theta, gamma, _ = quadratic.solve()
    assert np.abs(gamma).min() > 0.05
    assert np.abs(gamma).max() < 0.2
    report = train(quadratic, ace.Bounded(0.3), 1000, 3000 if options else 1000, **options)
    near = {"rtol": 0, "atol": 1e-6 if options else PRIMAL_RATE / 1000}  # one proximal step
    np.testing.assert_allclose(quadratic.theta, theta, **near)
    np.testing.assert_allclose(quadratic.gamma, gamma, **near)
    np.testing.assert_allclose(report["multiplier"].numpy(), 0.0, atol=1e-6)
