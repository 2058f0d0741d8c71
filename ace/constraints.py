r"""What is asked of the relaxation of each layer, or of the model, as one vector of constraints.

A constraint on the layers turns them into a size :math:`m_i = |\gamma_i| r_i` and a violation of shape
(layers,). What :math:`r_i` is, its ``measure`` says:

- ``"strength"``: :math:`r_i = 1`, so the constraint is on :math:`|\gamma_i|`; needs no batch.
- ``"norm"``: root mean square of f_neq on the batch, so the constraint is on the size of γ·f_neq.
- ``"relative"``: ‖f_neq‖/‖f_eq‖ on the batch, so the constraint is on ‖γ f_neq‖/‖f_eq‖.
- ``"spectral"``: the operator norm of f_neq, a linear map of the features of a row (of a patch, where f_neq is a
  convolution), so the constraint is on the most that γ·f_neq can change for a change of size 1. Needs no batch.

``EquivarianceError`` constrains the model as a whole, with a violation of shape (groups,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ace.errors import AceError
from ace.groups import Group

Measure = Literal["strength", "norm", "relative", "spectral"]


@dataclass(frozen=True)
class Constraint:
    """Base of all constraints."""


@dataclass(frozen=True)
class LayerConstraint(Constraint):
    """Base of the constraints on the relaxation of each layer.

    Attributes:
        measure: What is constrained, see the module's text.
    """

    measure: Measure = field(default="strength", kw_only=True)

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise AceError(f"measure={self.measure!r}: choose one of {', '.join(map(repr, get_args(Measure)))}")

    @property
    def deterministic(self) -> bool:
        """Whether the violation depends on the parameters only, not on the batch."""
        return self.measure in ("strength", "spectral")

    def units(self, sizes: list[tuple[Tensor, Tensor, int]]) -> Tensor:
        """Return r_i, shape (layers,), from the measured ‖f_neq‖², ‖f_eq‖² and numbers of entries.

        Kept within [1e-6, 1e6]: a retired term has no size, and beside a layer that returns zeros any term is
        infinitely large.
        """
        neq = torch.stack([n for n, _, _ in sizes])
        if self.measure == "norm":
            scale = neq.new_tensor([max(count, 1) for *_, count in sizes])
        else:
            scale = torch.stack([e for _, e, _ in sizes])
        return (neq / scale.clamp_min(torch.finfo(scale.dtype).tiny)).clamp(1e-12, 1e12).sqrt()


@dataclass(frozen=True)
class Exact(LayerConstraint):
    r"""The relaxation vanishes: :math:`\gamma_i = 0` for every layer (Algorithm 1 of the ACE paper).

    Args:
        measure: Any measure has the same solutions; it sets the units of the multipliers.

    Example:
        >>> Exact().deterministic
        True
    """


@dataclass(frozen=True)
class Bounded(LayerConstraint):
    r"""The relaxation stays within a tolerance: :math:`|\gamma_i| r_i \le \varepsilon`.

    A bound on the layers is no bound on the model, and (γ, W) and (cγ, W/c) are the same function: use
    ``measure="relative"`` or ``relax(normalize=True)``, and measure the equivariance error of the model.

    Args:
        eps: The tolerance ε, in the units of the measure.
        measure: What is bounded.

    Raises:
        AceError: If eps is not positive.

    Example:
        >>> Bounded(0.05, measure="relative").eps
        0.05
    """

    eps: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise AceError(f"Bounded(eps={self.eps}): a tolerance must be positive; use Exact() for 0")


@dataclass(frozen=True)
class Resilient(LayerConstraint):
    r"""The relaxation is paid for: :math:`|\gamma_i| r_i \le u_i` at the price :math:`\tfrac{\rho}{2}\|u\|^2`.

    Algorithm 2 of the ACE paper. At the solution :math:`u_i = |\gamma_i| r_i = \lambda_i/\rho`: the problem is
    ridge regression on the relaxation, and λ_i/ρ is the asymmetry that the data ask of layer i.

    Args:
        rho: The price ρ, in units of the loss.
        measure: What is paid for.

    Raises:
        AceError: If rho is not positive.

    Example:
        >>> Resilient(rho=1.0)
        Resilient(measure='strength', rho=1.0)
    """

    rho: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rho > 0:
            raise AceError(f"Resilient(rho={self.rho}): the price of relaxation must be positive")


@dataclass(frozen=True)
class EquivarianceError(Constraint):
    r"""The relative equivariance error of the whole model: within a tolerance, or paid for; one group or several.

    .. math:: r_G = \sqrt{\frac{\sum_s \lVert f(g_s x_s) - g_s f(x_s) \rVert^2}{\sum_s \lVert f(x_s) \rVert^2}}
        \;\le\; \varepsilon

    with a random element :math:`g_s` of G for each sample s of the batch, drawn anew in each step. It costs a second
    forward and backward pass for each group. A mean square hides outliers: with ``quantile=0.95`` it is the 95th
    percentile of the samples' errors that stays within ε.

    With a price ρ instead of a tolerance, :math:`r_G \le u_G` at the price :math:`\tfrac{\rho}{2}\|u\|^2`, as
    ``Resilient`` has it for the layers, but in units of the running root mean square of the loss, so that ρ needs no
    knowledge of it. At the solution :math:`u_G = r_G`: with ρ = 1 an error of 0.1 costs 0.5 % of the loss.

    The model is called as in the loss, on inputs whose types go by name, as in ``ace.equivariance_error``. Graphs of a
    batch are told apart by an integer input named ``batch``, dense inputs by their first axis.

    Args:
        group: A group, or several by name; each gets its own multiplier.
        eps: The tolerance ε: one number, or one for each group by name; ``math.inf`` sets a group free.
        rho: The price ρ, in place of a tolerance.
        inputs: Types of the model's inputs, where their names do not tell.
        outputs: Types of its outputs, where that is ambiguous.
        quantile: Constrain this quantile of the samples' errors instead of the root mean square.
        share: Share of the samples of a batch that is used.
        margin: Training aims at (1 - margin) ε, so that the error on new data stays below ε as well.
        seed: Seed of the elements.

    Raises:
        AceError: Neither a tolerance nor a price, or both; a tolerance, price, quantile, share or margin out of its
            range; or tolerances for other groups.

    Example:
        >>> from ace.groups import SO2, SO3, Tilts
        >>> EquivarianceError(SO3(), 0.02).tolerances
        {'SO(3)': 0.02}
        >>> parts = {"vertical": SO2(), "tilts": Tilts()}
        >>> EquivarianceError(parts, {"vertical": 0.01, "tilts": float("inf")}).tolerances
        {'vertical': 0.01}
        >>> list(EquivarianceError(SO3(), rho=1.0).groups)
        ['SO(3)']
    """

    group: Group | Mapping[str, Group]
    eps: float | Mapping[str, float] | None = None
    rho: float | None = field(default=None, kw_only=True)
    inputs: Mapping[int | str, str] | None = field(default=None, kw_only=True)
    outputs: Any = field(default=None, kw_only=True)
    quantile: float | None = field(default=None, kw_only=True)
    share: float = field(default=1.0, kw_only=True)
    margin: float = field(default=0.1, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        problems = []
        named = self._named()
        if (self.eps is None) == (self.rho is None):
            problems.append("give either a tolerance eps or a price rho")
        if self.rho is not None and not self.rho > 0:
            problems.append(f"rho={self.rho}: a price must be positive")
        if isinstance(self.eps, Mapping) and set(self.eps) != set(named):
            problems.append(f"eps names {sorted(self.eps)}, the groups are {sorted(named)}")
        elif self.eps is not None:
            asked = self.eps.values() if isinstance(self.eps, Mapping) else [self.eps]
            problems += [f"a tolerance must be positive, not {eps}" for eps in asked if not eps > 0]
            if not self.tolerances:
                problems.append("no group has a finite tolerance: leave the constraint out")
        if self.quantile is not None and not 0 < self.quantile <= 1:
            problems.append(f"quantile={self.quantile}: above 0, at most 1")
        if not 0 < self.share <= 1:
            problems.append(f"share={self.share}: above 0, at most 1")
        if not 0 <= self.margin < 1:
            problems.append(f"margin={self.margin}: at least 0, below 1")
        if problems:
            raise AceError("EquivarianceError: " + "; ".join(problems))

    def _named(self) -> dict[str, Group]:
        return dict(self.group) if isinstance(self.group, Mapping) else {str(self.group): self.group}

    @property
    def tolerances(self) -> dict[str, float]:
        """The finite tolerances by the name of their group; none where the error is paid for."""
        if self.eps is None:
            return {}
        every = self.eps if isinstance(self.eps, Mapping) else dict.fromkeys(self._named(), self.eps)
        return {name: every[name] for name in self._named() if every[name] != math.inf}

    @property
    def groups(self) -> dict[str, Group]:
        """The groups that have a finite tolerance or a price, by name."""
        named = self._named()
        return named if self.eps is None else {name: named[name] for name in self.tolerances}
