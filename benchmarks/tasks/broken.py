"""Synthetic data whose symmetry is broken by a known amount, at a known depth, in a known way."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ace.errors import ConfigError
from ace.groups import O3, SO2, _frame
from benchmarks.models.vector import VectorAxisNet, VectorNet
from benchmarks.seeds import Use, derived_seed
from benchmarks.tasks.base import Dynamics, Samples

VECTORS = 4
LAYERS = 3
DIRECTION = torch.tensor([0.0, 0.0, 1.0])

Kind = Literal["direction", "mirror", "cube"]


class Broken(Dynamics):
    r"""Lists of normally distributed vectors, mapped by a random vector network whose symmetry is broken.

    After layer k the teacher adds :math:`s\,a_c\,b_c(x)` to channel c, with a random amplitude :math:`a_c` of unit
    variance. With s = 0 the data have the symmetry O(3) of the model. Otherwise the ``kind`` decides:

    - ``"direction"``: :math:`b_c = \hat n`, the axis. Rotations about it and mirrors that contain it are kept.
    - ``"mirror"``: :math:`b_c = x_c \times x_{c-1} / \lVert x_{c-1} \rVert`, an axial vector. Rotations are kept, and
      no reflection.
    - ``"cube"``: :math:`b_{ci} = x_{ci}^3 / \lVert x_c \rVert^2`, component by component. The 48 symmetries of a cube
      with an edge along the axis (and, with the default axis, edges along x, y and z) are kept.

    The amplitude is in the reach of a term beside layer k, and what it becomes further on in the reach of the terms
    there.

    Args:
        strength: Strength s of the break.
        layer: Depth k at which it happens, from 0.
        noise: Standard deviation of the noise on the targets.
        train: Number of training samples.
        valid: Number of validation samples.
        test: Number of test samples.
        seed: Seed of teacher and data.
        kind: What the break keeps, see above.
        axis: Direction n of the axis, any length.
        uneven: Mean of the inputs, along the axis. It breaks no symmetry of the law from inputs to targets; the
            inputs are then not the same from all sides.

    Raises:
        ConfigError: A size below 1, a negative strength or noise, a layer or a kind that does not exist, or an axis
            that is no direction.
    """

    name = "broken"
    input_types: ClassVar[dict[str, str]] = {**Dynamics.input_types, "pos": "vector"}
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
        kind: Kind = "direction",
        axis: tuple[float, float, float] = (0.0, 0.0, 1.0),
        uneven: float = 0.0,
    ) -> None:
        sizes = {"train": train, "valid": valid, "test": test}
        wrong = [f"{name}={size}: needs at least one sample" for name, size in sizes.items() if size < 1]
        wrong += [f"{name}={x}: is at least 0" for name, x in (("strength", strength), ("noise", noise)) if x < 0]
        if layer not in range(LAYERS):
            wrong.append(f"layer={layer}: is one of {list(range(LAYERS))}")
        if kind not in get_args(Kind):
            wrong.append(f"kind={kind!r}: is one of {list(get_args(Kind))}")
        if not 0 < math.hypot(*axis) < math.inf:
            wrong.append(f"axis={axis}: is no direction")
        if wrong:
            raise ConfigError(f"{self.name} task: " + "; ".join(wrong))
        self.group = O3()
        with torch.random.fork_rng(devices=[]):
            # a seed of its own: with that of the data, a model of the same seed would start as the teacher
            torch.manual_seed(derived_seed(seed, Use.TEACHER))
            self.teacher = self.untaught()
            amplitude = torch.randn(self.teacher.layers[0].channels_out, 1)
            self.kind = kind
            self.frame = _frame(axis).float()  # columns, the axis last
            self.amplitude = strength * amplitude
            self.offset = self.amplitude * self.frame[:, 2]
            self.layer = layer
            splits = {}
            for name, size in sizes.items():
                x = torch.randn(size, VECTORS, 3) + uneven * self.frame[:, 2]
                y = self.clean(x)
                splits[name] = _samples(x, self.beside(x), y + noise * torch.randn_like(y))
        super().__init__(torch.empty(2, 0, dtype=torch.long), splits)

    def untaught(self) -> VectorNet:
        """Return a network of the teacher's kind, with random weights."""
        return VectorNet(0, 0, vectors=VECTORS, layers=LAYERS)

    def beside(self, x: Tensor) -> Tensor:
        """Return the input ``vel`` for inputs of shape (S, vectors, 3): nothing."""
        return torch.zeros_like(x)

    @torch.no_grad()
    def clean(self, x: Tensor) -> Tensor:
        """Return the targets without noise for inputs of shape (S, vectors, 3)."""
        x = self.teacher.read(x.flatten(0, 1), self.beside(x).flatten(0, 1))
        for depth, layer in enumerate(self.teacher.layers):
            x = layer(x)
            if depth == self.layer:
                x = x + self.added(x)
        result: Tensor = self.teacher.readout(x)
        return result

    def added(self, x: Tensor) -> Tensor:
        """Return what is added to the hidden vectors x of shape (S, channels, 3)."""
        if self.kind == "direction":
            return self.offset
        if self.kind == "mirror":
            other = x.roll(1, dims=1)
            return self.amplitude * torch.linalg.cross(x, other / other.norm(dim=-1, keepdim=True))
        along = x @ self.frame
        return self.amplitude * (along**3 / along.square().sum(-1, keepdim=True)) @ self.frame.T


