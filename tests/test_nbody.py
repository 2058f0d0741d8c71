"""The charged n-body task: simulator against a slow one, its symmetries, its statistics, its cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import mse_loss

from ace.errors import ConfigError, DataError
from ace.groups import E3
from benchmarks.models import MODELS
from benchmarks.tasks import TASKS
from benchmarks.tasks.nbody import INPUT_STEP, TARGET_STEP, NBody, initial_state, simulate

both_clips = pytest.mark.parametrize("clip", ["component", "norm"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ACE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def task(cache):
    return NBody(train=40, valid=7, test=130)


def slow_simulation(x, v, c, steps, clip):
    """One simulation, particle by particle and coordinate by coordinate, without NumPy."""
    x, v = [list(p) for p in x], [list(p) for p in v]
    for _ in range(steps):
        forces = []
        for i in range(len(x)):
            force = [0.0, 0.0, 0.0]
            for j in range(len(x)):
                if i != j:
                    distance = math.dist(x[i], x[j])
                    for k in range(3):
                        force[k] += c[i] * c[j] * (x[i][k] - x[j][k]) / distance**3
            if clip == "component":
                force = [min(max(f, -100.0), 100.0) for f in force]
            elif math.hypot(*force) > 100:
                force = [100 * f / math.hypot(*force) for f in force]
            forces.append(force)
        for i, force in enumerate(forces):
            for k in range(3):
                v[i][k] += 0.001 * force[k]
                x[i][k] += 0.001 * v[i][k]
    return np.array(x), np.array(v)


@both_clips
def test_simulator_is_the_slow_one(clip):
    x, v, c = initial_state(4, np.random.default_rng(1))
    x[0, 1] = x[0, 0] + [0.03, 0.02, 0.01]  # far above the bound on forces, for some steps
    positions, velocities = simulate(x, v, c, [1, 120], clip)
    for index in range(4):
        for frame, steps in enumerate((1, 120)):
            slow_x, slow_v = slow_simulation(x[index].tolist(), v[index].tolist(), c[index].tolist(), steps, clip)
            np.testing.assert_allclose(positions[frame, index], slow_x, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(velocities[frame, index], slow_v, rtol=1e-9, atol=1e-9)


def test_blocks_do_not_change_the_result(monkeypatch):
    x, v, c = initial_state(7, np.random.default_rng(2))
    whole = simulate(x, v, c, [50])
    monkeypatch.setattr("benchmarks.tasks.nbody.BLOCK", 3)
    np.testing.assert_allclose(simulate(x, v, c, [50]), whole, rtol=1e-12)


def test_a_run_can_be_continued_from_any_frame():
    x, v, c = initial_state(5, np.random.default_rng(3))
    (x1, x2), (v1, v2) = simulate(x, v, c, [100, 250])
    x_continued, v_continued = simulate(x1, v1, c, [150])
    np.testing.assert_array_equal(x_continued[0], x2)
    np.testing.assert_array_equal(v_continued[0], v2)


@both_clips
def test_forces_are_bounded(clip):
    """Two like charges almost on top of each other, off the axes."""
    x = np.array([[[0.0, 0, 0], [1e-3, 2e-3, 3e-3]]])
    _, v = simulate(x, np.zeros_like(x), np.ones((1, 2)), [1], clip)
    expected = [0.1, 0.1, 0.1] if clip == "component" else 0.1 * np.array([1, 2, 3]) / math.sqrt(14)
    np.testing.assert_allclose(v[0, 0, 1], expected)
    np.testing.assert_allclose(v[0, 0, 0], -v[0, 0, 1])


@given(seed=st.integers(0, 2**16), distance=st.floats(0.5, 2))
def test_two_like_charges_conserve_momentum_and_energy(seed, distance):
    """As long as forces stay below the bound; energy up to the error of order dt of the integrator."""
    generator = np.random.default_rng(seed)
    x, v = np.zeros((1, 2, 3)), 0.1 * generator.standard_normal((1, 2, 3))
    x[0, 1] = distance * np.array([2, -1, 2]) / 3
    (x_end,), (v_end,) = simulate(x, v, np.ones((1, 2)), [1000])

    def energy(x, v):
        return 0.5 * (v**2).sum() + 1 / np.linalg.norm(x[0, 0] - x[0, 1])

    np.testing.assert_allclose(v_end.sum(1), v.sum(1), atol=1e-12)
    np.testing.assert_allclose(energy(x_end, v_end), energy(x, v), rtol=5e-3)
    assert np.linalg.norm(x_end[0, 0] - x_end[0, 1]) > distance


@pytest.fixture(scope="module")
def inputs():
    """400 simulations at the input frame, by clip, and a rotation that mixes all axes."""
    x, v, c = initial_state(400, np.random.default_rng(4))
    rotation = E3().sample(1, seed=5)[0].matrix.numpy()
    states = {}
    for clip in ("component", "norm"):
        (x0, x1), (v0, _) = simulate(x, v, c, [INPUT_STEP, TARGET_STEP], clip)
        states[clip] = x0, v0, c, x1
    return states, rotation


def changed_by(matrix, state, clip):
    """Share of simulations whose target moves by more than 1e-3 when the system is turned and turned back."""
    x, v, c, target = state
    (turned,), _ = simulate(x @ matrix.T, v @ matrix.T, c, [TARGET_STEP - INPUT_STEP], clip)
    difference = np.abs(turned @ matrix - target).max((1, 2))
    return (difference > 1e-3).mean(), np.median(difference)


def test_bound_on_the_norm_commutes_with_rotations_but_for_chaos(inputs):
    states, rotation = inputs
    share, median = changed_by(rotation, states["norm"], "norm")
    assert median < 1e-11
    assert share < 0.02


def test_bound_on_components_does_not_commute_with_rotations(inputs):
    """Published data: 16 % of the simulations differ by more than 1e-3."""
    states, rotation = inputs
    share, median = changed_by(rotation, states["component"], "component")
    assert median < 1e-11  # where no force is clipped, nothing is broken
    assert 0.08 < share < 0.26


@both_clips
def test_both_bounds_commute_with_the_cube(inputs, clip):
    states, _ = inputs
    turn = np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
    share, median = changed_by(turn, states[clip], clip)
    assert median < 1e-11
    assert share < 0.02
    mirror = np.diag([-1.0, 1, -1])
    assert changed_by(mirror, states[clip], clip) == (0.0, 0.0)  # signs do not round


def test_statistics_are_the_published_ones():
    """Mean squared error of two predictors on the 7,000 published samples: 0.2671 and 0.1104."""
    count = 2500
    x, v, c = initial_state(count, np.random.default_rng(6))
    (x0, x1), (v0, _) = simulate(x, v, c, [INPUT_STEP, TARGET_STEP])
    for prediction, published in ((x0, 0.2671), (x0 + v0, 0.1104)):
        errors = ((prediction - x1) ** 2).mean((1, 2))
        spread = errors.std() * math.sqrt(1 / count + 1 / 7000)
        assert abs(errors.mean() - published) < 3 * spread
        assert spread < 0.05 * published  # else the comparison says nothing


def test_initial_states_have_the_stated_distributions():
    x, v, c = initial_state(4000, np.random.default_rng(7))
    np.testing.assert_allclose(np.linalg.norm(v, axis=-1), 0.5)
    assert np.abs(v.mean((0, 1))).max() < 0.01
    assert abs(x.std() - 1) < 0.02
    assert abs(c.mean()) < 0.03
    assert set(np.unique(c)) == {-1.0, 1.0}


def test_features(task):
    batch = next(task.batches("test", 3))
    inputs = batch.inputs
    assert [inputs[key].dtype for key in ("pos", "vel", "h", "edge_attr")] == [torch.float32] * 4
    assert inputs["batch"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    edges = inputs["edge_index"].T.tolist()
    assert sorted(edges) == [[5 * g + i, 5 * g + j] for g in range(3) for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(inputs["h"][:, 0], inputs["vel"].square().sum(1).sqrt())
    positions, velocities, charges = initial_state(130, np.random.default_rng([0, 2]))
    x, v = simulate(positions, velocities, charges, [INPUT_STEP, TARGET_STEP])
    for actual, expected in ((inputs["pos"], x[0]), (inputs["vel"], v[0]), (batch.target, x[1])):
        np.testing.assert_allclose(actual, expected[:3].reshape(15, 3), rtol=1e-6)
    flat = charges[:3].ravel()
    assert inputs["edge_attr"][:, 0].tolist() == [flat[i] * flat[j] for i, j in edges]


def test_batches_hold_each_sample_once(task):
    stored = torch.cat([batch.target for batch in task.batches("train", 16)])
    shuffled = [torch.cat([b.target for b in task.batches("train", 16, shuffle_seed=seed)]) for seed in (1, 1, 2)]
    assert [len(batch.target) for batch in task.batches("train", 16)] == [80, 80, 40]
    assert torch.equal(stored, task.splits["train"].target.flatten(0, 1))
    assert torch.equal(shuffled[0], shuffled[1])
    assert not torch.equal(shuffled[0], shuffled[2])
    for order in shuffled:
        assert not torch.equal(order, stored)
        assert torch.equal(order[:, 0].sort().values, stored[:, 0].sort().values)


@pytest.mark.parametrize("name", TASKS["nbody"].models)
def test_loss_and_evaluation_of_a_model(task, name):
    model = MODELS[name].build(**task.model_options(name))
    batch = next(task.batches("valid", 7))
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.shape == ()
    torch.testing.assert_close(loss.detach(), ((model(**batch.inputs) - batch.target) ** 2).mean().detach())
    # 130 samples are evaluated in batches of 100 and 30
    everything = next(task.batches("test", 130))
    expected = mse_loss(model(**everything.inputs), everything.target).item()
    assert task.evaluate(model, "test") == {"mse": pytest.approx(expected, rel=1e-5)}
    assert model.training
    assert task.evaluate(model.eval(), "test")
    assert not model.training


def test_transform_leaves_the_loss_of_an_equivariant_model_alone(task):
    model = MODELS["egnn"].build(**task.model_options("egnn"))
    batch = next(task.batches("train", 20))
    for element in task.group.sample(4, seed=8):
        moved = task.transform(batch, element)
        assert float((moved.inputs["pos"] - batch.inputs["pos"]).norm()) > 1
        assert torch.equal(moved.inputs["h"], batch.inputs["h"])
        torch.testing.assert_close(
            moved.inputs["vel"].double(), batch.inputs["vel"].double() @ element.matrix.T, rtol=1e-5, atol=1e-6
        )
        with torch.no_grad():
            torch.testing.assert_close(task.loss(model, moved), task.loss(model, batch), rtol=1e-4, atol=0)


def test_task_says_how_its_inputs_and_output_transform(task):
    assert set(task.example()) == set(task.input_types)
    assert len(task.example()["pos"]) == 20
    assert (task.output_type, task.metric) == ("position", "mse")


def test_a_split_depends_on_its_size_and_seed_only(cache, task):
    other = NBody(train=2, valid=7, test=1)
    assert torch.equal(other.splits["valid"].pos, task.splits["valid"].pos)
    assert not torch.equal(other.splits["train"].pos[0], other.splits["test"].pos[0])
    reseeded = NBody(train=2, valid=7, test=1, seed=1)
    assert not torch.equal(reseeded.splits["valid"].pos, task.splits["valid"].pos)
    isotropic = TASKS["nbody-iso"].factory(train=2, valid=7, test=1)
    assert (task.name, isotropic.name) == ("nbody", "nbody-iso")
    assert not torch.equal(isotropic.splits["valid"].pos, task.splits["valid"].pos)


def test_data_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    first = NBody(train=3, valid=1, test=1)
    monkeypatch.setattr("benchmarks.tasks.nbody.simulate", None)
    second = NBody(train=3, valid=1, test=1)
    assert torch.equal(first.splits["train"].target, second.splits["train"].target)


def test_damaged_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    NBody(train=3, valid=1, test=1)
    [path] = tmp_path.rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"\.npz cannot be read"):
        NBody(train=3, valid=1, test=1)
    path.unlink()
    NBody(train=3, valid=1, test=1)


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(ConfigError, match=r"train=0.*test=-1.*clip='box'"):
        NBody(train=0, test=-1, clip="box")


def test_availability():
    assert TASKS["nbody"].available() == (True, "")
