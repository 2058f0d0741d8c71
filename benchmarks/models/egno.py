"""Equivariant graph neural operator: a trajectory from one frame (Xu et al., ICML 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from benchmarks.models.egnn import EGNNLayer
from benchmarks.models.graphs import centroid


class TemporalConv(nn.Module):
    """Convolution over time, in Fourier space, of features and of (position, velocity) pairs.

    Xu et al. 2024, section 3.2, with F the discrete Fourier transform over the T frames truncated
    to its lowest modes, σ = SiLU and complex weights M (one matrix per mode)::

        h      <- h + σ(F⁻¹ M_h F h)             M_h mixes the feature channels
        (x, v) <- (x, v) + F⁻¹ M_x F (x, v)      M_x, 2 by 2, mixes position with velocity

    The second line is linear and treats the three coordinates alike, so it commutes with rotations
    and reflections; positions are to be relative to the centroid.

    Args:
        hidden: Width of the features.
        steps: Number T of frames.
        modes: Number of Fourier modes kept, at most T // 2 + 1.

    Example:
        >>> conv = TemporalConv(hidden=8, steps=5, modes=2)
        >>> frames = torch.randn(5 * 4, 8), torch.randn(5 * 4, 3), torch.randn(5 * 4, 3)
        >>> [out.shape == value.shape for out, value in zip(conv(*frames), frames)]
        [True, True, True]
    """

    def __init__(self, hidden: int, steps: int, modes: int) -> None:
        super().__init__()
        if not 1 <= modes <= steps // 2 + 1:
            raise ValueError(f"modes is {modes}; {steps} time steps have 1 to {steps // 2 + 1} Fourier modes")
        self.hidden, self.steps, self.modes = hidden, steps, modes
        # Real and imaginary part on the last axis: Module.to(dtype) leaves complex parameters behind.
        self.feature_weight = nn.Parameter(torch.randn(modes, hidden, hidden, 2) / math.sqrt(2 * hidden))
        self.vector_weight = nn.Parameter(torch.randn(modes, 2, 2, 2) * 1e-2)

    def forward(self, h: Tensor, pos: Tensor, vel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the frames.

        Args:
            h: Features, frame after frame, shape (T N, hidden).
            pos: Positions relative to the centroid, shape (T N, 3).
            vel: Velocities, shape (T N, 3).

        Returns:
            The three, updated.
        """
        vectors = torch.stack((pos, vel), 2)  # (T N, 3, 2)
        h = h + silu(self._convolve(h, self.feature_weight))
        pos, vel = (vectors + self._convolve(vectors, self.vector_weight)).unbind(2)
        return h, pos, vel

    def _convolve(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Multiply each mode of (T N, ..., c) by its (c, c) matrix."""
        frames = rows.view(self.steps, -1, rows.shape[-1])
        spectrum = torch.fft.rfft(frames, dim=0)[: self.modes]
        mixed = spectrum @ torch.view_as_complex(weight)
        return torch.fft.irfft(mixed, n=self.steps, dim=0).reshape(rows.shape)


class EGNOLayer(nn.Module):
    """A temporal convolution followed by one EGNN step in each frame.

    The velocity of a frame becomes the displacement of the EGNN step, v <- x_new - x_old.

    Args:
        hidden: Width of the features and of the hidden layers.
        edge_features: Number of edge attributes.
        steps: Number T of frames.
        modes: Number of Fourier modes kept.
    """

    def __init__(self, hidden: int, edge_features: int, steps: int, modes: int) -> None:
        super().__init__()
        self.temporal = TemporalConv(hidden, steps, modes)
        self.spatial = EGNNLayer(hidden, edge_features)

    def forward(
        self, h: Tensor, pos: Tensor, vel: Tensor, edge_index: Tensor, edge_attr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Update the features, positions and velocities of all frames.

        Args:
            h: Features, frame after frame, shape (T N, hidden).
            pos: Positions relative to the centroid, shape (T N, 3).
            vel: Velocities, shape (T N, 3).
            edge_index: Edges within the frames, shape (2, T E).
            edge_attr: Edge attributes, shape (T E, d_e).

        Returns:
            The first three, updated.
        """
        h, pos, vel = self.temporal(h, pos, vel)
        h, moved = self.spatial(h, pos, vel, edge_index, edge_attr)
        return h, moved, moved - pos


class EGNO(nn.Module):
    """Predicts T frames from one, equivariantly to E(3) and to node permutations.

    The input frame is repeated T times, a sinusoidal embedding of the time step is added to the
    features, and layers of temporal convolution and message passing follow. Nothing is normalised
    over the batch, so a prediction does not depend on what else is in the batch.

    Args:
        node_features: Number d_h of invariant node features.
        edge_features: Number d_e of invariant edge attributes.
        steps: Number T of frames predicted.
        hidden: Width of the features and of the hidden layers; even.
        layers: Number of layers.
        modes: Number of Fourier modes kept, at most T // 2 + 1.

    Example:
        >>> model = EGNO(node_features=1, edge_features=1, steps=5, hidden=8, layers=2)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> pos, vel = torch.randn(2, 3), torch.randn(2, 3)
        >>> model(pos, vel, torch.ones(2, 1), edges, torch.ones(2, 1), torch.zeros(2, dtype=torch.long)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        node_features: int,
        edge_features: int,
        steps: int = 5,
        hidden: int = 64,
        layers: int = 4,
        modes: int = 2,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.embed = nn.Linear(node_features, hidden)
        self.embed_time = nn.Linear(hidden, hidden, bias=False)
        self.register_buffer("times", sinusoids(steps, hidden), persistent=False)
        self.layers = nn.ModuleList(EGNOLayer(hidden, edge_features, steps, modes) for _ in range(layers))

    def forward(
        self, pos: Tensor, vel: Tensor, h: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor
    ) -> Tensor:
        """Predict the positions at T times.

        Args:
            pos: Positions, shape (N, 3).
            vel: Velocities, shape (N, 3).
            h: Invariant node features, shape (N, d_h).
            edge_index: Source and target node of each edge, shape (2, E).
            edge_attr: Invariant edge attributes, shape (E, d_e).
            batch: Graph index of each node, ascending from 0, shape (N,).

        Returns:
            Predicted positions, shape (N, T, 3).
        """
        nodes, steps = len(pos), self.steps
        centre = centroid(pos, batch)
        h = (self.embed(h) + self.embed_time(self.times)[:, None]).flatten(0, 1)
        pos, vel = (pos - centre).repeat(steps, 1), vel.repeat(steps, 1)
        offsets = nodes * torch.arange(steps, device=pos.device)
        edge_index = (edge_index[:, None] + offsets[:, None]).flatten(1)
        edge_attr = edge_attr.repeat(steps, 1)
        for layer in self.layers:
            h, pos, vel = layer(h, pos, vel, edge_index, edge_attr)
        return pos.view(steps, nodes, 3).transpose(0, 1) + centre[:, None]


def sinusoids(steps: int, width: int) -> Tensor:
    """Sines and cosines of the step number at geometrically spaced frequencies (Vaswani et al. 2017).

    Args:
        steps: Number T of time steps.
        width: Number of values per step; even.

    Returns:
        Shape (T, width).

    Example:
        >>> sinusoids(2, 4)[0]
        tensor([0., 0., 1., 1.])
    """
    frequencies = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(steps)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), 1)
