"""Networks built from e3nn's layers, and the networks that e3nn ships."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

pytest.importorskip("e3nn")

from e3nn import o3
from e3nn.math import soft_one_hot_linspace
from e3nn.nn import BatchNorm, FullyConnectedNet, Gate
from e3nn.nn.models.gate_points_2101 import Network as Network2101
from e3nn.nn.models.gate_points_2102 import Network as Network2102
from e3nn.nn.models.v2106.gate_points_networks import NetworkForAGraphWithAttributes, SimpleNetwork

import ace
from ace.testing import HostTests

POINTS = 6
RADIUS = 2.5


def scatter(source, index, dim=0, dim_size=None, reduce="sum"):
    """What torch_scatter would do, for rows (the package index has no binary of it)."""
    assert dim == 0
    assert reduce == "sum"
    size = int(index.max()) + 1 if dim_size is None else dim_size
    return source.new_zeros(size, source.shape[1]).index_add(0, index, source)


def radius_graph(pos, r, batch, max_num_neighbors=32):
    """What torch_cluster would do."""
    near = (pos[:, None] - pos).norm(dim=-1) < r
    near &= (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    return near.nonzero().T


def network_2103():
    """The network of March 2021, which imports two libraries for one function each."""
    pytest.importorskip("torch_geometric")  # which looks for them too
    names = {"torch_cluster": radius_graph, "torch_scatter": scatter}
    stand_ins = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for name, module in stand_ins.items():
        setattr(module, names[name].__name__, names[name])
    sys.modules.update(stand_ins)
    try:
        from e3nn.nn.models.v2103.gate_points_networks import SimpleNetwork as SimpleNetwork2103
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return SimpleNetwork2103


def points(features, seed=1):
    """Two graphs of points with features: dictionary with pos, x, batch."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pos": torch.rand(2 * POINTS, 3, generator=generator) * 2.0,
        "x": torch.randn(2 * POINTS, o3.Irreps(features).dim, generator=generator),
        "batch": torch.arange(2).repeat_interleave(POINTS),
    }


class Steerable(nn.Module):
    """Linear, tensor product, gate and normalisation, as the guide of e3nn puts them together."""

    irreps_in, irreps_sh, irreps_out = o3.Irreps("4x0e+2x1o"), o3.Irreps("0e+1o"), o3.Irreps("2x0e+1o")

    def __init__(self):
        super().__init__()
        self.gate = Gate("4x0e", [torch.nn.functional.silu], "3x0e", [torch.sigmoid], "2x1o+1x1e")
        self.sh = o3.SphericalHarmonics(self.irreps_sh, normalize=True, normalization="component")
        self.embed = o3.Linear(self.irreps_in, self.irreps_in)
        self.mix = o3.FullyConnectedTensorProduct(self.irreps_in, self.irreps_sh, self.gate.irreps_in)
        self.norm = BatchNorm(self.gate.irreps_out)
        self.read = o3.Linear(self.gate.irreps_out, self.irreps_out)

    def forward(self, x, direction):
        return self.read(self.norm(self.gate(self.mix(self.embed(x), self.sh(direction)))))


class TestSteerable(HostTests):
    def model(self):
        return Steerable()

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(9, Steerable.irreps_in.dim, generator=generator), torch.randn(9, 3, generator=generator)

    def symmetries(self):
        types = {
            "inputs": {"x": str(Steerable.irreps_in), "direction": "vector"},
            "outputs": str(Steerable.irreps_out),
        }
        return [(ace.O3(), types), (ace.Permutations(), {**types, "outputs": "scalar"})]


class PointConvolution(nn.Module):
    """The convolution of e3nn's guide: a tensor product whose weights come from the length of the edge."""

    irreps_in, irreps_sh, irreps_out = o3.Irreps("3x0e+1o"), o3.Irreps("0e+1o"), o3.Irreps("2x0e+1o")

    def __init__(self):
        super().__init__()
        self.sh = o3.SphericalHarmonics(self.irreps_sh, normalize=True, normalization="component")
        self.linear = o3.Linear(self.irreps_in, self.irreps_in)
        instructions = [
            (i, j, k, "uvw", True)
            for i, (_, one) in enumerate(self.irreps_in)
            for j, (_, two) in enumerate(self.irreps_sh)
            for k, (_, out) in enumerate(self.irreps_out)
            if out in one * two
        ]
        self.product = o3.TensorProduct(
            self.irreps_in,
            self.irreps_sh,
            self.irreps_out,
            instructions,
            shared_weights=False,
            internal_weights=False,
        )
        self.radial = FullyConnectedNet([5, 8, self.product.weight_numel], torch.nn.functional.silu)

    def forward(self, x, pos, edge_index):
        source, target = edge_index
        away = pos[source] - pos[target]
        lengths = soft_one_hot_linspace(away.norm(dim=1), 0.0, RADIUS, 5, basis="smooth_finite", cutoff=True)
        messages = self.product(self.linear(x)[source], self.sh(away), self.radial(lengths))
        return messages.new_zeros(len(x), messages.shape[1]).index_add(0, target, messages)


