"""Models of equiformer-pytorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("equiformer_pytorch")

from equiformer_pytorch import Equiformer

import ace
from ace.testing import HostTests

NODES = 6


def equiformer(**options):
    """A network of scalars and vectors."""
    return Equiformer(
        dim=(16, 8), dim_head=(8, 8), heads=(2, 2), depth=2, radial_hidden_dim=16, reduce_dim_out=True, **options
    )


def points(nodes=NODES):
    """Features of a set of points, coordinates, and which points are there."""
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(1, nodes, 16, generator=generator)
    return feats, torch.randn(1, nodes, 3, generator=generator), torch.ones(1, nodes, dtype=torch.bool)


class TestEquiformer(HostTests):
    def model(self):
        return equiformer(num_neighbors=4)

    def batch(self):
        return points()

    def symmetries(self):
        inputs = {"inputs": "scalar", "coors": "position", "mask": "invariant"}
        return [
            (ace.SO3(), {"inputs": inputs, "outputs": ("scalar", "vector")}),
            (ace.Permutations(), {"inputs": {**inputs, "coors": "scalar"}, "outputs": (None, "scalar")}),
        ]


def test_sets_of_another_size():
    """Every point has all others for neighbours: their number is not that of the example."""
    relaxed = ace.relax(equiformer(), example=points())
    scalars, vectors = relaxed(*points(NODES + 3))
    assert (scalars.shape, vectors.shape) == ((1, NODES + 3), (1, NODES + 3, 3))
