"""Terms for escnn: an ordinary convolution or dense map beside the steerable one, mixing all channels freely."""

from __future__ import annotations

from typing import Any, cast

import torch
from escnn import nn as enn
from torch import Tensor, nn

from ace.calls import register_container
from ace.inputs import register_motion
from ace.terms import START, Make, Port, Site, Write, linear_or_low_rank, register_term


def parts(value: enn.GeometricTensor) -> dict[str, Any]:
    """Return the features and the coordinates (None on a grid) of a ``GeometricTensor``."""
    return {"tensor": value.tensor, "coords": value.coords}


def rebuilt(value: enn.GeometricTensor, new: dict[str, Any]) -> enn.GeometricTensor:
    """Return a ``GeometricTensor`` of the same field type with other features and coordinates."""
    return enn.GeometricTensor(new["tensor"], value.type, new["coords"])


def moved(value: enn.GeometricTensor) -> enn.GeometricTensor:
    """Transform by the first element of the group, identity aside, that maps pixels to pixels; else by any.

    A model on pixels is exactly equivariant to the former only. A trivial group leaves the value as it is.
    """
    action, identity = value.type.gspace.basespace_action, value.type.fibergroup.identity
    others = [element for element in value.type.testing_elements if element != identity]
    exact = [g for g in others if abs(action(g) - action(g).round()).max(initial=0.0) < 1e-6]
    element = next(iter([*exact, *others]), None)
    return value if element is None else value.transform(element)


register_container(enn.GeometricTensor, parts, rebuilt)
register_motion(enn.GeometricTensor, moved)


CHANNELS = 16
"""Most channels that the kernel of a linear term reads and writes, unless the user says otherwise: its weights act once
for each pixel, so that a full one costs what the steerable convolution beside it costs."""


class Bottleneck(nn.Sequential):
    """A linear map of patches: of 1 pixel down to few channels, of the kernel, of 1 pixel up; what is narrow stays."""

    def __init__(self, layer: enn.R2Conv | enn.R3Conv) -> None:
        convolution = nn.Conv2d if layer.d == 2 else nn.Conv3d
        options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
        read, write = layer.in_type.size, layer.out_type.size
        here, there = min(read, CHANNELS), min(write, CHANNELS)
        down = [convolution(read, here, 1, bias=False)] if here < read else []
        up = [convolution(there, write, 1)] if there < write else []
        super().__init__(*down, convolution(here, there, layer.kernel_size, bias=not up, **options), *up)
        with torch.no_grad():
            for parameter in self[-1].parameters():
                parameter.mul_(START)

    @property
    def matrix(self) -> Tensor:
        """The map of one patch, shape (channels out, channels in · pixels of the kernel)."""
        weights = [cast("Tensor", layer.weight).flatten(2) for layer in self]
        kernel = next(number for number, weight in enumerate(weights) if weight.shape[2] > 1)
        matrix = weights[kernel]
        for down in weights[:kernel]:
            matrix = torch.einsum("oap,ac->ocp", matrix, down[..., 0])
        for up in weights[kernel + 1 :]:
            matrix = torch.einsum("ob,bcp->ocp", up[..., 0], matrix)
        return matrix.flatten(1)


class ConvolutionTerm(nn.Module):
    r"""A map of the patches that a steerable convolution sees: for a linear map, an ordinary convolution.

    .. math:: f_\mathrm{neq}(x)_p = \mathrm{map}(x_{p + \Delta},\ \Delta \in \mathrm{kernel})

    Kernel size, stride, padding and dilation are the layer's; all channels of the patch are read and all channels
    of the pixel written, whatever the fields and ``groups`` of the layer. Where it reads or writes more than 16
    channels, the default map is a ``Bottleneck``.

    Args:
        layer: The convolution.
        make: Makes the map from (channels in · pixels of the kernel, channels out).
    """

    def __init__(self, layer: enn.R2Conv | enn.R3Conv, make: Make) -> None:
        super().__init__()
        self.axes = tuple(range(2, 2 + layer.d))
        self.kernel_size = layer.kernel_size
        self.stride, self.dilation = _each(layer.stride, layer.d), _each(layer.dilation, layer.d)
        self.padding = [side for size in reversed(_each(layer.padding, layer.d)) for side in (size, size)]
        self.padding_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.feature_axes = {("tensor",): (1,)}
        sizes = layer.in_type.size * layer.kernel_size**layer.d, layer.out_type.size
        wide = max(layer.in_type.size, layer.out_type.size) > CHANNELS and layer.kernel_size > 1
        wide &= make is linear_or_low_rank
        self.map = Bottleneck(layer) if wide else make(*sizes)

    def forward(self, input: enn.GeometricTensor) -> dict[str, Tensor]:  # noqa: A002 (the name the layers use)
        """Return what is added to the features, shape (batch, channels out, pixels)."""
        if isinstance(self.map, Bottleneck):
            return {"tensor": self.map(input.tensor)}
        x = nn.functional.pad(input.tensor, self.padding, self.padding_mode)
        if type(self.map) is nn.Linear:  # the same without copying every pixel into each patch it is in
            convolve = nn.functional.conv2d if len(self.axes) == 2 else nn.functional.conv3d
            kernel = self.map.weight.unflatten(1, (-1, *[self.kernel_size] * len(self.axes)))
            return {"tensor": convolve(x, kernel, self.map.bias, self.stride, dilation=self.dilation)}
        for axis, stride, dilation in zip(self.axes, self.stride, self.dilation, strict=True):
            x = x.unfold(axis, dilation * (self.kernel_size - 1) + 1, stride)[..., ::dilation]
        patches = x.movedim(1, self.axes[-1]).flatten(-self.axes[-1])
        return {"tensor": self.map(patches).movedim(-1, 1)}


@register_term(enn.R2Conv, enn.R3Conv)
def convolution_term(site: Site) -> nn.Module:
    """Read the patches; ``rank`` and the other maps act on a patch as they do on a row of features."""
    return ConvolutionTerm(cast("enn.R2Conv | enn.R3Conv", site.layer), site.make)


@register_term(enn.Linear)
def linear_term(site: Site) -> nn.Module:
    """Read the features, of size ``in_type.size``; write ``out_type.size``."""
    layer = cast("enn.Linear", site.layer)
    reads = [Port(0, "input", layer.in_type.size, inside=("tensor",))]
    return site.dense(reads, [Write(("tensor",), layer.out_type.size)])


def _each(size: int | tuple[int, ...], dimensions: int) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * dimensions