class TestPointConvolution(HostTests):
    relax_options = {"layers": (o3.Linear, o3.TensorProduct)}

    def model(self):
        return PointConvolution()

    def batch(self):
        data = points(PointConvolution.irreps_in)
        return data["x"], data["pos"], radius_graph(data["pos"], RADIUS, data["batch"])

    def symmetries(self):
        types = {
            "inputs": {"x": str(PointConvolution.irreps_in), "pos": "position", "edge_index": "edge_index"},
            "outputs": str(PointConvolution.irreps_out),
        }
        return [(ace.E3(), types), (ace.Permutations(), {**types, "outputs": "scalar"})]

    def test_the_radial_network_stays_strict(self):
        assert set(ace.relaxations(self._relaxed())) == {"linear", "product"}

    def test_a_layer_on_the_edges_is_relaxed_on_demand_only(self):
        relaxed = ace.relax(self.model(), example=self.batch())
        assert set(ace.relaxations(relaxed)) == {"linear"}


@pytest.mark.hosts
class Shipped(HostTests):
    """A network that e3nn ships: node features from a dictionary of points."""

    irreps_in, irreps_out = "2x0e+1x1o", "1x0e+1x1o"

    def batch(self):
        return (points(self.irreps_in),)

    def symmetries(self):
        inputs = {"pos": "position", "x": self.irreps_in, "batch": "scalar"}
        return [
            (ace.E3(), {"inputs": inputs, "outputs": self.irreps_out}),
            (ace.Permutations(), {"inputs": inputs, "outputs": "scalar"}),
        ]


class TestNetwork2101(Shipped):
    def model(self):
        return self.network(Network2101)

    def network(self, network):
        return network(
            irreps_in=self.irreps_in,
            irreps_hidden="4x0e+2x1o",
            irreps_out=self.irreps_out,
            irreps_node_attr=None,
            irreps_edge_attr="0e+1o",
            layers=1,
            max_radius=RADIUS,
            number_of_basis=5,
            radial_layers=1,
            radial_neurons=8,
            num_neighbors=4.0,
            num_nodes=float(POINTS),
            reduce_output=False,
        )


class TestNetwork2102(TestNetwork2101):
    def model(self):
        return self.network(Network2102)


class TestNetwork2103(Shipped):
    def model(self):
        return self.network(network_2103())

    def network(self, network):
        return network(
            self.irreps_in, self.irreps_out, RADIUS, num_neighbors=4.0, num_nodes=POINTS, mul=2, layers=1, lmax=1,
            pool_nodes=False,
        )  # fmt: skip


class TestNetwork2106(TestNetwork2103):
    def model(self):
        return self.network(SimpleNetwork)


class TestGraphWithAttributes2106(Shipped):
    """Nodes and edges have attributes of their own, and the edges are given."""

    irreps_edge = "2x0e+1x1o"

    def model(self):
        return NetworkForAGraphWithAttributes(
            self.irreps_in, "2x0e", self.irreps_edge, self.irreps_out,
            max_radius=RADIUS, num_neighbors=4.0, num_nodes=POINTS, mul=2, layers=1, lmax=1, pool_nodes=False,
        )  # fmt: skip

    def batch(self):
        data = points(self.irreps_in)
        edges = radius_graph(data["pos"], RADIUS, data["batch"])
        generator = torch.Generator().manual_seed(2)
        edge_dim = o3.Irreps(self.irreps_edge).dim
        return (
            {
                **data,
                "edge_index": edges,
                "node_attr": torch.randn(2 * POINTS, 2, generator=generator),
                "edge_attr": torch.randn(edges.shape[1], edge_dim, generator=generator),
            },
        )

    def symmetries(self):
        inputs = {
            "pos": "position",
            "x": self.irreps_in,
            "batch": "scalar",
            "edge_index": "edge_index",
            "node_attr": "scalar",
            "edge_attr": self.irreps_edge,
        }
        return [
            (ace.E3(), {"inputs": inputs, "outputs": self.irreps_out}),
            (ace.Permutations(), {"inputs": {**inputs, "edge_attr": "invariant"}, "outputs": "scalar"}),
        ]
