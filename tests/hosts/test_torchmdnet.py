"""The networks of TorchMD-Net: energies and forces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchmdnet")

from torchmdnet.models.model import create_model

import ace
from ace.testing import HostTests

ATOMS = 12
OPTIONS = {
    "embedding_dimension": 16,
    "num_layers": 2,
    "num_rbf": 8,
    "rbf_type": "expnorm",
    "trainable_rbf": False,
    "activation": "silu",
    "cutoff_lower": 0.0,
    "cutoff_upper": 5.0,
    "max_z": 20,
    "max_num_neighbors": 32,
    "neighbor_embedding": True,
    "aggr": "add",
    "attn_activation": "silu",
    "num_heads": 4,
    "distance_influence": "both",
    "equivariance_invariance_group": "O(3)",
    "atom_filter": -1,
    "prior_model": None,
    "output_model": "Scalar",
    "reduce_op": "add",
    "derivative": True,
    "precision": 32,
}


class Network(HostTests):
    forces = True
    kind: str

    def model(self):
        return create_model({**OPTIONS, "model": self.kind})

    def batch(self):
        """Atomic numbers, positions and the molecule of each atom."""
        generator = torch.Generator().manual_seed(0)
        z = torch.randint(1, 10, (ATOMS,), generator=generator)
        pos = 1.5 * torch.randn(ATOMS, 3, generator=generator)
        return z, pos, torch.arange(ATOMS) // (ATOMS // 2)

    def symmetries(self):
        return [
            (ace.E3(), {"inputs": {"pos": "position"}, "outputs": ("scalar", "vector")}),
            (ace.Permutations(), {"outputs": ("invariant", "scalar")}),
        ]


class TestEquivariantTransformer(Network):
    kind = "equivariant-transformer"


class TestTensorNet(Network):
    kind = "tensornet"


class TestGraphNetwork(Network):
    """Its features are invariant: the terms read the positions as well."""

    kind = "graph-network"


@pytest.mark.parametrize("host", [TestEquivariantTransformer, TestTensorNet, TestGraphNetwork])
def test_terms_run_on_molecules_of_another_size(host):
    relaxed = ace.relax(host().model(), example=host().batch())
    z, pos, batch = (tensor[: ATOMS // 2 - 1] for tensor in host().batch())
    energy, forces = relaxed(z, pos, batch)
    assert energy.shape == (1, 1)
    assert forces.shape == pos.shape
