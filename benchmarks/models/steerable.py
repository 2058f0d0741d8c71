"""Steerable convolutional networks (Weiler and Cesa, NeurIPS 2019) of the layers of escnn.

escnn is imported when a model is built, so that the suite lists these models without it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


class SteerableClassifier(nn.Module):
    """Class of an image, whichever way it is turned: convolutions on fields of the regular representation of C_n.

    Three blocks of a 5 × 5 convolution, batch norm, ReLU and pooling; then the maximum over the group, the mean over
    the pixels and two dense layers. Quarter turns are exact if n is a multiple of 4 and the sides of the images are of
    4, since every pooling then keeps the centre; turns by other angles are as exact as the pixels allow.

    Args:
        classes: Number of classes.
        order: n of C_n.
        fields: Fields of the first block, each of n channels; the second and third have twice as many.
        hidden: Width of the dense layer.
    """

    def __init__(self, classes: int = 10, order: int = 8, fields: int = 4, hidden: int = 64) -> None:
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        plane = gspaces.rot2dOnR2(order)
        self.order = order
        self.images = enn.FieldType(plane, [plane.trivial_repr])
        widths = [fields, 2 * fields, 2 * fields]
        types = [self.images, *(enn.FieldType(plane, width * [plane.regular_repr]) for width in widths)]
        blocks = []
        for number, (read, write) in enumerate(pairwise(types)):
            blocks += [
                enn.R2Conv(read, write, kernel_size=5, padding=2, bias=False),
                enn.InnerBatchNorm(write),
                enn.ReLU(write),
            ]
            if number < 2:
                blocks += [enn.PointwiseAvgPool(write, kernel_size=2)]
        self.features = enn.SequentialModule(*blocks)
        self.head = nn.Sequential(nn.Linear(widths[-1], hidden), nn.ELU(), nn.Linear(hidden, classes))
        self.train()  # without the filters that escnn keeps until then, which the state dict would have

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: Shape (B, 1, height, width).

        Returns:
            Logits, shape (B, classes).
        """
        from escnn import nn as enn

        x = self.features(enn.GeometricTensor(images, self.images)).tensor
        # The maximum over each field: enn.GroupPooling, which returns float32 whatever it is given.
        return self.head(x.unflatten(1, (-1, self.order)).amax(2).mean((2, 3)))


class SteerableFlow(nn.Module):
    """The next frame of a velocity field from the last ones, equivariant to quarter turns.

    3 × 3 convolutions with ReLU between them, from vector fields through fields of the regular representation of C_n to
    one vector field: the change since the last frame.

    Args:
        frames: Number of frames given.
        order: n of C_n.
        fields: Fields of each hidden layer, each of n channels.
        layers: Number of convolutions.
    """

    def __init__(self, frames: int = 10, order: int = 4, fields: int = 6, layers: int = 5) -> None:
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        plane = gspaces.rot2dOnR2(order)
        self.frames = enn.FieldType(plane, frames * [plane.irrep(1)])
        hidden = enn.FieldType(plane, fields * [plane.regular_repr])
        change = enn.FieldType(plane, [plane.irrep(1)])
        modules: list[nn.Module] = []
        for read, write in pairwise([self.frames, *(layers - 1) * [hidden], change]):
            modules += [enn.R2Conv(read, write, kernel_size=3, padding=1), enn.ReLU(hidden)]
        self.layers = enn.SequentialModule(*modules[:-1])
        # Rows are counted downwards, but in escnn the second component of a vector points up.
        self.register_buffer("signs", torch.tensor([1.0, -1.0]).view(2, 1, 1), persistent=False)
        self.train()  # without the filters that escnn keeps until then, which the state dict would have

    def forward(self, frames: Tensor) -> Tensor:
        """Predict.

        Args:
            frames: The last frames, the latest at the end, as pairs of components along the columns and along the
                rows, in the direction of growing indices; shape (B, 2 · frames, height, width).

        Returns:
            The next frame, shape (B, 2, height, width).
        """
        from escnn import nn as enn

        upward = (frames.unflatten(1, (-1, 2)) * self.signs).flatten(1, 2)
        change = self.layers(enn.GeometricTensor(upward, self.frames)).tensor
        return frames[:, -2:] + change * self.signs
