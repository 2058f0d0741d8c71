"""The force field of the benchmarks that comes from a package: NequIP, behind the arguments of the other models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("nequip")
pytest.importorskip("yaml", reason="the benchmarks need the extra 'bench'")

import molecules

import ace
from ace.errors import ConstraintNotMet
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.tasks.md import MolecularDynamics
from benchmarks.train import run


@pytest.fixture
def task(tmp_path, monkeypatch):
    molecules.install(tmp_path, monkeypatch)
    return MolecularDynamics()


def test_building_leaves_the_global_state_alone():
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    torch.manual_seed(3)
    first = MODELS["nequip"].build(**molecules.SMALL["nequip"]).state_dict()
    after = torch.rand(2)
    torch.manual_seed(3)
    second = MODELS["nequip"].build(**molecules.SMALL["nequip"]).state_dict()
    assert torch.equal(torch.rand(2), after)
    assert torch.get_default_dtype() == torch.float32
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = MODELS["nequip"].build(**molecules.SMALL["nequip"]).state_dict()
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_forces_are_the_gradient_and_equivariant(task):
    torch.manual_seed(0)
    model = MODELS["nequip"].build(**molecules.SMALL["nequip"])
    torch.manual_seed(0)
    changed = molecules.relaxed(task, "nequip")
    inputs = next(task.batches("test", 3)).inputs
    plain = model(**inputs)
    assert molecules.error(task, model) < 1e-12
    assert molecules.error(task, changed) > 1e-3
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    pos = wide["pos"].detach()
    forces, step = changed(**{**wide, "pos": pos.clone()})["forces"], 1e-5
    for atom, axis in ((0, 0), (5, 1), (11, 2)):
        sides = []
        for sign in (1, -1):
            moved = pos.clone()
            moved[atom, axis] += sign * step
            sides.append(changed(**{**wide, "pos": moved})["energy"].sum().item())
        assert forces[atom, axis].item() == pytest.approx(-(sides[0] - sides[1]) / (2 * step), rel=1e-5, abs=1e-7)
    with pytest.warns(ConstraintNotMet):
        restored = ace.restore(changed)
    again = restored(**next(task.batches("test", 3)).inputs)
    assert all(torch.equal(again[key], plain[key]) for key in plain)


@pytest.mark.parametrize("method", ["strict", "ace", "ace-tolerance"])
@pytest.mark.usefixtures("task")
def test_runs(tmp_path, method):
    small = [f"model.{key}={value}" for key, value in molecules.SMALL["nequip"].items()]
    words = ["model=nequip", "task.train=8", "steps=4", "eval_every=2", "batch_size=4", f"method={method}", *small]
    summary = run(load_run("md", words), tmp_path / "run")
    assert 0 < summary["test_shipped"] < 1e6
    assert summary["test_energy_mae"] > 0
