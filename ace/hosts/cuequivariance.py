"""Terms for cuequivariance-torch: a dense map on the flattened irreps, whose sizes the layers know themselves."""

from __future__ import annotations

from typing import cast

from cuequivariance_torch import ChannelWiseTensorProduct, FullyConnectedTensorProduct, Linear
from torch import nn

from ace.generic import generic_term
from ace.terms import Port, Site, Write, register_term


@register_term(Linear)
def linear_term(site: Site) -> nn.Module:
    """Read the features, of dimension ``irreps_in.dim``, not weights passed beside them; write ``irreps_out.dim``."""
    layer = cast("Linear", site.layer)
    return site.dense([Port(0, "x", layer.irreps_in.dim)], [Write(None, layer.irreps_out.dim)])


@register_term(FullyConnectedTensorProduct, ChannelWiseTensorProduct)
def tensor_product_term(site: Site) -> nn.Module:
    """Read both factors of the product, not its weights.

    A product that is given indices gathers the rows of its factors itself: then only a factor with the rows of the
    output can be read, which the fall-back finds.
    """
    layer = cast("FullyConnectedTensorProduct", site.layer)
    if site.call is not None and (len(site.call.args) > 3 or any("indices" in name for name in site.call.kwargs)):
        return generic_term(site)
    reads = [Port(0, "x1", layer.irreps_in1.dim), Port(1, "x2", layer.irreps_in2.dim)]
    return site.dense(reads, [Write(None, layer.irreps_out.dim)])
