"""Vector neurons: networks on lists of 3-vectors (Deng et al., ICCV 2021), and two point-cloud classifiers.

A feature is a list of C vectors, V in R^(C x 3). Tensors are [B, C, 3], [B, C, 3, N] or [B, C, 3, N, k]: batch,
channel, vector, point, neighbour. Every layer but the last ones commutes with rotations and reflections of the
vectors, since it only combines vectors with coefficients that depend on inner products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6
"""Added to squared norms before a root or a division: gradients stay finite at zero vectors, and since a squared norm
is invariant, the symmetry stays exact."""


class VNLinear(nn.Module):
    """Mixes the channels, V' = W V, with W in R^(C' x C); no bias, which would be a direction of its own.

    Args:
        channels_in: C.
        channels_out: C'.

    Example:
        >>> VNLinear(2, 5)(torch.ones(4, 2, 3, 7)).shape
        torch.Size([4, 5, 3, 7])
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.map = nn.Linear(channels_in, channels_out, bias=False)
        # Keeps lengths. PyTorch's own start shortens them layer by layer, until an untrained model sees no input.
        nn.init.normal_(self.map.weight, std=channels_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed vectors, shape (B, C', 3, ...)."""
        return self.map(x.transpose(1, -1)).transpose(1, -1)


class VNLeakyReLU(nn.Module):
    """Shortens what points against a learned direction.

    With k = U V, for each channel::

        v' = v                                      where <v, k> >= 0
        v' = v - (1 - slope) <v, k> k / |k|^2       elsewhere

    Args:
        channels: C.
        slope: Part of the component along k that is kept; 0 is VN-ReLU.

    Example:
        >>> VNLeakyReLU(2)(torch.ones(4, 2, 3)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, channels: int, slope: float = 0.2) -> None:
        super().__init__()
        self.direction = VNLinear(channels, channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the same shape."""
        k = self.direction(x)
        against = (x * k).sum(2, keepdim=True).clamp(max=0)
        return x - (1 - self.slope) * against / (k.square().sum(2, keepdim=True) + EPS) * k


class VNBatchNorm(nn.Module):
    """Batch normalisation of the norms, v' = v BN(|v|) / |v|, with |v| = sqrt(v.v + eps).

    Args:
        channels: C.

    Example:
        >>> VNBatchNorm(2)(torch.ones(4, 2, 3, 7)).shape
        torch.Size([4, 2, 3, 7])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the same shape."""
        length = (x.square().sum(2) + EPS).sqrt()
        normed = self.norm(length.flatten(2) if length.ndim > 2 else length)
        return x * (normed.view_as(length) / length).unsqueeze(2)


class VNMaxPool(nn.Module):
    """Picks, for each channel, the vector that points furthest along a learned direction of its own.

    Over the last axis n, with K_n = W V_n: v' = v_n* with n* = argmax_n <v_n, k_n>. No gradient reaches W, since an
    argmax has none; W stays what it was drawn as.

    Args:
        channels: C.

    Example:
        >>> VNMaxPool(2)(torch.ones(4, 2, 3, 7)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.direction = VNLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector a channel in place of the last axis."""
        best = (x * self.direction(x)).sum(2, keepdim=True).argmax(-1, keepdim=True)
        return x.take_along_dim(best, -1).squeeze(-1)


class VNMeanPool(nn.Module):
    """Mean over the last axis.

    Example:
        >>> VNMeanPool()(torch.ones(4, 2, 3, 7)).shape
        torch.Size([4, 2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return one vector a channel in place of the last axis."""
        return x.mean(-1)


class VNBlock(nn.Module):
    """Linear map, batch normalisation and leaky ReLU.

    Args:
        channels_in: C.
        channels_out: C'.

    Example:
        >>> VNBlock(2, 5)(torch.ones(4, 2, 3, 7, 6)).shape
        torch.Size([4, 5, 3, 7, 6])
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.channels_in, self.channels_out = channels_in, channels_out
        self.linear = VNLinear(channels_in, channels_out)
        self.norm = VNBatchNorm(channels_out)
        self.activation = VNLeakyReLU(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of shape (B, C', 3, ...)."""
        return self.activation(self.norm(self.linear(x)))


class VNStdFeature(nn.Module):
    """Invariant features: the vectors in a frame that turns with them, V T^T.

    T in R^(3 x 3) is what two blocks and a linear map make of V. With V -> V R also T -> T R, so that
    V R (T R)^T = V T^T for every orthogonal R.

    Args:
        channels: C.

    Example:
        >>> VNStdFeature(4)(torch.ones(2, 4, 3, 7)).shape
        torch.Size([2, 4, 3, 7])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        self.frame = nn.Sequential(VNBlock(channels, half), VNBlock(half, quarter), VNLinear(quarter, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the coordinates of each vector in the frame, shape of x."""
        return torch.einsum("bcv...,bfv...->bcf...", x, self.frame(x))


def edge_features(x: Tensor, k: int, cross: bool) -> Tensor:
    """Features of each point and its k nearest neighbours, itself among them: (x_j - x_i, x_i), and x_j × x_i.

    Nearest is in the Frobenius norm of all channels, which is invariant. The cross product turns with rotations but
    keeps its sign under x -> -x: with it, reflections are no symmetry.

    Args:
        x: Vectors, shape (B, C, 3, N).
        k: Number of neighbours; all points if there are fewer.
        cross: Whether to append the cross product.

    Returns:
        Shape (B, 2C, 3, N, k) or (B, 3C, 3, N, k).

    Example:
        >>> edge_features(torch.randn(2, 1, 3, 7), k=4, cross=True).shape
        torch.Size([2, 3, 3, 7, 4])
    """
    points = x.detach().flatten(1, 2).transpose(1, 2)
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.topk(min(k, x.shape[-1]), largest=False).indices  # (B, N, k)
    places = nearest.flatten(1)[:, None, None].expand(*x.shape[:3], -1)
    neighbour = x.gather(-1, places).unflatten(-1, nearest.shape[1:])
    own = x.unsqueeze(-1).expand_as(neighbour)
    parts = [neighbour - own, own]
    if cross:
        parts.append(torch.linalg.cross(neighbour, own, dim=2))
    return torch.cat(parts, 1)


class EdgeConv(nn.Module):
    """Features of the edges to the nearest neighbours, a block, and a pool over the neighbours.

    Args:
        channels_in: C.
        channels_out: C'.
        k: Number of neighbours.
        cross: Whether the edge features have the cross product.
        pool: ``"mean"`` or ``"max"``.

    Example:
        >>> EdgeConv(1, 5, k=4)(torch.randn(2, 1, 3, 7)).shape
        torch.Size([2, 5, 3, 7])
    """

    def __init__(self, channels_in: int, channels_out: int, k: int, cross: bool = False, pool: str = "mean") -> None:
        super().__init__()
        self.k, self.cross = k, cross
        self.block = VNBlock((3 if cross else 2) * channels_in, channels_out)
        self.pool = VNMaxPool(channels_out) if pool == "max" else VNMeanPool()

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the points, shape (B, C', 3, N)."""
        return self.pool(self.block(edge_features(x, self.k, self.cross)))


class InvariantHead(nn.Module):
    """Class scores from equivariant features of the points.

    Each point's vectors are joined with their mean over the cloud and made invariant; what is left is an ordinary
    network: maximum and mean over the points, and two dense layers.

    Args:
        channels: C.
        classes: Number of classes.

    Example:
        >>> InvariantHead(4, 10)(torch.randn(2, 4, 3, 7)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.invariant = VNStdFeature(2 * channels)
        self.classify = nn.Sequential(
            nn.Linear(12 * channels, 6 * channels), nn.ReLU(), nn.Linear(6 * channels, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, shape (B, classes)."""
        x = self.invariant(with_mean(x)).flatten(1, 2)
        return self.classify(torch.cat((x.amax(-1), x.mean(-1)), 1))


def with_mean(x: Tensor) -> Tensor:
    """Append to each point's vectors the mean over all points, shape (B, 2C, 3, N)."""
    return torch.cat((x, x.mean(-1, keepdim=True).expand_as(x)), 1)


class VNPointNet(nn.Module):
    """Classifies a point cloud point by point, then over all points; invariant to rotations about the origin.

    Args:
        classes: Number of classes.
        width: Channels, each a vector: a third of what an ordinary network would have.
        k: Neighbours of the first layer, which makes vectors of the neighbourhood out of the one of the point.
        cross: Whether that layer takes cross products too; without, reflections are a symmetry as well.
        pool: Its pooling, ``"mean"`` or ``"max"``.

    Example:
        >>> VNPointNet(classes=10, width=4, k=4)(torch.randn(2, 16, 3)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int, width: int = 21, k: int = 20, cross: bool = True, pool: str = "mean") -> None:
        super().__init__()
        self.embed = EdgeConv(1, width, k, cross, pool)
        self.local = VNBlock(width, width)
        self.joint = VNBlock(2 * width, 2 * width)
        self.head = InvariantHead(2 * width, classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return class scores.

        Args:
            points: Clouds centred at the origin, shape (B, N, 3).

        Returns:
            Shape (B, classes).
        """
        x = self.embed(points.mT.unsqueeze(1))
        return self.head(self.joint(with_mean(self.local(x))))


class VNDGCNN(nn.Module):
    """Classifies a point cloud with edge convolutions on graphs that are rebuilt from the features of each layer.

    Args:
        classes: Number of classes.
        width: Channels, each a vector.
        k: Neighbours in each layer.
        layers: Edge convolutions; the head reads all of their outputs.
        cross: As in `VNPointNet`, of the first layer.
        pool: Pooling over the neighbours, ``"mean"`` or ``"max"``.

    Example:
        >>> VNDGCNN(classes=10, width=4, k=4)(torch.randn(2, 16, 3)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, classes: int, width: int = 21, k: int = 20, layers: int = 4, cross: bool = False, pool: str = "mean"
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            EdgeConv(1 if layer == 0 else width, width, k, cross and layer == 0, pool) for layer in range(layers)
        )
        self.joint = VNBlock(layers * width, 2 * width)
        self.head = InvariantHead(2 * width, classes)

    def forward(self, points: Tensor) -> Tensor:
        """Return class scores.

        Args:
            points: Clouds centred at the origin, shape (B, N, 3).

        Returns:
            Shape (B, classes).
        """
        x = points.mT.unsqueeze(1)
        seen = []
        for convolution in self.convolutions:
            x = convolution(x)
            seen.append(x)
        return self.head(self.joint(torch.cat(seen, 1)))
