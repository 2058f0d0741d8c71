r"""What a relaxation term is worth: by how much the loss rises when it is taken out.

.. math::

    \sigma_i = \frac{J|_{\gamma_i = 0} - J}{|J|}

on a batch, the saliency of LeCun, Denker and Solla (Optimal Brain Damage, 1990), measured where they estimate it from
curvatures. :math:`\partial J/\partial\gamma_i` does not tell: (γ, W) and (cγ, W/c) are the same function, so once the
weights W of a term have found their best, that gradient is noise around 0 however much the term is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace.distributed import total, world_size
from ace.relaxation import Relaxation

PROBES = 40
"""How often each term is measured in the planned steps."""
SPACING = 5
"""Least number of steps from one measurement to the next, for each forward pass that it takes."""
ENOUGH = 3
"""Measurements before a term is let go: the first are those of a model that has learnt nothing yet."""


class Saliency:
    r"""The running mean of the saliency of each term; it names those worth less than a threshold.

    Args:
        relaxations: The terms, in layer order.
        threshold: Share of the loss.
        steps: Planned number of updates.

    Attributes:
        mean: Running mean of σ_i, each measurement with weight 1/2, shape (layers,); infinite before
            the first, and unchanged by a loss that is not finite, or 0.
        interval: Updates from one measurement to the next.

    Example:
        >>> import ace
        >>> model = ace.relax(nn.Linear(2, 2, bias=False), layers=nn.Linear, example=torch.randn(5, 2))
        >>> for parameter in model.parameters():
        ...     _ = nn.init.ones_(parameter)
        >>> saliency = Saliency([model.relaxation], threshold=0.01, steps=100)
        >>> saliency.measure(model, lambda: (model(torch.ones(1, 2)) - 1).square().mean())  # 16, without it 1
        tensor([False])
        >>> saliency.mean
        tensor([-0.9375], dtype=torch.float64)
    """

    def __init__(self, relaxations: Sequence[Relaxation], threshold: float, steps: int) -> None:
        self.relaxations = relaxations
        self.threshold = threshold
        self.interval = max(steps // PROBES, SPACING * (len(relaxations) + 1))
        self.mean = torch.full((len(relaxations),), math.inf, dtype=torch.float64)
        self.count = 0

    def due(self, step: int) -> bool:
        """Whether the terms are to be measured before this update, counted from 0."""
        return self.threshold > 0 and step > 0 and step % self.interval == 0

    def measure(self, model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
        """Measure the terms that are in use, and name those that can go.

        Terms can do part of the same work, so that each is worth nothing as long as the other is there: those below
        the threshold are taken out together, and if that costs more than the threshold only the least of them can go.

        Args:
            model: The relaxed model; its buffers and torch's random numbers are left as they were.
            loss: Evaluates the loss on the batch.

        Returns:
            Whether a term can go, shape (layers,). The same on each of several processes.
        """
        living = [index for index, relaxation in enumerate(self.relaxations) if not relaxation.retired]
        can_go = torch.zeros(len(self.relaxations), dtype=torch.bool)
        with _unnoticed(model):
            base, *without = self._losses(model, loss, [[], *([index] for index in living)])
            for index, value in zip(living, without, strict=True):
                found = (value - base) / abs(base) if base else math.nan
                if math.isfinite(found):
                    before = self.mean[index].item()
                    self.mean[index] = (found + before) / 2 if math.isfinite(before) else found
            self.count += 1
            if self.count < ENOUGH:
                return can_go
            least = [index for index in living if self.mean[index] < self.threshold]
            if len(least) > 1:
                (together,) = self._losses(model, loss, [least])
                if not together - base < self.threshold * abs(base):
                    least = [min(least, key=lambda index: float(self.mean[index]))]
        can_go[least] = True
        return can_go

    def state_dict(self) -> dict[str, Any]:
        """Return the means and the number of measurements."""
        return {"mean": self.mean.clone(), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.mean, self.count = state["mean"].clone().cpu(), state["count"]

    def _losses(self, model: nn.Module, loss: Callable[[], Tensor], sets: Sequence[Sequence[int]]) -> list[float]:
        """Return the mean over the processes of the loss without each set of terms, with the same random numbers."""
        devices = {p.device.index for p in model.parameters() if p.is_cuda}
        values = []
        for terms in sets:
            with _without([self.relaxations[index] for index in terms]), torch.random.fork_rng(devices):
                value = loss().detach()
                # a copy: a graph that is replayed writes to the same place
                values.append(value.to(torch.promote_types(value.dtype, torch.float32), copy=True))
        return (total(torch.stack(values)) / world_size()).tolist()


@contextmanager
def _without(relaxations: Sequence[Relaxation]) -> Iterator[None]:
    """Let the γ of these terms be 0."""
    before = [relaxation.gamma.detach().clone() for relaxation in relaxations]
    with torch.no_grad():
        for relaxation in relaxations:
            relaxation.gamma.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for relaxation, gamma in zip(relaxations, before, strict=True):
                relaxation.gamma.copy_(gamma)


@contextmanager
def _unnoticed(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes do to the buffers of a model, such as the statistics of BatchNorm."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
