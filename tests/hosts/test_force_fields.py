"""The force fields of the benchmarks that come from packages, behind the arguments of the other models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("yaml", reason="the benchmarks need the extra 'bench'")

import molecules

import ace
from ace.errors import ConstraintNotMet
from ace.groups import Inversion
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.tasks import TASKS
from benchmarks.tasks.md import MolecularDynamics
from benchmarks.train import build_model, build_task, run

EXACT = {"nequip": 1e-12, "mace": 1e-9, "equiformer": 1e-5}
"""Largest equivariance error in float64: the last two have constants that are less precise."""


def each(*names):
    """Run a test for each of the models whose package is there."""
    there = []
    for name in names:
        absent = pytest.mark.skipif(not MODELS[name].installed, reason=f"{MODELS[name].package} is not installed here")
        there.append(pytest.param(name, marks=absent))
    return pytest.mark.parametrize("name", there)


def words(name, *further):
    small = [f"model.{key}={value}" for key, value in molecules.SMALL[name].items()]
    return [f"model={name}", "task.train=8", "steps=4", "eval_every=2", "batch_size=4", *small, *further]


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name].build(**molecules.SMALL[name])


@pytest.fixture(autouse=True)
def _made_up(tmp_path, monkeypatch):
    molecules.install(tmp_path, monkeypatch)


def task_of(name):
    return build_task(load_run("md", words(name)))


def test_all_are_tested():
    assert set(EXACT) == {name for name in TASKS["md"].models if MODELS[name].package}


@each(*EXACT)
def test_building_leaves_the_global_state_alone(name):
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, after = build(name, 3).state_dict(), torch.rand(2)
    second = build(name, 3).state_dict()
    assert torch.equal(torch.rand(2), after)
    assert torch.get_default_dtype() == torch.float32
    if name != "equiformer":  # its package checks types at random, which draws from Python's generator
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002
    assert all(torch.equal(first[key], second[key]) for key in first)
    third = MODELS[name].build(**molecules.SMALL[name]).state_dict()
    assert any(not torch.equal(first[key], third[key]) for key in first)


@each(*EXACT)
def test_equivariant_before_and_after(name):
    task, plain = task_of(name), build(name)
    torch.manual_seed(0)
    changed = molecules.relaxed(task, name)
    inputs = next(task.batches("test", 3)).inputs
    before = plain(**inputs)
    assert molecules.error(task, plain) < EXACT[name]
    assert molecules.error(task, changed) > 1e-3
    with pytest.warns(ConstraintNotMet):
        restored = ace.restore(changed)
    after = restored(**next(task.batches("test", 3)).inputs)
    assert all(torch.equal(after[key], before[key]) for key in before)


@each("nequip", "mace")
def test_forces_are_the_gradient_also_of_the_terms(name):
    task = MolecularDynamics()
    torch.manual_seed(0)
    changed = molecules.relaxed(task, name).double()
    inputs = next(task.batches("test", 3)).inputs
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


@each("equiformer")
def test_a_model_that_tells_reflections_apart_is_measured_on_rotations(name):
    task, model = task_of(name), build(name)
    with torch.no_grad():  # the blocks start at zero
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    assert (MolecularDynamics().group, task.group) == (ace.E3(), ace.SO3())
    assert molecules.error(task, model) < EXACT[name]
    task.group = Inversion()
    assert molecules.error(task, model) > 1e-3


@each("equiformer")
def test_molecules_of_different_sizes_are_refused(name):
    with pytest.raises(ValueError, match="molecules of 1 to 3 atoms"):
        build(name)(torch.tensor([8, 1, 1, 6]), torch.randn(4, 3), torch.tensor([0, 0, 0, 1]))


@pytest.mark.parametrize("method", ["strict", "ace", "ace-tolerance"])
@each(*EXACT)
def test_runs(tmp_path, name, method):
    summary = run(load_run("md", words(name, f"method={method}")), tmp_path / "run")
    assert 0 < summary["test_shipped"] < 1e6
    assert summary["test_energy_mae"] > 0
    assert summary["equivariance_error_float64"] < EXACT[name] or method == "ace-tolerance"


@each(*EXACT)
def test_restored_after_training(name):
    """Trained with its terms on and restored, a model is equivariant, and not what it was."""
    config = load_run("md", words(name))
    task = build_task(config)
    model = build_model(config, task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = MODELS[name].layers
    model = ace.relax(model, layers=lambda _, m: type(m).__name__ in layers, example=task.example())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in list(task.batches("train", 2))[:4]:
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert molecules.error(task, model) > 1e-3
    with pytest.warns(ConstraintNotMet):
        restored = ace.restore(model)
    assert restored.state_dict().keys() == before.keys()
    assert any(not torch.equal(before[key], value) for key, value in restored.state_dict().items())
    assert molecules.error(task, restored) < EXACT[name]
