"""The potentials of SchNetPack: energies and forces."""

from __future__ import annotations

import typing

import pytest
import torch
from torch.utils.data import dataloader

if not hasattr(dataloader, "T_co"):
    dataloader.T_co = typing.TypeVar(
        "T_co", covariant=True
    )  # SchNetPack 2.1.1 imports it; newer torch has it elsewhere
pytest.importorskip("schnetpack")

from ase.build import molecule
from schnetpack import atomistic, interfaces, model, nn, representation, transform

import ace
from ace.testing import HostTests

CUTOFF = 4.0
WIDTH = 16


def graph(formula):
    """A molecule as the library's converter gives it."""
    atoms = molecule(formula)
    atoms.rattle(0.05, seed=0)
    neighbours = transform.ASENeighborList(cutoff=CUTOFF)
    return interfaces.AtomsConverter(neighbor_list=neighbours, dtype=torch.float32)(atoms)


class Potential(HostTests):
    forces = True

    def representation(self):
        raise NotImplementedError

    def model(self):
        return model.NeuralNetworkPotential(
            representation=self.representation(),
            input_modules=[atomistic.PairwiseDistances()],
            output_modules=[atomistic.Atomwise(n_in=WIDTH, output_key="energy"), atomistic.Forces()],
        )

    def batch(self):
        return (graph("CH3CH2OH"),)

    def symmetries(self):
        edges = ("_idx_i", "_idx_j", "_idx_i_local", "_idx_j_local")
        atoms = {"_positions": "scalar", "_atomic_numbers": "scalar", "_idx_m": "scalar"}
        others = dict.fromkeys(("_n_atoms", "_cell", "_pbc", "_idx", "_offsets"), "invariant")
        permuted = {**dict.fromkeys(edges, "edge_index"), **atoms, **others}
        return [
            (
                ace.E3(),
                {
                    "inputs": {"_positions": "position", "_cell": "vector", "_offsets": "vector"},
                    "outputs": {"energy": "scalar", "forces": "vector"},
                },
            ),
            (ace.Permutations(), {"inputs": permuted, "outputs": {"energy": "invariant", "forces": "scalar"}}),
        ]


def radial():
    return {"radial_basis": nn.GaussianRBF(n_rbf=12, cutoff=CUTOFF), "cutoff_fn": nn.CosineCutoff(CUTOFF)}


class TestSchNet(Potential):
    """Its features are invariant: the terms read the positions as well."""

    def representation(self):
        return representation.SchNet(n_atom_basis=WIDTH, n_interactions=2, **radial())


class TestPaiNN(Potential):
    def representation(self):
        return representation.PaiNN(n_atom_basis=WIDTH, n_interactions=2, **radial())


class TestSO3net(Potential):
    def representation(self):
        return representation.SO3net(n_atom_basis=WIDTH, n_interactions=2, lmax=2, **radial())


@pytest.mark.parametrize("host", [TestSchNet, TestPaiNN, TestSO3net])
def test_terms_run_on_molecules_of_another_size(host):
    relaxed = ace.relax(host().model(), example=host().batch())
    assert relaxed(graph("CH3OH"))["forces"].shape == (6, 3)


@pytest.mark.parametrize(
    ("host", "blocks"),
    [
        (TestSchNet, ("interactions",)),
        (TestPaiNN, ("interactions", "mixing")),
        (TestSO3net, ("so3convs", "gatings")),
    ],
)
def test_default_terms_are_those_of_the_blocks(host, blocks):
    relaxed = ace.relax(host().model(), example=host().batch())
    assert list(ace.relaxations(relaxed)) == [f"representation.{name}.{index}" for name in blocks for index in range(2)]
