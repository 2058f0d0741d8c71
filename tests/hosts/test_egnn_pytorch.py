"""Models of egnn-pytorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("egnn_pytorch")

from egnn_pytorch import EGNN, EGNN_Network
from torch import nn

import ace
from ace.testing import HostTests

NODES = 8


def points(nodes=NODES):
    """Features, of two sets of points, and coordinates."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, nodes, 16, generator=generator), torch.randn(2, nodes, 3, generator=generator)


class Layers(nn.Module):
    """Layers of the library, called one after the other."""

    def __init__(self):
        super().__init__()
        self.first = EGNN(dim=16)
        self.second = EGNN(dim=16, norm_coors=True, soft_edges=True)

    def forward(self, feats, coors):
        return self.second(*self.first(feats, coors))


def types(features="feats"):
    return [
        (ace.E3(), {"inputs": {features: "scalar", "coors": "position"}, "outputs": ("scalar", "position")}),
        (ace.Permutations(), {"inputs": {features: "scalar", "coors": "scalar"}, "outputs": ("scalar", "scalar")}),
    ]


class TestEGNN(HostTests):
    def model(self):
        return Layers()

    def batch(self):
        return points()

    def symmetries(self):
        return types()


class TestEGNNNetwork(HostTests):
    """Nearest neighbours, edges, and attention over global tokens before every other layer."""

    def model(self):
        return EGNN_Network(
            num_tokens=21,
            dim=16,
            depth=2,
            edge_dim=4,
            num_nearest_neighbors=4,
            global_linear_attn_every=2,
            global_linear_attn_heads=2,
            global_linear_attn_dim_head=8,
            norm_coors=True,
        )

    def batch(self):
        generator = torch.Generator().manual_seed(0)
        return {
            "feats": torch.randint(21, (2, NODES), generator=generator),
            "coors": points()[1],
            "edges": torch.randn(2, NODES, NODES, 4, generator=generator),
            "mask": torch.ones(2, NODES, dtype=torch.bool),
        }

    def symmetries(self):
        still = {"feats": "invariant", "edges": "invariant", "mask": "invariant"}
        return [(ace.E3(), {"inputs": {**still, "coors": "position"}, "outputs": ("scalar", "position")})]


def test_sets_of_another_size():
    relaxed = ace.relax(Layers(), example=points())
    features, coors = relaxed(*points(NODES + 3))
    assert (features.shape, coors.shape) == ((2, NODES + 3, 16), (2, NODES + 3, 3))
