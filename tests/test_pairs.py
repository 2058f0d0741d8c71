"""Every model on each of its tasks: equivariant as it is, not with its terms, then as if they had never been there."""

from __future__ import annotations

import functools

import molecules
import pytest
import torch
from runs import cache  # noqa: F401

import ace
from ace.errors import ConstraintNotMet
from ace.probing import evaluating
from benchmarks.config import CHOICES, load_run
from benchmarks.methods import METHODS
from benchmarks.models import MODELS
from benchmarks.tasks import TASKS
from benchmarks.train import build_model, build_task

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # e3nn's, where a model is copied
]

PAIRS = [
    (task, model)
    for task, entry in TASKS.items()
    for model in dict.fromkeys((*entry.models, *(name for name, found in MODELS.items() if task in found.tasks)))
]
SAMPLES = 4
FEW = {"nbody-gravity": {"particles": 8, "neighbours": 3}, "modelnet10": {"points": 20}, "modelnet40": {"points": 20}}
"""Options that make the samples of a task small."""
SMALL = {
    **molecules.SMALL,
    "egnn": {"hidden": 8, "layers": 2},
    "segnn": {"features": 8, "layers": 2},
    "egno": {"hidden": 8, "layers": 2},
    "vn-pointnet": {"width": 3, "k": 4},
    "vn-dgcnn": {"width": 3, "k": 4, "layers": 2},
    "se3-transformer": {"width": 4, "k": 4, "layers": 1},
    "c8cnn": {"fields": 2, "hidden": 8},
    "c4cnn": {"fields": 2, "layers": 3},
    "cnn": {"width": 4, "layers": 3},
}
"""Options that make a model small; one that is not here is tested in its usual size."""
EXACT = {"mace": 1e-10, "se3-transformer": 1e-8, "equiformer": 1e-6, "c8cnn": 1e-7, "c4cnn": 1e-7}
"""Largest equivariance error in float64 where it is not 1e-10; see docs/benchmarks.md."""
UNEQUIVARIANT = {"cnn"}


def words(task, model):
    """The samples of a task by three and its model small."""
    fields = CHOICES["task"][task].model_fields
    sizes = {split: SAMPLES for split in ("train", "valid", "test") if split in fields}
    sizes = {split: count for split, count in sizes.items() if not isinstance(fields[split].default, str)}
    chosen = {"task": sizes | FEW.get(task, {}), "model": SMALL.get(model, {})}
    return [f"model={model}", *(f"{part}.{key}={x}" for part, options in chosen.items() for key, x in options.items())]


@functools.cache
def task_of(name, proper):
    """The task of a run, once for all models that have its group."""
    model = next(model for task, model in PAIRS if task == name and MODELS[model].proper == proper)
    return build_task(load_run(name, [*words(name, model), "method=strict"]))


def pairs():
    """The pairs; what packages warn of is theirs."""
    ignored = pytest.mark.filterwarnings("ignore")
    return [pytest.param(*pair, id="-".join(pair), marks=ignored if MODELS[pair[1]].package else ()) for pair in PAIRS]


@torch.no_grad()
def shake(module):
    """Move weights away from where they start: a block that starts at zero, or almost, would hide an error."""
    for weight in module.parameters():
        weight += 0.1 * torch.randn_like(weight)


def test_every_model_runs_on_a_task():
    assert {model for _, model in PAIRS} == set(MODELS)


@pytest.mark.parametrize(("name", "model_name"), pairs())
def test_terms_break_the_symmetry_and_leave_without_a_trace(name, model_name):
    entry = MODELS[model_name]
    available, how = TASKS[name].available()
    if not available:
        pytest.skip(how)
    if not entry.installed:
        pytest.skip(f"{entry.package} is not installed here")
    method = "unconstrained" if entry.layers else "strict"
    config = load_run(name, [*words(name, model_name), f"method={method}"])
    task = task_of(name, entry.proper)
    model = build_model(config, task)
    inputs = next(task.batches("test", 3)).inputs

    def error():
        types = {"inputs": task.input_types, "outputs": task.output_type}
        return float(ace.equivariance_error(model, inputs, task.group, **types, elements=4, dtype=torch.float64))

    def outputs():
        with evaluating(model):
            found = model(**inputs)
        return found if isinstance(found, dict) else {"": found}

    shake(model)
    if model_name in UNEQUIVARIANT:
        assert error() > 1e-2
        assert not entry.layers
        return
    exact = EXACT.get(model_name, 1e-10)
    assert error() < exact
    plain, kinds = outputs(), [type(module) for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    assert METHODS[method](config, model, task).model is model
    terms = ace.relaxations(model)
    assert len(terms) == sum(kind.__name__ in entry.layers for kind in kinds)
    assert {relaxation.gamma.item() for relaxation in terms.values()} == {1}
    for relaxation in terms.values():
        shake(relaxation.term)
    assert error() > 1e-2
    for path, relaxation in terms.items():
        for other in terms.values():
            other.gamma.data.fill_(other is relaxation)
        assert error() > 1e-4, path  # this term alone

    with pytest.warns(ConstraintNotMet):
        assert ace.restore(model) is model
    assert [type(module) for module in model.modules()] == kinds
    after, restored = model.state_dict(), outputs()
    assert list(after) == list(weights)
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    assert restored.keys() == plain.keys()
    assert all(torch.equal(restored[key], value) for key, value in plain.items())
    assert error() < exact
