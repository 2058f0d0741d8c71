"""``preset="paper"`` is Algorithms 1 and 2 of the ACE paper, to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import batches, regression, relaxed_network

import ace

STEPS = 200
pytestmark = pytest.mark.usefixtures("float64")


class ByHand(nn.Module):
    """The same network with f_eq + γ f_neq written out, and its λ and u."""

    def __init__(self, relaxed):
        super().__init__()
        copy = {name: nn.Parameter(value.detach().clone()) for name, value in relaxed.named_parameters()}
        self.names = list(copy)
        self.values = nn.ParameterList(copy.values())
        self.slack = torch.zeros(3, requires_grad=True)
        self.multiplier = torch.zeros(3, requires_grad=True)

    def __getitem__(self, name):
        return self.values[self.names.index(name)]

    def gamma(self):
        return torch.cat([self[f"{k}.relaxation.gamma"] for k in (0, 2, 4)])

    def forward(self, x):
        for k in (0, 2, 4):
            equivariant = x @ self[f"{k}.weight"].T + self[f"{k}.bias"]
            term = f"{k}.relaxation.term.map"
            x = equivariant + self[f"{k}.relaxation.gamma"] * (x @ self[f"{term}.weight"].T + self[f"{term}.bias"])
            x = x.tanh() if k < 4 else x
        return x


def differences(relaxed, problem, hand):
    theirs = dict(relaxed.named_parameters())
    found = [(theirs[name] - value).abs().max().item() for name, value in zip(hand.names, hand.values, strict=True)]
    found.append((problem.multiplier - hand.multiplier).abs().max().item())
    if problem.slack is not None:
        found.append((problem.slack - hand.slack).abs().max().item())
    return max(found)


CASES = [(torch.optim.SGD, 0.05, 0.02), (torch.optim.Adam, 1e-2, 3e-3)]


@pytest.mark.parametrize(("kind", "lr", "dual_lr"), CASES, ids=["sgd", "adam"])
def test_algorithm_1(kind, lr, dual_lr):
    relaxed = relaxed_network()
    hand = ByHand(relaxed)
    problem = ace.Problem(relaxed, regression, ace.Exact())
    optimizer = ace.PrimalDual(problem, kind(relaxed.parameters(), lr=lr), steps=STEPS, preset="paper", dual_lr=dual_lr)
    primal, dual = kind(hand.values.parameters(), lr=lr), kind([hand.multiplier], lr=dual_lr)
    worst, peak = 0.0, torch.zeros(3)
    for batch in batches(STEPS):
        optimizer.roll(batch)
        primal.zero_grad()
        (regression(hand, batch) + hand.multiplier.detach() @ hand.gamma()).backward()
        hand.multiplier.grad = -hand.gamma().detach().clone()  # ascent on γ(t), before γ moves
        primal.step()
        dual.step()
        worst = max(worst, differences(relaxed, problem, hand))
        peak = torch.maximum(peak, hand.multiplier.detach().abs())
    assert worst <= 1e-12
    assert (hand.gamma() - 1).abs().min() > 1e-3  # the comparison was not of two models that stood still
    assert peak.min() > 1e-3


@pytest.mark.parametrize(("kind", "lr", "dual_lr"), CASES, ids=["sgd", "adam"])
@pytest.mark.parametrize("rho", [1.0, 0.3])
def test_algorithm_2(kind, lr, dual_lr, rho):
    relaxed = relaxed_network()
    hand = ByHand(relaxed)
    problem = ace.Problem(relaxed, regression, ace.Resilient(rho=rho))
    optimizer = ace.PrimalDual(problem, kind(relaxed.parameters(), lr=lr), steps=STEPS, preset="paper", dual_lr=dual_lr)
    primal = kind([*hand.values.parameters(), hand.slack], lr=lr)
    dual = kind([hand.multiplier], lr=dual_lr)
    worst, peak = 0.0, torch.zeros(3)
    for batch in batches(STEPS):
        optimizer.roll(batch)
        primal.zero_grad()
        violation = hand.gamma().abs() - hand.slack
        objective = regression(hand, batch) + 0.5 * rho * hand.slack.square().sum()
        (objective + hand.multiplier.detach() @ violation).backward()
        hand.multiplier.grad = -violation.detach().clone()
        primal.step()
        dual.step()
        with torch.no_grad():
            hand.multiplier.clamp_(min=0)
        worst = max(worst, differences(relaxed, problem, hand))
        peak = torch.maximum(peak, hand.multiplier.detach().abs())
    assert worst <= 1e-12
    assert hand.slack.abs().min() > 1e-3
    assert peak.min() > 1e-3


def test_multipliers_are_projected():
    """γ below its slack drives λ down; [·]₊ holds it at 0."""
    relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression, ace.Resilient(rho=1.0))
    optimizer = ace.PrimalDual(
        problem, torch.optim.SGD(relaxed.parameters(), lr=1e-3), steps=10, preset="paper", dual_lr=0.5
    )
    with torch.no_grad():
        problem.slack.fill_(5.0)
    optimizer.roll(batches(1)[0])
    assert torch.equal(problem.multiplier, torch.zeros(3))


def test_dual_rate_defaults_to_the_primal_rate():
    relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression)
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), lr=0.25), steps=10, preset="paper")
    optimizer.roll(batches(1)[0])
    assert torch.equal(problem.multiplier, torch.full((3,), 0.25))  # λ(1) = 0 + 0.25 γ(0), γ(0) = 1


def test_task_loss_is_reported_without_the_price_of_the_slack():
    relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression, ace.Resilient(rho=7.0))
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), lr=0.1), steps=10, preset="paper")
    for batch in batches(3):
        expected = regression(relaxed, batch)
        rollout = optimizer.roll(batch)
        assert torch.equal(rollout.cmp_state.misc["task_loss"], expected)
        assert torch.equal(rollout.loss, expected)
