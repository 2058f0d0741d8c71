"""Terms for e3nn: a dense map on the flattened irreps, whose sizes the layers know themselves."""

from __future__ import annotations

from typing import cast

from e3nn import o3
from e3nn.nn import Gate
from torch import nn

from ace.terms import Port, Site, Write, register_term


@register_term(o3.Linear)
def linear_term(site: Site) -> nn.Module:
    """Read the features, of dimension ``irreps_in.dim``; write ``irreps_out.dim``."""
    layer = cast("o3.Linear", site.layer)
    return site.dense([Port(0, "features", layer.irreps_in.dim)], [Write(None, layer.irreps_out.dim)])


@register_term(o3.TensorProduct)
def tensor_product_term(site: Site) -> nn.Module:
    """Read both factors of the product (not its weights); ``FullyConnectedTensorProduct`` is a subclass."""
    layer = cast("o3.TensorProduct", site.layer)
    reads = [Port(0, "x", layer.irreps_in1.dim), Port(1, "y", layer.irreps_in2.dim)]
    return site.dense(reads, [Write(None, layer.irreps_out.dim)])


@register_term(o3.TensorSquare)
def tensor_square_term(site: Site) -> nn.Module:
    """Read the one input, which is both factors."""
    layer = cast("o3.TensorSquare", site.layer)
    return site.dense([Port(0, "x", layer.irreps_in.dim)], [Write(None, layer.irreps_out.dim)])


@register_term(Gate, default=False)
def gate_term(site: Site) -> nn.Module:
    """Read scalars, gates and what they gate. On request only: the linear layers around a gate have terms."""
    layer = cast("Gate", site.layer)
    return site.dense([Port(0, "features", layer.irreps_in.dim)], [Write(None, layer.irreps_out.dim)])
