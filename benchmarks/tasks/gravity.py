"""A hundred masses under gravity: where will they be a thousand time steps from now?

The gravitational system of Brandstetter et al. (SEGNN, ICLR 2022).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ace.errors import ConfigError
from ace.groups import E3
from benchmarks.data import cache_folder, load_arrays, save_arrays
from benchmarks.tasks.base import Batch, Dynamics, Samples

TIME_STEP = 0.001
SOFTENING = 0.1
INPUT_STEP, TARGET_STEP = 3000, 4000  # frames 30 and 40 of a recording every 100 steps from step 0 on
BLOCK = 8  # systems advanced together: their pairs stay in the cache of a core


def initial_state(count: int, particles: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw initial states: normal positions, normal velocities less their mean.

    Args:
        count: Number of systems S.
        particles: Number of particles n of each.
        generator: Source of randomness.

    Returns:
        Positions and velocities, shape (S, n, 3), float64.

    Example:
        >>> x, v = initial_state(2, 4, np.random.default_rng(0))
        >>> bool(np.allclose(v.mean(1), 0))
        True
    """
    positions = generator.standard_normal((count, particles, 3))
    velocities = generator.standard_normal((count, particles, 3))
    return positions, velocities - velocities.mean(1, keepdims=True)


def simulate(positions: np.ndarray, velocities: np.ndarray, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    r"""Integrate unit masses by leapfrog (half kick, drift, half kick) with dt = 0.001 and G = 1.

    .. math:: a_i = \sum_j \frac{x_j - x_i}{(|x_j - x_i|^2 + 0.1^2)^{3/2}}

    The softening length 0.1 bounds all forces, so nothing is clipped and the system is symmetric under E(3).

    Args:
        positions: Initial positions, shape (S, n, 3).
        velocities: Initial velocities, shape (S, n, 3).
        steps: Numbers of time steps, ascending, after which the state is wanted.

    Returns:
        Positions and velocities after these steps, shape (len(steps), S, n, 3), float64.

    Example:
        >>> apart = np.array([[[0.0, 0, 0], [1.0, 0, 0]]])
        >>> x, v = simulate(apart, np.zeros((1, 2, 3)), [1])  # masses attract
        >>> v[0, 0, :, 0].round(6).tolist()
        [0.000985, -0.000985]
    """
    saved = np.empty((2, len(steps), *positions.shape))
    for start in range(0, len(positions), BLOCK):
        block = slice(start, start + BLOCK)
        x, v = positions[block].copy(), velocities[block].copy()
        acceleration = accelerations(x)
        for frame, (begin, end) in enumerate(zip((0, *steps), steps, strict=False)):
            for _ in range(begin, end):
                v += acceleration * (TIME_STEP / 2)
                x += v * TIME_STEP
                acceleration = accelerations(x)
                v += acceleration * (TIME_STEP / 2)
            saved[:, frame, block] = x, v
    return saved[0], saved[1]


def accelerations(x: np.ndarray) -> np.ndarray:
    """Softened attraction of unit masses at positions (S, n, 3); shape (S, n, 3)."""
    squares = (x * x).sum(-1)
    distance2 = squares[:, :, None] + squares[:, None, :] - 2 * (x @ x.transpose(0, 2, 1)) + SOFTENING**2
    weight = 1 / (distance2 * np.sqrt(distance2))
    return weight @ x - weight.sum(-1, keepdims=True) * x


class Gravity(Dynamics):
    """Positions of unit masses under their gravity a thousand time steps after the input frame.

    Inputs are positions and velocities at step 3000, h = |v| and, on the edges from the six nearest particles to each,
    the product of the masses, which is 1; the target are the positions at step 4000. Metric ``mse``: mean squared
    error per coordinate. For scale: no motion has 1.54, x + v t has 15.0.

    The data are generated once and kept in the cache folder, checksum beside them: about 0.2 seconds for each sample
    of 100 particles.

    The published sizes are 10,000 / 2,000 / 2,000, from a generator that draws system by system; this one draws all
    of a split at once, so statistics agree with the published data and samples do not.

    Args:
        train: Number of training samples.
        valid: Number of validation samples.
        test: Number of test samples.
        particles: Particles of each sample.
        neighbours: Nearest particles that each particle has edges from.
        seed: Seed of the data. A split does not depend on the sizes of the others.

    Raises:
        ConfigError: A size below 1, or not enough particles for the neighbours.
        DataError: The cached file is damaged.
    """

    def __init__(
        self,
        train: int = 500,
        valid: int = 100,
        test: int = 100,
        particles: int = 100,
        neighbours: int = 6,
        seed: int = 0,
    ) -> None:
        sizes = {"train": train, "valid": valid, "test": test}
        wrong = [f"{name}={size}: needs at least one sample" for name, size in sizes.items() if size < 1]
        if not 0 < neighbours < particles:
            wrong.append(f"neighbours={neighbours}: must be between 1 and {particles - 1}, one less than the particles")
        if wrong:
            raise ConfigError("gravity task: " + "; ".join(wrong))
        self.name = "nbody-gravity"
        self.group = E3()
        arrays = _cached_arrays(sizes, particles, seed)
        splits = {split: _samples(arrays, split, neighbours) for split in sizes}
        self.neighbours = {split: nearest(samples.pos, neighbours) for split, samples in splits.items()}
        super().__init__(self.neighbours["train"][0], splits)

    def collate(self, split: str, chosen: Tensor) -> Batch:
        """Join samples, each with edges of its own."""
        batch = super().collate(split, chosen)
        nodes = self.splits[split].pos.shape[1]
        edges = self.neighbours[split][chosen] + nodes * torch.arange(len(chosen))[:, None, None]
        return Batch({**batch.inputs, "edge_index": edges.transpose(0, 1).flatten(1)}, batch.target)


def nearest(pos: Tensor, neighbours: int) -> Tensor:
    """Edges to each particle from those nearest to it.

    Args:
        pos: Positions, shape (S, n, 3).
        neighbours: How many.

    Returns:
        Source and target of each edge, shape (S, 2, n * neighbours).

    Example:
        >>> nearest(torch.tensor([[[0.0, 0, 0], [1.0, 0, 0], [3.0, 0, 0]]]), 1)[0].T.tolist()
        [[1, 0], [0, 1], [1, 2]]
    """
    count, particles, _ = pos.shape
    found = []
    for sample in pos:  # one at a time: all pairs of all samples would not fit
        distances = torch.cdist(sample, sample, compute_mode="donot_use_mm_for_euclid_dist")
        distances.fill_diagonal_(torch.inf)
        found.append(distances.topk(neighbours, largest=False).indices.flatten())
    targets = torch.arange(particles).repeat_interleave(neighbours).expand(count, -1)
    return torch.stack((torch.stack(found), targets), 1)


def _cached_arrays(sizes: dict[str, int], particles: int, seed: int) -> dict[str, np.ndarray]:
    """Input and target frames of all splits, from the cache or else generated into it."""
    options: dict[str, Any] = {"version": 1, "sizes": sizes, "particles": particles, "seed": seed}
    digest = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    path = cache_folder() / "nbody" / f"gravity-{digest}.npz"
    if not path.exists():
        arrays = {}
        for number, (split, size) in enumerate(sizes.items()):
            state = initial_state(size, particles, np.random.default_rng([seed, number]))
            x, v = simulate(*state, (INPUT_STEP, TARGET_STEP))
            frames = {"pos": x[0], "vel": v[0], "target": x[1]}
            arrays |= {f"{split}_{key}": value.astype(np.float32) for key, value in frames.items()}
        save_arrays(path, arrays)
    return load_arrays(path)


def _samples(arrays: dict[str, np.ndarray], split: str, neighbours: int) -> Samples:
    pos, vel, target = (torch.from_numpy(arrays[f"{split}_{key}"]) for key in ("pos", "vel", "target"))
    masses = pos.new_ones(len(pos), pos.shape[1] * neighbours, 1)
    return Samples(pos, vel, vel.norm(dim=-1, keepdim=True), masses, target)