class BrokenSO2(Broken):
    r"""The same about an axis, which teacher and model are given; a direction across it breaks their symmetry.

    With s = 0 the data have the symmetry of the model: rotations about the axis, and mirrors that contain it. Otherwise
    the teacher adds :math:`s\,a_c\,\hat n` after layer k, with n across the axis, and the mirror that contains both is
    all that is kept.

    Args:
        strength: Strength s of the break.
        layer: Depth k at which it happens, from 0.
        noise: Standard deviation of the noise on the targets.
        train: Number of training samples.
        valid: Number of validation samples.
        test: Number of test samples.
        seed: Seed of teacher and data.
        axis: Direction of the axis, any length.
        across: Direction n of the break, perpendicular to the axis, any length.

    Raises:
        ConfigError: A size below 1, a negative strength or noise, a layer that does not exist, or directions that are
            none or not perpendicular.
    """

    name = "broken-so2"
    # ``vel`` is the axis. By that name `ace.relax` knows it for a vector and turns it with the others to see what in a
    # layer is one; the group of the task leaves it where it is.
    input_types: ClassVar[dict[str, str]] = {**Broken.input_types, "vel": "invariant"}

    def __init__(
        self,
        strength: float = 0.3,
        layer: int = 0,
        noise: float = 0.05,
        train: int = 4000,
        valid: int = 2000,
        test: int = 2000,
        seed: int = 0,
        axis: tuple[float, float, float] = (0.0, 0.0, 1.0),
        across: tuple[float, float, float] = (1.0, 0.0, 0.0),
    ) -> None:
        lengths = math.hypot(*axis) * math.hypot(*across)
        along = abs(sum(a * b for a, b in zip(axis, across, strict=True)))
        if not 0 < lengths < math.inf or along > 1e-6 * lengths:
            raise ConfigError(f"{self.name} task: axis={axis}, across={across}: are no perpendicular directions")
        self.axis = _frame(axis)[:, 2]  # float64: rounded to float32 it would not be the axis of the group
        super().__init__(strength, layer, noise, train, valid, test, seed, axis=across)
        self.group = SO2(axis)

    def untaught(self) -> VectorNet:  # noqa: D102
        return VectorAxisNet(0, 0, vectors=VECTORS, layers=LAYERS)

    def beside(self, x: Tensor) -> Tensor:
        """Return the input ``vel``: the axis, for each vector of the inputs."""
        return self.axis.expand_as(x)


def _samples(x: Tensor, beside: Tensor, y: Tensor) -> Samples:
    return Samples(x, beside, x.new_zeros(*x.shape[:2], 0), x.new_zeros(len(x), 0, 0), y)
