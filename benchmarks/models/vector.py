"""A small network on lists of vectors, equivariant to rotations and reflections: vector neurons without points."""

from __future__ import annotations

from itertools import pairwise

import torch
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

    further = 0
    """Vectors that the first layer reads beside those of the graph."""

    def __init__(
        self, node_features: int, edge_features: int, vectors: int = 4, width: int = 16, layers: int = 3
    ) -> None:
        super().__init__()
        self.vectors = vectors
        widths = [vectors + self.further, *[width] * layers]
        self.layers = nn.ModuleList(VectorLayer(a, b) for a, b in pairwise(widths))
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
        x = self.read(pos, vel)
        for layer in self.layers:
            x = layer(x)
        return self.readout(x).flatten(0, 1)

    def read(self, pos: Tensor, vel: Tensor | None) -> Tensor:
        """Return what the first layer reads, shape (graphs, channels, 3)."""
        del vel
        return pos.view(-1, self.vectors, 3)


class VectorAxisNet(VectorNet):
    """The same with an axis as one more input vector, of length 1.

    For one axis it is equivariant to the rotations about it and the mirrors that contain it, and to no other rotation.
    The axis comes as ``vel``, alike in all rows of a graph; without, it is z. It is built as ``VectorNet`` is.

    Example:
        >>> model, pos = VectorAxisNet(0, 0, vectors=4), torch.randn(8, 3)
        >>> for name, mirror in (("y", torch.tensor([1.0, -1, 1])), ("z", torch.tensor([1.0, 1, -1]))):
        ...     print(name, bool(torch.allclose(model(pos * mirror), model(pos) * mirror, atol=1e-5)))
        y True
        z False
    """

    further = 1

    def read(self, pos: Tensor, vel: Tensor | None) -> Tensor:
        """Return the vectors and, after them, the axis, shape (graphs, vectors + 1, 3)."""
        x = super().read(pos, vel)
        axis = x.new_tensor([0.0, 0.0, 1.0]).expand_as(x) if vel is None else vel.to(x).view_as(x)
        return torch.cat((x, axis[:, :1]), 1)
