"""The equivariant graph neural operator of PINA."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pina")

from pina.model import EquivariantGraphNeuralOperator
from torch_geometric.data import Data

import ace
from ace.testing import HostTests

NODES = 8


class TestEquivariantGraphNeuralOperator(HostTests):
    def model(self):
        return EquivariantGraphNeuralOperator(
            n_egno_layers=2, node_feature_dim=8, edge_feature_dim=2, pos_dim=3, modes=2, time_steps=4, hidden_dim=16
        )

    def batch(self):
        generator = torch.Generator().manual_seed(0)
        first = torch.arange(NODES).repeat_interleave(3)
        edge_index = torch.stack((first, (first + torch.arange(1, 4).repeat(NODES)) % NODES))
        return Data(
            x=torch.randn(NODES, 8, generator=generator),
            pos=torch.randn(NODES, 3, generator=generator),
            vel=torch.randn(NODES, 3, generator=generator),
            edge_index=edge_index,
            edge_attr=torch.randn(edge_index.shape[1], 2, generator=generator),
        )

    def symmetries(self):
        return [(ace.E3(), {"outputs": {"x": "scalar", "pos": "position", "vel": "vector"}})]
