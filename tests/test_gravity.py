"""The gravity task: simulator against a slow one, its symmetries and conserved quantities, its edges, its cache."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ace.errors import ConfigError, DataError
from ace.groups import E3
from benchmarks.tasks.gravity import INPUT_STEP, TARGET_STEP, Gravity, initial_state, nearest, simulate


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Gravity(train=12, valid=3, test=4, particles=7, neighbours=3)


def slow_simulation(x, v, steps):
    """One system, particle by particle and coordinate by coordinate, in the kick-drift-kick form."""
    x, v = [list(p) for p in x], [list(p) for p in v]

    def pull(i, k):
        return sum((x[j][k] - x[i][k]) / (math.dist(x[i], x[j]) ** 2 + 0.01) ** 1.5 for j in range(len(x)) if j != i)

    for _ in range(steps):
        for half in range(2):
            pulls = [[pull(i, k) for k in range(3)] for i in range(len(x))]
            for i in range(len(x)):
                for k in range(3):
                    v[i][k] += 0.0005 * pulls[i][k]
                    if half == 0:
                        x[i][k] += 0.001 * v[i][k]
    return np.array(x), np.array(v)


def test_simulator_is_the_slow_one():
    x, v = initial_state(3, 5, np.random.default_rng(1))
    x[0, 1] = x[0, 0] + [0.01, 0.0, 0.02]  # well inside the softening length
    positions, velocities = simulate(x, v, [1, 60])
    for index in range(3):
        for frame, steps in enumerate((1, 60)):
            slow_x, slow_v = slow_simulation(x[index], v[index], steps)
            np.testing.assert_allclose(positions[frame, index], slow_x, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(velocities[frame, index], slow_v, rtol=1e-9, atol=1e-9)


def test_blocks_and_frames_do_not_change_the_result(monkeypatch):
    x, v = initial_state(5, 6, np.random.default_rng(2))
    (x1, x2), (v1, v2) = simulate(x, v, [30, 80])
    np.testing.assert_allclose(simulate(x1, v1, [50]), ([x2], [v2]), rtol=1e-9, atol=1e-12)
    monkeypatch.setattr("benchmarks.tasks.gravity.BLOCK", 2)
    np.testing.assert_allclose(simulate(x, v, [80]), ([x2], [v2]), rtol=1e-12)


@given(seed=st.integers(0, 2**16))
def test_energy_and_momentum_are_conserved(seed):
    x, v = initial_state(1, 4, np.random.default_rng(seed))
    (x_end,), (v_end,) = simulate(x, v, [500])

    def energy(x, v):
        apart = np.sqrt(((x[0, :, None] - x[0, None]) ** 2).sum(-1) + 0.01)
        return 0.5 * (v**2).sum() - (1 / apart)[np.triu_indices(4, 1)].sum()

    np.testing.assert_allclose(v.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(v_end.sum(1), 0, atol=1e-11)
    np.testing.assert_allclose(x_end.mean(1), x.mean(1), atol=1e-11)
    scale = 0.5 * (v_end**2).sum() + abs(energy(x, v))
    assert abs(energy(x_end, v_end) - energy(x, v)) < 1e-4 * scale  # of second order: by Euler's method 1e-2


def test_system_is_symmetric_under_all_of_e3():
    x, v = initial_state(4, 6, np.random.default_rng(3))
    (there,), _ = simulate(x, v, [400])
    for element in E3().sample(3, seed=4):
        matrix, shift = element.matrix.numpy(), element.translation.numpy()
        (moved,), _ = simulate(x @ matrix.T + shift, v @ matrix.T, [400])
        np.testing.assert_allclose(moved, there @ matrix.T + shift, atol=1e-8)


def test_samples_are_the_stated_frames(task):
    x, v = initial_state(4, 7, np.random.default_rng([0, 2]))
    positions, velocities = simulate(x, v, [INPUT_STEP, TARGET_STEP])
    [batch] = task.batches("test", 4)
    for found, expected in ((batch.inputs["pos"], positions[0]), (batch.inputs["vel"], velocities[0])):
        np.testing.assert_allclose(found, expected.reshape(-1, 3), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.target, positions[1].reshape(-1, 3), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch.inputs["h"][:, 0], batch.inputs["vel"].square().sum(1).sqrt())
    assert (batch.inputs["edge_attr"] == 1).all()
    assert (INPUT_STEP, TARGET_STEP) == (3000, 4000)


def test_edges_come_from_the_nearest(task):
    """In a shuffled batch too: every particle hears those three of its own system that are nearest."""
    batch = next(task.batches("train", 5, shuffle_seed=1))
    pos, graph = batch.inputs["pos"], batch.inputs["batch"]
    found = {}
    for source, target in batch.inputs["edge_index"].T.tolist():
        found.setdefault(target, set()).add(source)
    for i in range(len(pos)):
        others = [j for j in range(len(pos)) if j != i and graph[j] == graph[i]]
        assert found[i] == set(sorted(others, key=lambda j: math.dist(pos[i], pos[j]))[:3])
    assert batch.inputs["edge_attr"].shape == (5 * 7 * 3, 1)


def test_edges_do_not_depend_on_the_frame_of_reference(task):
    pos = task.splits["train"].pos.double()
    [element] = task.group.sample(1, seed=6)
    turned = pos @ element.matrix.T + element.translation
    assert torch.equal(nearest(turned, 3).sort().values, nearest(pos, 3).sort().values)


def test_generated_once_and_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    sizes = {"train": 2, "valid": 1, "test": 1, "particles": 3, "neighbours": 2}
    first = Gravity(**sizes)
    assert torch.equal(Gravity(**{**sizes, "train": 1}).splits["valid"].pos, first.splits["valid"].pos)
    assert not torch.equal(Gravity(**sizes, seed=1).splits["valid"].pos, first.splits["valid"].pos)
    monkeypatch.setattr("benchmarks.tasks.gravity.simulate", None)
    assert torch.equal(Gravity(**sizes).splits["train"].target, first.splits["train"].target)
    for path in tmp_path.rglob("*.npz"):
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        Gravity(**sizes)


def test_wrong_options_are_reported_together():
    with pytest.raises(ConfigError, match=r"train=0.*neighbours=5: must be between 1 and 4"):
        Gravity(train=0, particles=5, neighbours=5)
