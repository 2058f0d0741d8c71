"""Synthetic data whose symmetry is broken by a known amount, at a known depth, along a known axis."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ace.errors import ConfigError
from ace.groups import O3
from benchmarks.models.vector import VectorNet
from benchmarks.tasks.base import Samples, Task

VECTORS = 4
LAYERS = 3
DIRECTION = torch.tensor([0.0, 0.0, 1.0])


class Broken(Task):
    r"""Lists of normally distributed vectors, mapped by a random vector network that has a preferred direction.

    After layer k the teacher adds :math:`s\,a_c\,\hat z` to channel c, with a random amplitude :math:`a_c` of unit
    variance. With s = 0 the data have the symmetry O(3) of the model; otherwise that of rotations about z and of
    mirrors that contain z. The amplitude is in the reach of a term beside layer k, and what it becomes further on in
    the reach of the terms there.

    Args:
        strength: Strength s of the break.
        layer: Depth k at which it happens, from 0.
        noise: Standard deviation of the noise on the targets.
        train: Number of training samples.
        valid: Number of validation samples.
        test: Number of test samples.
        seed: Seed of teacher and data.

    Raises:
        ConfigError: A size below 1, a negative strength or noise, or a layer that does not exist.
    """

    input_types: ClassVar[dict[str, str]] = {**Task.input_types, "pos": "vector"}
    output_type: ClassVar[str] = "vector"

    def __init__(
        self,
        strength: float = 0.3,
        layer: int = 0,
        noise: float = 0.05,
        train: int = 4000,
        valid: int = 2000,
        test: int = 2000,
        seed: int = 0,
    ) -> None:
        sizes = {"train": train, "valid": valid, "test": test}
        wrong = [f"{name}={size}: needs at least one sample" for name, size in sizes.items() if size < 1]
        wrong += [f"{name}={x}: is at least 0" for name, x in (("strength", strength), ("noise", noise)) if x < 0]
        if layer not in range(LAYERS):
            wrong.append(f"layer={layer}: is one of {list(range(LAYERS))}")
        if wrong:
            raise ConfigError("broken task: " + "; ".join(wrong))
        self.name = "broken"
        self.group = O3()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.teacher = VectorNet(0, 0, vectors=VECTORS, layers=LAYERS)
            amplitude = torch.randn(self.teacher.layers[0].channels_out, 1)
            self.offset = strength * amplitude * DIRECTION
            self.layer = layer
            splits = {}
            for name, size in sizes.items():
                x = torch.randn(size, VECTORS, 3)
                y = self.clean(x)
                splits[name] = _samples(x, y + noise * torch.randn_like(y))
        super().__init__(torch.empty(2, 0, dtype=torch.long), splits)

    @torch.no_grad()
    def clean(self, x: Tensor) -> Tensor:
        """Return the targets without noise for inputs of shape (S, vectors, 3)."""
        for depth, layer in enumerate(self.teacher.layers):
            x = layer(x)
            if depth == self.layer:
                x = x + self.offset
        result: Tensor = self.teacher.readout(x)
        return result


def _samples(x: Tensor, y: Tensor) -> Samples:
    return Samples(x, torch.zeros_like(x), x.new_zeros(*x.shape[:2], 0), x.new_zeros(len(x), 0, 0), y)
