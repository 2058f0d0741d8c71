"""Terms for escnn: an ordinary convolution or dense map beside the steerable one, mixing all channels freely."""

from __future__ import annotations

from typing import Any, cast

from escnn import nn as enn
from torch import Tensor, nn

from ace.calls import register_container
from ace.inputs import register_motion
from ace.terms import Make, Port, Site, Write, linear, linear_or_low_rank, low_rank, register_term


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


WIDE = 2**14
"""Weights of a full convolution above which a linear term has low rank, unless the user says otherwise: every weight
acts once for each pixel, so that a full one costs what the steerable convolution beside it costs."""
RANK = 8
"""Rank of the linear terms beside such convolutions: that many channels between two convolutions."""


def convolution_or_low_rank(features_in: int, features_out: int) -> nn.Module:
    """Return a dense map of patches, of rank ``RANK`` if a full one had more than ``WIDE`` weights."""
    wide = features_in * features_out > WIDE
    return (low_rank(RANK) if wide else linear)(features_in, features_out)


class ConvolutionTerm(nn.Module):
    r"""A map of the patches that a steerable convolution sees: for a linear map, an ordinary convolution.

    .. math:: f_\mathrm{neq}(x)_p = \mathrm{map}(x_{p + \Delta},\ \Delta \in \mathrm{kernel})

    Kernel size, stride, padding and dilation are the layer's; all channels of the patch are read and all channels
    of the pixel written, whatever the fields and ``groups`` of the layer.

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
        make = convolution_or_low_rank if make is linear_or_low_rank else make
        self.map = make(layer.in_type.size * layer.kernel_size**layer.d, layer.out_type.size)

    def forward(self, input: enn.GeometricTensor) -> dict[str, Tensor]:  # noqa: A002 (the name the layers use)
        """Return what is added to the features, shape (batch, channels out, pixels)."""
        x = nn.functional.pad(input.tensor, self.padding, self.padding_mode)
        layers = list(self.map) if type(self.map) is nn.Sequential else [self.map]
        if all(type(layer) is nn.Linear for layer in layers):  # without copying every pixel into each patch it is in
            convolve = nn.functional.conv2d if len(self.axes) == 2 else nn.functional.conv3d
            first, *others = cast("list[nn.Linear]", layers)
            kernel = first.weight.unflatten(1, (-1, *[self.kernel_size] * len(self.axes)))
            x = convolve(x, kernel, first.bias, self.stride, dilation=self.dilation)
            for layer in others:
                x = convolve(x, layer.weight[(...,) + (None,) * len(self.axes)], layer.bias)
            return {"tensor": x}
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
