"""NequIP: energies and forces of molecules and of crystals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("nequip")

from ase.build import bulk, molecule
from e3nn import o3

import ace
from ace.probing import default_dtype
from ace.testing import HostTests
from benchmarks.speed.models import nequip_batch, nequip_model

CUTOFF = 3.5


@pytest.fixture(autouse=True, scope="module")
def _usual_dtype():
    with default_dtype():  # the library makes float64 the default
        yield


def potential(dtype="float64"):
    return nequip_model(
        model_dtype=dtype,
        r_max=CUTOFF,
        num_layers=2,
        num_features=8,
        radial_mlp_width=16,
        per_type_energy_shifts={"H": -0.5, "C": -1.0, "O": -1.5},
    )


def ethanol():
    """A molecule in a box, without which its stress is not finite."""
    return molecule("CH3CH2OH", vacuum=3.0)


def graph(atoms):
    """Atoms as the library's own pipeline gives them, in float64."""
    return nequip_batch(atoms, CUTOFF)


class Potential(HostTests):
    dtype = torch.float64
    forces = True
    unsupported = {"checkpointed_block": "a block that differentiates inside its forward pass hangs when recomputed"}

    def model(self):
        return potential()

    def batch(self):
        return (graph(ethanol()),)

    def symmetries(self):
        moved = {"pos": "position", "cell": "vector"}
        permuted = {
            **dict.fromkeys(("pos", "atom_types", "atomic_numbers"), "scalar"),
            **dict.fromkeys(("cell", "pbc", "edge_cell_shift"), "invariant"),
            "edge_index": "edge_index",
        }
        return [
            (ace.E3(), {"inputs": moved, "outputs": {"total_energy": "scalar", "forces": "vector"}}),
            (ace.Permutations(), {"inputs": permuted, "outputs": {"total_energy": "invariant", "forces": "scalar"}}),
        ]


class TestMolecule(Potential):
    pass


class TestCrystal(Potential):
    def batch(self):
        return (graph(bulk("C", cubic=True)),)


class TestSinglePrecision(Potential):
    """Features in float32; positions and energies stay in float64, as the library has it."""

    dtype = torch.float32

    def model(self):
        return potential("float32")


def test_default_terms_are_those_of_e3nn_on_the_atoms():
    model = potential()
    relaxed = ace.relax(model, example=(graph(ethanol()),))
    kinds = (o3.Linear, o3.FullyConnectedTensorProduct)
    known = {path for path, module in model.named_modules() if isinstance(module, kinds)}
    assert set(ace.relaxations(relaxed)) == known
