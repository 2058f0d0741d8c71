"""A small network on lists of vectors, equivariant to rotations and reflections: vector neurons without points."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from benchmarks.models.vn import VNLeakyReLU, VNLinear


class VectorLayer(nn.Module):
    """Linear map and leaky ReLU on vectors.

    Args:
        channels_in: Number of vectors C.
        channels_out: Number of vectors C'.

    Example:
        >>> import torch
        >>> VectorLayer(2, 5)(torch.ones(4, 2, 3)).shape
        torch.Size([4, 5, 3])
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.channels_in, self.channels_out = channels_in, channels_out
        self.linear = VNLinear(channels_in, channels_out)
        self.activation = VNLeakyReLU(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors, shape (B, C', 3)."""
        return self.activation(self.linear(x))


class VectorNet(nn.Module):
    """Maps each graph's list of vectors to as many vectors.

    Args:
        node_features: Not used; the other models' first argument.
        edge_features: Not used.
        vectors: Vectors of a graph.
        width: Vectors inside the network.
        layers: Number of layers.

    Example:
        >>> import torch
        >>> VectorNet(0, 0, vectors=4)(torch.ones(8, 3)).shape  # two graphs of four vectors
        torch.Size([8, 3])
    """

    def __init__(
        self, node_features: int, edge_features: int, vectors: int = 4, width: int = 16, layers: int = 3
    ) -> None:
        super().__init__()
        self.vectors = vectors
        self.layers = nn.ModuleList(VectorLayer(a, b) for a, b in pairwise([vectors, *[width] * layers]))
        self.readout = VNLinear(width, vectors)

    def forward(
        self,
        pos: Tensor,
        vel: Tensor | None = None,
        h: Tensor | None = None,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Tensor:
        """Map the vectors ``pos``, shape (graphs · vectors, 3), to vectors of the same shape; all else is ignored."""
        x = pos.view(-1, self.vectors, 3)
        for layer in self.layers:
            x = layer(x)
        return self.readout(x).flatten(0, 1)
