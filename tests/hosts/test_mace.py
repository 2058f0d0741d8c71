"""MACE: energies and forces, its own batches, its own way to TorchScript."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("mace")  # before e3nn: it lets e3nn 0.4.4 load its constants

from e3nn import o3
from e3nn.util import jit
from mace import modules

import ace
from ace.testing import HostTests
from benchmarks.models.mace import mace_model
from benchmarks.speed.models import ELEMENTS, mace_batch

CUTOFF = 3.0


def scale_shift_mace():
    return mace_model(
        list(ELEMENTS.values()),
        r_max=CUTOFF,
        num_bessel=6,
        max_ell=2,
        interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
        hidden_irreps=o3.Irreps("8x0e+8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        atomic_energies=np.array([-0.5, -1.0, -1.5]),
        correlation=2,
    )


def two_molecules():
    """Ethanol and methanol as the library's loader gives them, labels included."""
    return mace_batch(["CH3CH2OH", "CH3OH"], CUTOFF)


class TestScaleShiftMACE(HostTests):
    forces = True

    def model(self):
        return scale_shift_mace()

    def batch(self):
        return {"data": two_molecules(), "training": True}  # without it the forces have no gradient

    def symmetries(self):
        outputs = {"energy": "scalar", "interaction_energy": "scalar", "node_energy": "scalar", "forces": "vector"}
        of_atoms = dict.fromkeys(("positions", "node_attrs", "batch", "charges", "forces"), "scalar")
        others = dict.fromkeys(set(two_molecules()) - set(of_atoms), "invariant")
        permuted = {**dict.fromkeys(outputs, "invariant"), "node_energy": "scalar", "forces": "scalar"}
        return [
            (ace.E3(), {"inputs": {"positions": "position", "cell": "vector", "shifts": "vector"}, "outputs": outputs}),
            (ace.Permutations(), {"inputs": {**others, **of_atoms, "edge_index": "edge_index"}, "outputs": permuted}),
        ]


def test_default_terms_are_those_of_e3nn_on_the_atoms():
    model, batch = scale_shift_mace(), {"data": two_molecules(), "training": True}
    relaxed = ace.relax(model, example=batch)
    known = {path for path, module in model.named_modules() if isinstance(module, o3.Linear | o3.TensorProduct)}
    on_edges = {"interactions.0.conv_tp", "interactions.1.conv_tp"}
    assert set(ace.relaxations(relaxed)) == known - on_edges


def test_restored_model_can_be_scripted():
    model, batch = scale_shift_mace(), two_molecules()
    plain = jit.compile(copy.deepcopy(model))(batch)
    relaxed = ace.relax(model, example={"data": batch, "training": True})
    for relaxation in ace.relaxations(relaxed).values():
        relaxation.retire()
    scripted = jit.compile(ace.restore(relaxed))(batch)
    for key in ("energy", "forces"):
        assert torch.equal(scripted[key], plain[key])


def test_scripted_model_is_refused():
    scripted, batch = jit.compile(scale_shift_mace()), two_molecules()
    with pytest.raises(ace.errors.AceError, match="script"):
        ace.relax(scripted, example=(batch,))
