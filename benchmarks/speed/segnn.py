"""``python -m benchmarks.speed segnn``: our SEGNN, also compiled, against the obvious one on e3nn; the same weights.

The obvious one does what the equations say, layer by layer: the spherical harmonics of the edges and the attributes of
the nodes anew, both ends of every edge gathered and joined, one fully connected tensor product of e3nn on every edge.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pandas as pd
import torch
from e3nn import o3
from torch import Tensor, nn

from benchmarks.compiling import compile_in_place
from benchmarks.models.graphs import centroid, mean_by_target, sum_by_target
from benchmarks.models.segnn import ATTRIBUTE, SEGNN, AttributeProduct, EdgeTensorProduct, SEGNNLayer, irreps
from benchmarks.speed.models import nbody_batch
from benchmarks.speed.timing import interleaved, spread

TIMES = "times as fast"
COMPILED = f"compiled, {TIMES}"
RATIOS = (TIMES, COMPILED)
SAME = 1e-5
"""Largest difference of outputs that rounding explains."""


class ObviousSEGNN(nn.Module):
    """The same function as a ``SEGNN``, with its weights.

    Args:
        model: The model whose weights are used, and trained.

    Example:
        >>> model = SEGNN(node_features=1, edge_features=1, features=8, layers=2)
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> pos, vel = torch.randn(2, 3), torch.randn(2, 3)
        >>> inputs = (pos, vel, torch.ones(2, 1), edges, torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
        >>> torch.allclose(ObviousSEGNN(model)(*inputs), model(*inputs), atol=1e-5)
        True
    """

    def __init__(self, model: SEGNN) -> None:
        super().__init__()
        self.model = model
        self.products = nn.ModuleList(_fully_connected(layer.message_in) for layer in model.layers)

    def forward(
        self, pos: Tensor, vel: Tensor, h: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor
    ) -> Tensor:
        """Predict positions, from inputs as those of ``SEGNN``."""
        model = self.model
        _, node_attribute, _ = _attributes(pos, vel, edge_index, edge_attr)
        features = _slow(model.embed, torch.cat((h, pos - centroid(pos, batch), vel), 1), node_attribute)
        for layer, product in zip(model.layers, self.products, strict=True):
            edge_attribute, node_attribute, edge_scalars = _attributes(pos, vel, edge_index, edge_attr)
            features = self._layer(layer, product, features, edge_index, edge_attribute, node_attribute, edge_scalars)
        features = model.readout_gate(_slow(model.readout_in, features, node_attribute))
        return pos + _slow(model.readout_out, features, node_attribute)

    @staticmethod
    def _layer(
        layer: SEGNNLayer,
        product: nn.Module,
        features: Tensor,
        edge_index: Tensor,
        edge_attribute: Tensor,
        node_attribute: Tensor,
        edge_scalars: Tensor,
    ) -> Tensor:
        m = layer.multiplicity
        source, target = edge_index
        i, j = features[target], features[source]
        joined = torch.cat((i[:, :m], j[:, :m], edge_scalars, i[:, m:], j[:, m:]), 1)
        message = layer.message_in_gate(product(joined, edge_attribute, _weights(layer.message_in)))
        message = layer.message_out_gate(_slow(layer.message_out, message, edge_attribute))
        collected = sum_by_target(message, target, len(features))
        both = torch.cat((features[:, :m], collected[:, :m], features[:, m:], collected[:, m:]), 1)
        updated = layer.update_gate(_slow(layer.update_in, both, node_attribute))
        return features + _slow(layer.update_out, updated, node_attribute)


def _attributes(pos: Tensor, vel: Tensor, edge_index: Tensor, edge_attr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attributes of edges and nodes, and the scalars of the edges."""
    source, target = edge_index
    relative = pos[target] - pos[source]
    on_edges = o3.spherical_harmonics(ATTRIBUTE, relative, normalize=True, normalization="component")
    at_nodes = o3.spherical_harmonics(ATTRIBUTE, vel, normalize=True, normalization="component")
    around = mean_by_target(on_edges[:, 1:], target, len(pos))
    at_nodes = torch.cat((at_nodes[:, :1], at_nodes[:, 1:] + around), 1)
    return on_edges, at_nodes, torch.cat((relative.norm(dim=1, keepdim=True), edge_attr), 1)


def _slow(product: AttributeProduct, features: Tensor, attribute: Tensor) -> Tensor:
    """What e3nn computes with the weights of the product."""
    result: Tensor = o3.FullyConnectedTensorProduct.forward(product, features, attribute)
    return result


def _fully_connected(product: EdgeTensorProduct) -> nn.Module:
    m = product.multiplicity
    scalars = product.scalar_weight.shape[1]
    return o3.FullyConnectedTensorProduct(
        irreps(scalars, 2 * m), ATTRIBUTE, irreps(2 * m, m), path_normalization="none", internal_weights=False
    )


def _weights(product: EdgeTensorProduct) -> Tensor:
    """The weights of our product, in the order of e3nn: from scalars, then from vectors."""
    m = product.multiplicity
    scalar, vector = product.scalar_weight.T, product.vector_weight.T
    parts = (scalar[:, : 2 * m], scalar[:, 2 * m :], vector[:, 2 * m :], vector[:, : 2 * m])
    return torch.cat([part.flatten() for part in parts])


def measure(rounds: int, steps: int = 1, device: str = "cpu") -> pd.DataFrame:
    """Return one row: training steps of all on 100 charged N-body systems, and how far their outputs are apart.

    Args:
        rounds: Number of rounds.
        steps: Steps of each in a round.
        device: ``cpu`` or ``cuda``.
    """
    batch = nbody_batch()
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    target = batch.target.to(device)
    model = SEGNN(inputs["h"].shape[1], inputs["edge_attr"].shape[1]).to(device)
    compiled = copy.deepcopy(model)
    compile_in_place(compiled)
    models = {"ours": model, "compiled": compiled, "obvious": ObviousSEGNN(model).to(device)}
    with torch.no_grad():
        expected = models["obvious"](**inputs)
        apart = max((models[name](**inputs) - expected).abs().max().item() for name in ("ours", "compiled"))
    if apart > SAME:
        raise RuntimeError(f"the outputs differ by {apart:.1e}, more than {SAME:.0e}: these are not the same functions")

    def training(network: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.Adam(network.parameters(), 1e-5)

        def step() -> None:
            optimizer.zero_grad()
            (network(**inputs) - target).square().mean().backward()
            optimizer.step()

        return step

    times = interleaved({name: training(network) for name, network in models.items()}, rounds, steps, device)
    row = {"model": "segnn", "batch": "100 systems of 5 particles"}
    row |= {f"{name}, ms": spread(times[name], 1) for name in models}
    row |= {TIMES: spread(times["obvious"] / times["ours"]), COMPILED: spread(times["obvious"] / times["compiled"])}
    return pd.DataFrame([row | {"outputs differ by": f"{apart:.1e}", "rounds": rounds}])
