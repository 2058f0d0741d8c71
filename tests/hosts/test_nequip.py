"""NequIP: energies and forces of molecules and of crystals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("nequip")

from ase.build import bulk, molecule
from e3nn import o3
from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
from nequip.model import NequIPGNNModel
from nequip.utils.global_state import set_global_state

import ace
from ace.testing import HostTests

CUTOFF = 3.5
TYPES = {"H": 0, "C": 1, "O": 2}
USUAL = torch.get_default_dtype()

set_global_state()  # the library asks for it; it makes float64 the default dtype, of its data too
torch.set_default_dtype(USUAL)


@pytest.fixture(autouse=True, scope="module")
def _default_dtype():
    yield
    torch.set_default_dtype(USUAL)


def potential(dtype="float64"):
    torch.set_default_dtype(torch.float64)
    return NequIPGNNModel(
        seed=0,
        model_dtype=dtype,
        r_max=CUTOFF,
        type_names=list(TYPES),
        num_layers=2,
        l_max=2,
        parity=True,
        num_features=8,
        radial_mlp_width=16,
        avg_num_neighbors=8.0,
        per_type_energy_scales=1.0,
        per_type_energy_shifts={"H": -0.5, "C": -1.0, "O": -1.5},
    )


def ethanol():
    """A molecule in a box, without which its stress is not finite."""
    return molecule("CH3CH2OH", vacuum=3.0)


def graph(atoms):
    """Atoms as the library's own pipeline gives them, in float64."""
    torch.set_default_dtype(torch.float64)
    atoms.rattle(0.05, seed=0)
    atomic_data = from_ase(atoms)
    atomic_data[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([TYPES[symbol] for symbol in atoms.symbols])
    return compute_neighborlist_(atomic_data, r_max=CUTOFF)


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
