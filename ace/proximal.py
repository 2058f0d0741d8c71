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
        averages = first.detach().new_zeros(3, len(gammas))
        averages[2] = _SMALLEST  # the weight of all gradients so far; positive, so that one can divide by it
        self.state[first] = {"averages": averages}
        self._forget()
        self._join()  # before a compiled graph or a CUDA graph has seen where γ lies

    @property
    def _gammas(self) -> list[Tensor]:
        gammas: list[Tensor] = self.param_groups[0]["params"]
        return gammas

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Drop what is kept from step to step but follows from the state."""
        self._scale: Tensor | None = None
        self._found: list[bool] = []
        self._places: list[int] = []
        self._pieces: list[Tensor] = []
        # of ∂J/∂γ_i, of its square and of 1, shape (3, layers); all began at 0
        self._averages: Tensor = self.state[self._gammas[0]]["averages"]
        self._mean, self._mean_square, self._weight_so_far = self._averages

    @property
    def scale(self) -> Tensor:
        """Running root mean square s_i of ∂J/∂γ_i, shape (layers,)."""
        if self._scale is None:
            self._scale = torch.div(self._mean_square, self._weight_so_far).sqrt_().clamp_min_(_SMALLEST)
        return self._scale

    @property
    def mean(self) -> Tensor:
        """Running mean of ∂J/∂γ_i, shape (layers,)."""
        return torch.div(self._mean, self._weight_so_far)

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
        self.descend()

    def descend(self) -> Tensor:
        """Do what ``step`` does, for who has switched gradients off already; return the new γ, shape (layers,).

        Hooks of the step are passed by: torch takes longer to see that there are none than the arithmetic takes.
        """
        lr, gammas = self.param_groups[0]["lr"], self._gammas
        gradient = self._gradient()
        before = self.scale
        torch.mul(gradient, gradient, out=self._square)
        self._averages.lerp_(self._now, self._weight)
        self._scale = None
        scale = self.scale
        if self.carry:
            self.multiplier.mul_(scale / before)
        if self._pieces:
            torch.cat(gammas, out=self._row)
        elif [gamma.data_ptr() for gamma in gammas] != self._places:
            self._join()
        moved = torch.sub(self._row, (gradient / scale).clamp_(-self.clip, self.clip), alpha=lr)
        threshold = (self.multiplier / scale).mul_(lr)
        if isinstance(self.units, Tensor):
            threshold *= self.units
        # what is left of x once the part within the threshold is taken off
        torch.sub(moved, moved.clamp(-threshold, threshold), out=self._row).clamp_(-self.cap, self.cap)
        if self._pieces:
            torch._foreach_copy_(gammas, self._pieces)
        else:
            torch.autograd.graph.increment_version(gammas)  # a graph that is still to use the old ones must know
        return self._row

    def _join(self) -> None:
        """Let every γ lie in the memory of one vector: to write a thousand of them apart costs more than all the rest.

        To be done again where they were moved to another place or given other data. Each keeps a storage of its own,
        so that it is saved as any parameter is. Of several dtypes, shared with other processes or on a GPU, where one
        kernel writes them all, they stay where they are.
        """
        gammas = self._gammas
        self._row = torch.cat([gamma.detach() for gamma in gammas])
        if any(gamma.dtype != self._row.dtype or gamma.is_shared() for gamma in gammas):
            self._pieces = list(self._row.split(1))  # cut anew in each step, it would cost as much as to write it
            return
        size, dtype = self._row.element_size(), self._row.dtype
        memory = bytearray(size * len(gammas))
        self._row = torch.frombuffer(memory, dtype=dtype).copy_(self._row)
        for index, gamma in enumerate(gammas):
            gamma.data = torch.frombuffer(memory, dtype=dtype, count=1, offset=index * size)
        self._places = [gamma.data_ptr() for gamma in gammas]

    def _gradient(self) -> Tensor:
        """Return ∂J/∂γ_i, 0 where there is none: a retired term keeps its averages and λ."""
        gradients = [gamma.grad for gamma in self._gammas]
        found = [gradient is not None for gradient in gradients]
        if found != self._found:
            self._allocate(found)
        some = [self._nothing if gradient is None else gradient for gradient in gradients]
        return torch.cat(some, out=self._first)

    def _allocate(self, found: list[bool]) -> None:
        """Make what each step writes to: cut anew in each of them, it would cost as much as to write it."""
        first = self._gammas[0].detach()
        reached = torch.tensor(found, dtype=first.dtype, device=first.device)
        self._found, self._nothing = found, first.new_zeros(1)
        self._weight = (1 - self.param_groups[0]["decay"]) * reached
        self._now = torch.stack((reached, reached, reached))
        self._first, self._square, _ = self._now
