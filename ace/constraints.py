r"""What is asked of the relaxation of each layer, as one vector of constraints.

A constraint turns the relaxed layers into a size :math:`m_i = |\gamma_i| r_i` and a violation of shape
(layers,). What :math:`r_i` is, its ``measure`` says:

- ``"strength"``: :math:`r_i = 1`, so the constraint is on :math:`|\gamma_i|`; needs no batch.
- ``"norm"``: root mean square of f_neq on the batch, so the constraint is on the size of γ·f_neq.
- ``"relative"``: ‖f_neq‖/‖f_eq‖ on the batch, so the constraint is on ‖γ f_neq‖/‖f_eq‖.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ace.errors import AceError

Measure = Literal["strength", "norm", "relative"]


@dataclass(frozen=True)
class Constraint:
    """Base of the constraints on the relaxation.

    Attributes:
        measure: What is constrained, see the module's text.
    """

    measure: Measure = field(default="strength", kw_only=True)

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise AceError(f"measure={self.measure!r}: choose one of {', '.join(map(repr, get_args(Measure)))}")

    @property
    def deterministic(self) -> bool:
        """Whether the violation depends on γ only, not on the batch."""
        return self.measure == "strength"

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
class Exact(Constraint):
    r"""The relaxation vanishes: :math:`\gamma_i = 0` for every layer (Algorithm 1 of the ACE paper).

    Args:
        measure: Any measure has the same solutions; it sets the units of the multipliers.

    Example:
        >>> Exact().deterministic
        True
    """


@dataclass(frozen=True)
class Bounded(Constraint):
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
class Resilient(Constraint):
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
