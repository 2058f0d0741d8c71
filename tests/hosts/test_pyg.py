"""Models of torch-geometric, and layers that a user writes with its ``MessagePassing``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from torch_geometric.nn import MessagePassing
from torch_geometric.nn.models import DimeNetPlusPlus, SchNet, ViSNet, dimenet, schnet, visnet

import ace
from ace.testing import HostTests

ATOMS = 6


def radius_graph(x, r, batch=None, loop=False, max_num_neighbors=32, **_):
    """Pairs closer than ``r`` (torch-geometric's own needs pyg-lib, which the package index does not have)."""
    batch = torch.zeros(len(x), dtype=torch.long) if batch is None else batch
    near = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") < r
    near &= batch[:, None] == batch[None, :]
    near.fill_diagonal_(loop)
    assert near.sum(1).max() <= max_num_neighbors
    return near.nonzero().T.flip(0)


def triplets(edge_index, num_nodes):
    """Pairs of edges k -> j -> i with k != i (torch-geometric's own needs torch-sparse)."""
    del num_nodes
    source, target = edge_index
    meet = (source[:, None] == target[None, :]) & (target[:, None] != source[None, :])
    to_i, from_k = meet.nonzero().T
    return target, source, target[to_i], source[to_i], source[from_k], from_k, to_i


@pytest.fixture(autouse=True, scope="module")
def _neighbours():
    use_neighbours()


def use_neighbours():
    """Give torch-geometric the two functions it lacks here."""
    for module in (dimenet, schnet, visnet):
        module.radius_graph = radius_graph
    dimenet.triplets = triplets


def molecule():
    """Two molecules: atomic numbers, positions and the molecule of each atom."""
    generator = torch.Generator().manual_seed(0)
    z = torch.tensor([6, 1, 8, 7, 1, 6] * 2)
    corners = torch.tensor([[i, j, k] for i in (0.0, 1.4) for j in (0.0, 1.4) for k in (0.0, 1.4)])[:ATOMS]
    pos = torch.cat((corners, corners)) + 0.3 * torch.randn(2 * ATOMS, 3, generator=generator)
    return z, pos, torch.arange(2).repeat_interleave(ATOMS)


MOLECULE = {"inputs": {"z": "scalar", "pos": "position", "batch": "scalar"}}
ENERGY = [
    (ace.E3(), {**MOLECULE, "outputs": "scalar"}),
    (ace.Permutations(), {**MOLECULE, "outputs": "invariant"}),
]


class TestSchNet(HostTests):
    def model(self):
        use_neighbours()
        return SchNet(hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=10, cutoff=5.0)

    def batch(self):
        return molecule()

    def symmetries(self):
        return ENERGY


def all_pairs(pos, batch):
    """Every pair of atoms of one molecule, and their distance."""
    del batch
    first = torch.arange(ATOMS).repeat_interleave(ATOMS - 1)
    second = (first + 1 + torch.arange(ATOMS - 1).repeat(ATOMS)) % ATOMS
    return torch.stack((first, second)), (pos[first] - pos[second]).norm(dim=-1)


class TestSchNetWithInteractionGraph(HostTests):
    """The neighbours come from a function of the user, and nothing has to be replaced in the library."""

    def model(self):
        return SchNet(
            hidden_channels=16,
            num_filters=16,
            num_interactions=2,
            num_gaussians=10,
            cutoff=5.0,
            interaction_graph=all_pairs,
        )

    def batch(self):
        z, pos, _ = molecule()
        return {"z": z[:ATOMS], "pos": pos[:ATOMS]}

    def symmetries(self):
        types = {"inputs": {"z": "scalar", "pos": "position"}}
        return [
            (ace.E3(), {**types, "outputs": "scalar"}),
            (ace.Permutations(), {**types, "outputs": "invariant"}),
        ]


@pytest.mark.hosts
class TestDimeNetPlusPlus(HostTests):
    def model(self):
        use_neighbours()
        return DimeNetPlusPlus(
            hidden_channels=16,
            out_channels=1,
            num_blocks=2,
            int_emb_size=8,
            basis_emb_size=4,
            out_emb_channels=16,
            num_spherical=3,
            num_radial=4,
            cutoff=5.0,
            output_initializer="glorot_orthogonal",  # the default starts with an output of zeros
        )

    def batch(self):
        return molecule()

    def symmetries(self):
        return ENERGY


class TestViSNet(HostTests):
    def model(self):
        use_neighbours()
        return ViSNet(lmax=1, num_heads=2, num_layers=2, hidden_channels=16, num_rbf=8, cutoff=5.0)

    def batch(self):
        return molecule()

    def symmetries(self):
        return [
            (group, {**types, "outputs": (types["outputs"], None)}) for group, types in ENERGY
        ]  # the second output is for forces


class TestViSNetForces(HostTests):
    forces = True

    def model(self):
        use_neighbours()
        return ViSNet(lmax=2, num_heads=2, num_layers=2, hidden_channels=16, num_rbf=8, cutoff=5.0, derivative=True)

    def batch(self):
        return molecule()

    def symmetries(self):
        return [
            (ace.E3(), {**MOLECULE, "outputs": ("scalar", "vector")}),
            (ace.Permutations(), {**MOLECULE, "outputs": ("invariant", "scalar")}),
        ]


class ToTensor(MessagePassing):
    """Features, from the features at both ends and the distance between them."""

    def __init__(self, width):
        super().__init__(aggr="add")
        self.dense = nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU())

    def forward(self, x, pos, edge_index):
        return x + self.propagate(edge_index, x=x, pos=pos)

    def message(self, x_i, x_j, pos_i, pos_j):
        return self.dense(torch.cat((x_i, x_j, (pos_i - pos_j).square().sum(-1, keepdim=True)), -1))


class ToTuple(ToTensor):
    """Features and moved positions."""

    def __init__(self, width):
        super().__init__(width)
        self.scale = nn.Linear(width, 1)

    def forward(self, x, pos, edge_index):
        change, shift = self.propagate(edge_index, x=x, pos=pos)
        return x + change, pos + shift

    def message(self, x_i, x_j, pos_i, pos_j):
        message = super().message(x_i, x_j, pos_i, pos_j)
        return message, (pos_i - pos_j) * self.scale(message)

    def aggregate(self, inputs, index, ptr=None, dim_size=None):
        return tuple(self.aggr_module(part, index, ptr=ptr, dim_size=dim_size) for part in inputs)


class ToDict(ToTuple):
    """The same by name, and the shift beside it."""

    def forward(self, x, pos, edge_index):
        change, shift = self.propagate(edge_index, x=x, pos=pos)
        return {"x": x + change, "pos": pos + shift, "force": shift}


class Network(nn.Module):
    """A user's own network of the three layers."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.first, self.second, self.third = ToTensor(width), ToTuple(width), ToDict(width)

    def forward(self, data):
        x = self.first(self.embedding(data.z), data.pos, data.edge_index)
        x, pos = self.second(x, data.pos, data.edge_index)
        return self.third(x, pos, data.edge_index)


class TestMessagePassing(HostTests):
    def model(self):
        return Network()

    def batch(self):
        from torch_geometric.data import Data

        z, pos, batch = molecule()
        return Data(z=z, pos=pos, edge_index=radius_graph(pos, 2.5, batch))

    def symmetries(self):
        return [
            (ace.E3(), {"outputs": {"x": "scalar", "pos": "position", "force": "vector"}}),
            (ace.Permutations(), {"outputs": {"x": "scalar", "pos": "scalar", "force": "scalar"}}),
        ]
