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
        self._forget()

    @property
    def _gammas(self) -> list[nn.Parameter]:
        gammas: list[nn.Parameter] = self.param_groups[0]["params"]
        return gammas

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept from step to step but follows from the state."""
        self._scale: Tensor | None = None
        self._found: list[bool] = []
        self._row: Tensor | None = None

    def _average(self, name: str) -> Tensor:
        state = self.state[self._gammas[0]]
        average: Tensor = state[name] / (1 - self.param_groups[0]["decay"] ** state["step"].clamp_min(1.0))
        return average

    @property
    def scale(self) -> Tensor:
        """Running root mean square s_i of ∂J/∂γ_i, shape (layers,)."""
        if self._scale is None:
            self._scale = self._average("square").sqrt().clamp_min(_SMALLEST)
        return self._scale

    @property
    def mean(self) -> Tensor:
        """Running mean of ∂J/∂γ_i, shape (layers,)."""
        return self._average("mean")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; ``set_to_none`` is what happens in any case."""
        del set_to_none
        for gamma in self._gammas:
            gamma.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every γ; ``closure`` is not supported."""
        if closure is not None:
            raise NotImplementedError("a closure would evaluate the loss again; call backward before step()")
        group, gammas = self.param_groups[0], self._gammas
        state: dict[str, Any] = self.state[gammas[0]]
        gradient = self._gradient()
        before = self.scale
        state["step"].add_(self._reached)
        state["mean"].lerp_(gradient, self._weight)
        state["square"].lerp_(gradient.square(), self._weight)
        self._scale = None
        scale = self.scale
        if self.carry:
            self.multiplier.mul_(scale / before)
        rate = group["lr"] / scale
        limit = self.clip * scale
        moved = torch.cat(tuple(gammas)) - rate * gradient.clamp(-limit, limit)
        threshold = rate * self.multiplier
        if isinstance(self.units, Tensor):
            threshold = threshold * self.units
        self._write(moved.sign() * (moved.abs() - threshold).clamp(0.0, self.cap))

    def _gradient(self) -> Tensor:
        """Return ∂J/∂γ_i, 0 where there is none: a retired term keeps its averages and λ."""
        gradients = [gamma.grad for gamma in self._gammas]
        found = [gradient is not None for gradient in gradients]
        if found != self._found:
            first = self._gammas[0]
            self._found, self._reached = found, torch.tensor(found, dtype=first.dtype, device=first.device)
            self._weight = (1 - self.param_groups[0]["decay"]) * self._reached
            self._nothing = first.new_zeros(1)
        return torch.cat([self._nothing if gradient is None else gradient for gradient in gradients])

    def _write(self, values: Tensor) -> None:
        """Set every γ."""
        if self._row is None or self._row.device != values.device:
            self._row = values.clone()  # to cut a row anew in each step would cost as much as to write it
            self._pieces = list(self._row.split(1))
        else:
            self._row.copy_(values)
        torch._foreach_copy_(list(self._gammas), self._pieces)
