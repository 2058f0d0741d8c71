"""A plain convolutional network: what the steerable one is without its symmetry."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class CNN(nn.Module):
    """The next frame of a velocity field from the last ones, by 3 × 3 convolutions with ReLU between them.

    As ``SteerableFlow``, with as many channels if ``width`` is its fields · n, and no symmetry but under translations.

    Args:
        frames: Number of frames given.
        width: Channels of each hidden layer.
        layers: Number of convolutions.

    Example:
        >>> import torch
        >>> CNN(frames=3)(torch.ones(4, 6, 8, 8)).shape
        torch.Size([4, 2, 8, 8])
    """

    def __init__(self, frames: int = 10, width: int = 24, layers: int = 5) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for read, write in pairwise([2 * frames, *(layers - 1) * [width], 2]):
            modules += [nn.Conv2d(read, write, kernel_size=3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*modules[:-1])

    def forward(self, frames: Tensor) -> Tensor:
        """Predict.

        Args:
            frames: The last frames, the latest at the end, shape (B, 2 · frames, height, width).

        Returns:
            The next frame, shape (B, 2, height, width).
        """
        return frames[:, -2:] + self.layers(frames)
