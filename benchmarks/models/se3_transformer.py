"""SE(3)-Transformer (Fuchs et al., NeurIPS 2020) of the package ``se3-transformer-pytorch``, as a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SE3Classifier(nn.Module):
    """Classifies a point cloud with the package's network on the nearest neighbours of each point.

    A point comes with its distance from the origin and its position as a vector. The scalars that the network returns
    are averaged, and their largest taken, over the points. Invariant to rotations about the origin, not to reflections.

    Args:
        classes: Number of classes.
        width: Scalars, and as many vectors, of a point.
        k: Neighbours of each point.
        layers: Number of attention blocks, each with a feed-forward block.
        heads: Attention heads.
    """

    def __init__(self, classes: int, width: int = 16, k: int = 16, layers: int = 2, heads: int = 2) -> None:
        from se3_transformer_pytorch import SE3Transformer

        super().__init__()
        self.network = SE3Transformer(
            dim=width,
            dim_in=1,
            dim_out=2 * width,
            input_degrees=2,
            num_degrees=2,
            heads=heads,
            dim_head=width // heads,
            depth=layers,
            num_neighbors=k,
            tie_key_values=True,  # one convolution for both: two thirds of the time
        )
        self.head = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, classes))

    def forward(self, points: Tensor) -> Tensor:
        """Return class scores.

        Args:
            points: Clouds centred at the origin, shape (B, N, 3).

        Returns:
            Shape (B, classes).
        """
        features = {"0": points.norm(dim=-1)[..., None, None], "1": points[..., None, :]}
        scalars = self.network(features, points)
        return self.head(torch.cat((scalars.mean(1), scalars.amax(1)), -1))
