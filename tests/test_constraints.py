"""Constraints: what they measure and what they refuse."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import relaxed_network

import ace
from ace.errors import AceError
from ace.relaxation import measuring


@pytest.mark.parametrize("constraint", [ace.Exact(), ace.Bounded(0.1), ace.Resilient()])
def test_strength_needs_no_batch(constraint):
    assert constraint.deterministic
    assert constraint.measure == "strength"


@pytest.mark.parametrize("kind", [ace.Exact, lambda **kw: ace.Bounded(0.1, **kw), ace.Resilient])
@pytest.mark.parametrize("measure", ["norm", "relative"])
def test_other_measures_do(kind, measure):
    constraint = kind(measure=measure)
    assert not constraint.deterministic
    assert pickle.loads(pickle.dumps(constraint)) == constraint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ace.Exact(measure="size"), r"measure='size': choose one of 'strength', 'norm', 'relative'"),
        (lambda: ace.Bounded(0.0), r"Bounded\(eps=0\.0\): .* use Exact\(\) for 0"),
        (lambda: ace.Bounded(-1.0), "must be positive"),
        (lambda: ace.Bounded(float("nan")), "must be positive"),
        (lambda: ace.Bounded(0.1, measure="rms"), "measure='rms'"),
        (lambda: ace.Resilient(rho=0.0), "must be positive"),
        (lambda: ace.Resilient(rho=float("nan")), "must be positive"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(AceError, match=message):
        make()


positive = st.floats(1e-4, 1e4)


@given(st.lists(st.tuples(positive, positive, st.integers(1, 1000)), min_size=1, max_size=4))
def test_units_from_sizes(sizes):
    tensors = [(torch.tensor(n * n).double(), torch.tensor(e * e).double(), count) for n, e, count in sizes]
    relative = ace.Exact(measure="relative").units(tensors)
    norm = ace.Exact(measure="norm").units(tensors)
    for found, rms, (n, e, count) in zip(relative.tolist(), norm.tolist(), sizes, strict=True):
        assert found == pytest.approx(min(max(n / e, 1e-6), 1e6), rel=1e-6)
        assert rms == pytest.approx(n / count**0.5, rel=1e-6)


def test_sizes_add_up_over_calls_and_carry_a_gradient(float64):
    relaxed = relaxed_network()
    first, second = torch.randn(3, 4), torch.randn(5, 4)
    relaxation = ace.relaxations(relaxed)["0"]
    with measuring([relaxation]) as sizes:
        relaxed(first)
        relaxed(second)
        neq, eq, count = sizes()[0]
    x = torch.cat((first, second))
    linear = relaxed[0]
    torch.testing.assert_close(neq, relaxation.term.map(x).square().sum())
    torch.testing.assert_close(eq, (x @ linear.weight.T + linear.bias).square().sum().detach())
    assert count == 8 * 6
    assert neq.requires_grad
    assert not eq.requires_grad
    assert relaxation.sizes is None  # nothing is kept after the context
    (gradient,) = torch.autograd.grad(neq, relaxation.term.map.weight)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("measure", ["norm", "relative"])
def test_sizes_of_silent_terms_are_finite(measure):
    zero = torch.zeros((), requires_grad=True)
    units = ace.Exact(measure=measure).units([(zero, torch.tensor(0.0), 0), (torch.tensor(4.0), torch.tensor(0.0), 4)])
    assert units.isfinite().all()
    (gradient,) = torch.autograd.grad(units[0], zero)
    assert gradient.isfinite()
