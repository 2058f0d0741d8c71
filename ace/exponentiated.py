r"""Dual ascent that multiplies: exponentiated gradient steps on multipliers that stay positive.

.. math:: \lambda \leftarrow \lambda \, e^{\eta v}

With :math:`v = \log(r/\varepsilon)` and the price :math:`\lambda r^2/\varepsilon^2` in the Lagrangian, the solution r
is inversely proportional to λ wherever the loss falls about linearly with r. Then the distance of log λ from its
solution shrinks by the factor 1 - η a step, whatever the units of the loss and however small ε: there is no rate to
set and nothing to wind up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ExponentiatedGradient(torch.optim.Optimizer):
    """Exponentiated gradient ascent.

    Args:
        parameters: Positive parameters.
        lr: Rate η.

    Example:
        >>> multiplier = nn.Parameter(torch.ones(1))
        >>> optimizer = ExponentiatedGradient([multiplier], lr=0.5)
        >>> multiplier.grad = torch.tensor([2.0])
        >>> optimizer.step()
        >>> round(multiplier.item(), 4)
        2.7183
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "maximize": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter; ``closure`` is not supported."""
        if closure is not None:
            raise NotImplementedError("a closure would evaluate the loss again; call backward before step()")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient: Tensor = parameter.grad
                    parameter.mul_((group["lr"] * gradient).exp())
