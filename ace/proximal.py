r"""The primal step on γ in the proximal form: gradient step, then soft threshold by the multiplier.

With g_i = ∂J/∂γ_i, s_i its running root mean square, T planned steps and κ_γ = 50,

.. math::

    \gamma_i \leftarrow \mathrm{soft}\!\left(\gamma_i - \frac{\kappa_\gamma}{T}\,
    \mathrm{clip}\Big(\frac{g_i}{s_i}, -1, 1\Big),\; \frac{\kappa_\gamma}{T}\frac{\lambda_i r_i}{s_i}\right),\qquad
    \mathrm{soft}(x, w) = \mathrm{sign}(x)\,\min\big([\,|x| - w\,]_+, 1\big) ,

the proximal step of the exact penalty λ_i r_i |γ_i|: a finite λ_i gives γ_i = 0 exactly. Dividing by s_i makes the
path independent of the units of the loss, and the clip keeps one bad batch from moving γ far. |γ| stays below 1, its
value at the start: (γ, W) and (cγ, W/c) are the same function, so a larger γ would buy nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1e-30  # keeps s_i positive for a term that no gradient reaches


class ProximalGradient(torch.optim.Optimizer):
    """Proximal gradient descent on the γ of all layers.

    Args:
        gammas: The γ of each layer, parameters of shape (1,).
        multiplier: The multipliers λ, shape (layers,).
        lr: κ_γ/T.
        decay: Decay of the running averages of the gradient and of its square.
        carry: Whether λ_i is carried along when the unit s_i of the gradient changes, so that λ_i/s_i stays what dual
            ascent made it. The gradients of a loss fall by orders of magnitude in training; a multiplier in the
            units of its first steps would only reflect those.

    Attributes:
        clip: Largest gradient that acts on γ_i, in units of s_i.
        cap: Largest size of γ_i.

    Example:
        >>> gamma = nn.Parameter(torch.ones(1))
        >>> optimizer = ProximalGradient([gamma], torch.full((1,), 2.0), lr=0.1)
        >>> (0.5 * gamma).sum().backward()
        >>> optimizer.step()
        >>> round(gamma.item(), 4)  # 1 - 0.1 (the gradient in units of its size), threshold 0.1 * 2 / 0.5
        0.5
    """

    clip = 1.0
    cap = 1.0

    def __init__(
        self, gammas: Sequence[nn.Parameter], multiplier: Tensor, lr: float, decay: float = 0.99, carry: bool = False
    ) -> None:
        super().__init__(list(gammas), {"lr": lr, "decay": decay})
        self.multiplier = multiplier
        self.carry = carry
        self.units: Tensor | float = 1.0
        first = self._gammas[0]
        size = torch.zeros(len(gammas), dtype=first.dtype, device=first.device)
        self.state[first] = {"step": size, "mean": size.clone(), "square": size.clone()}

    @property
    def _gammas(self) -> list[nn.Parameter]:
        gammas: list[nn.Parameter] = self.param_groups[0]["params"]
        return gammas

    def _average(self, name: str) -> Tensor:
        state = self.state[self._gammas[0]]
        average: Tensor = state[name] / (1 - self.param_groups[0]["decay"] ** state["step"].clamp_min(1.0))
        return average

    @property
    def scale(self) -> Tensor:
        """Running root mean square s_i of ∂J/∂γ_i, shape (layers,)."""
        return self._average("square").sqrt().clamp_min(_SMALLEST)

    @property
    def mean(self) -> Tensor:
        """Running mean of ∂J/∂γ_i, shape (layers,)."""
        return self._average("mean")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every γ; ``closure`` is not supported."""
        if closure is not None:
            raise NotImplementedError("a closure would evaluate the loss again; call backward before step()")
        group, gammas = self.param_groups[0], self._gammas
        state: dict[str, Any] = self.state[gammas[0]]
        gradient = torch.cat([g.new_zeros(1) if g.grad is None else g.grad for g in gammas])
        reached = gradient.new_tensor([g.grad is not None for g in gammas])  # a retired term keeps its averages and λ
        before = self.scale
        state["step"] += reached
        weight = (1 - group["decay"]) * reached
        state["mean"].lerp_(gradient, weight)
        state["square"].lerp_(gradient.square(), weight)
        scale = self.scale
        if self.carry:
            self.multiplier.mul_(scale / before)
        rate = group["lr"] / scale
        limit = self.clip * scale
        moved = torch.cat(tuple(gammas)) - rate * gradient.clamp(-limit, limit)
        new = moved.sign() * (moved.abs() - rate * self.multiplier * self.units).clamp(0.0, self.cap)
        torch._foreach_copy_(list(gammas), list(new.split(1)))
