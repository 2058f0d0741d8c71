"""Models of se3-transformer-pytorch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("se3_transformer_pytorch")

from se3_transformer_pytorch import SE3Transformer

import ace
from ace.testing import HostTests

NODES = 6


def points(features, nodes=NODES):
    """Features of a set of points, and coordinates."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, nodes, features, generator=generator), torch.randn(1, nodes, 3, generator=generator)


class TestScalars(HostTests):
    """Invariant features for each point."""

    def model(self):
        return SE3Transformer(dim=16, heads=2, dim_head=8, depth=2, num_degrees=2, num_neighbors=4)

    def batch(self):
        return (*points(16), torch.ones(1, NODES, dtype=torch.bool))

    def symmetries(self):
        inputs = {"feats": "scalar", "coors": "position", "mask": "invariant"}
        return [
            (ace.SO3(), {"inputs": inputs, "outputs": "scalar"}),
            (ace.Permutations(), {"inputs": {**inputs, "coors": "scalar"}, "outputs": "scalar"}),
        ]


class TestVectors(HostTests):
    """Scalars and vectors for each point, from scalars and vectors: no name says that those of key 1 are vectors."""

    relax_options = {"inputs": {"1": "vector"}}

    def model(self):
        return SE3Transformer(
            dim=16,
            dim_in=4,
            heads=2,
            dim_head=8,
            depth=1,
            input_degrees=2,
            num_degrees=2,
            output_degrees=2,
            reduce_dim_out=True,
            differentiable_coors=True,
        )

    def batch(self):
        scalars, coors = points(4)
        vectors = torch.randn(1, NODES, 4, 3, generator=torch.Generator().manual_seed(1))
        return {"feats": {"0": scalars[..., None], "1": vectors}, "coors": coors}

    def symmetries(self):
        inputs = {"0": "scalar", "1": "vector", "coors": "position"}
        return [(ace.SO3(), {"inputs": inputs, "outputs": {"0": "scalar", "1": "vector"}})]


def test_sets_of_another_size():
    """Every point has all others for neighbours: their number is not that of the example."""
    relaxed = ace.relax(SE3Transformer(dim=8, heads=2, dim_head=4, depth=1, num_degrees=2), example=points(8))
    assert relaxed(*points(8, NODES + 3)).shape == (1, NODES + 3, 8)
