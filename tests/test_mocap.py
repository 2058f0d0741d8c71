"""The motion capture task: samples against loops over the definition, baselines on the real data."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from ace.errors import ConfigError
from benchmarks import data
from benchmarks.models import MODELS
from benchmarks.motion import load_motion
from benchmarks.tasks import TASKS
from benchmarks.tasks.mocap import MotionCapture, skeleton_edges

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")

BONES = np.array([[1, 0], [2, 1], [3, 1], [4, 3]])


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A running subject with five joints and three trials; each split has one trial and three starts."""
    generator = np.random.default_rng(0)
    arrays = {
        "xyz": generator.standard_normal((120, 5, 3)).astype(np.float32),
        "trial_offset": np.array([0, 40, 78, 120]),
        "edges": BONES,
        "train_trial": np.array([2]),
        "train_start": np.array([[9, 0, 4]]),
        "val_trial": np.array([0]),
        "val_start": np.array([[1, 3, 2]]),
        "test_trial": np.array([1]),
        "test_start": np.array([[0, 5, 2]]),
    }
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    monkeypatch.setitem(data.CHECKSUMS, "run09", data.checksum(arrays))
    data.save_arrays(tmp_path / "mocap" / "run09.npz", arrays)
    return arrays


class Drift(nn.Module):
    """Constant velocity for a number of frames; one frame, or five with the last of them there."""

    def __init__(self, frames: float, steps: int | None = None) -> None:
        super().__init__()
        self.frames, self.steps = frames, steps

    def forward(self, pos, vel, h, edge_index, edge_attr, batch):
        if self.steps is None:
            return pos + self.frames * vel
        times = self.frames + torch.arange(1.0 - self.steps, 1.0)
        return pos[:, None] + times[:, None] * vel[:, None]


def slow_samples(arrays, stored, most):
    """Samples of one split as published, one number at a time."""
    edges = {tuple(edge) for edge in arrays["edges"].tolist()} | {(b, a) for a, b in arrays["edges"].tolist()}
    joints = arrays["xyz"].shape[1]
    near = dict.fromkeys(edges, 1)
    for i, k in edges:
        for middle, j in edges:
            if k == middle and i != j and (i, j) not in edges:
                near[i, j] = 2
    order = sorted(near)
    trials = arrays[f"{stored}_trial"].tolist()
    for trial, starts in zip(trials, arrays[f"{stored}_start"].tolist(), strict=True):
        first, end = arrays["trial_offset"][trial], arrays["trial_offset"][trial + 1]
        x = arrays["xyz"][first:end]
        v = x[1:] - x[:-1]
        for s in starts[: most // len(trials)]:
            h = [[np.linalg.norm(v[s, i]), x[s, i, 1] / 10] for i in range(joints)]
            edge_attr = [[near[i, j], ((x[s, i] - x[s, j]) ** 2).sum()] for i, j in order]
            yield order, x[s], v[s], h, edge_attr, np.stack([x[s + 30 + t - 5] for t in range(1, 6)], 1)


def assert_samples(task, arrays, split, stored, most):
    slow = list(slow_samples(arrays, stored, most))
    batches = list(task.batches(split, 1))
    assert len(slow) == len(batches) == task.size(split)
    for batch, (edges, *expected) in zip(batches, slow, strict=True):
        assert batch.inputs["edge_index"].T.tolist() == [list(edge) for edge in edges]
        actual = [*(batch.inputs[key] for key in ("pos", "vel", "h", "edge_attr")), batch.target]
        for value, reference in zip(actual, expected, strict=True):
            np.testing.assert_allclose(value, np.array(reference), rtol=2e-5, atol=1e-5)


def test_samples_are_the_definition(made_up):
    task = TASKS["mocap-run"].factory()
    for split, stored, most in (("train", "train", 200), ("valid", "val", 600), ("test", "test", 600)):
        assert_samples(task, made_up, split, stored, most)


def test_skeleton_edges():
    edge_index, hops = skeleton_edges(BONES)  # 0 - 1 - 2 and 1 - 3 - 4
    pairs = dict(zip(map(tuple, edge_index.T.tolist()), hops.tolist(), strict=True))
    one = {(0, 1), (1, 2), (1, 3), (3, 4)}
    two = {(0, 2), (0, 3), (2, 3), (1, 4)}
    assert pairs == {
        **{e: 1 for a, b in one for e in ((a, b), (b, a))},
        **{e: 2 for a, b in two for e in ((a, b), (b, a))},
    }


@pytest.mark.usefixtures("made_up")
def test_loss_and_metrics_of_one_and_of_five_frames():
    task = MotionCapture("run")
    batch = next(task.batches("test", 3))
    five, one = Drift(30, steps=5), Drift(30)
    predicted = five(**batch.inputs)
    torch.testing.assert_close(predicted[:, -1], one(**batch.inputs))
    last = mse_loss(predicted[:, -1], batch.target[:, -1])
    torch.testing.assert_close(task.loss(five, batch), mse_loss(predicted, batch.target))
    torch.testing.assert_close(task.loss(one, batch), last)
    expected = {"mse": pytest.approx(float(last)), "mse_all": pytest.approx(float(mse_loss(predicted, batch.target)))}
    assert task.evaluate(five, "test") == expected
    assert task.evaluate(one, "test") == {"mse": expected["mse"]}


@pytest.mark.usefixtures("made_up")
def test_the_group_moves_frames_and_leaves_the_height():
    task = MotionCapture("run")
    batch = next(task.batches("train", 3))
    [element] = task.group.sample(1, seed=1)
    moved = task.transform(batch, element)
    turned = batch.target.double() @ element.matrix.T + element.translation
    torch.testing.assert_close(moved.target.double(), turned, rtol=1e-5, atol=1e-5)
    assert torch.equal(moved.inputs["h"], batch.inputs["h"])
    torch.testing.assert_close(task.loss(Drift(30, 5), moved), task.loss(Drift(30, 5), batch), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("made_up")
def test_turned_samples_differ_by_a_turn_about_the_vertical_each():
    recorded, turned = (next(TASKS[name].factory().batches("valid", 2)) for name in ("mocap-run", "mocap-run-turned"))
    angles = []
    for sample in range(2):
        joints = recorded.inputs["batch"] == sample
        before, after = (
            torch.cat([batch.inputs["pos"][joints], batch.inputs["vel"][joints], *batch.target[joints].unbind(1)])
            for batch in (recorded, turned)
        )
        torch.testing.assert_close(after[:, 1], before[:, 1])
        plane = [torch.complex(x[:, 2], x[:, 0]) for x in (before, after)]
        turns = plane[1] / plane[0]
        torch.testing.assert_close(turns, turns[:1].expand_as(turns), rtol=1e-3, atol=1e-3)
        angles.append(float(turns[0].angle()))
    assert abs(angles[0] - angles[1]) > 0.01
    assert torch.equal(turned.inputs["h"], recorded.inputs["h"])


@pytest.mark.parametrize("name", TASKS["mocap-run"].models)
@pytest.mark.usefixtures("made_up")
def test_models_fit_the_task(name):
    task = MotionCapture("run")
    model = MODELS[name].build(**task.model_options(name))
    task.loss(model, next(task.batches("train", 2))).backward()
    assert task.evaluate(model, "valid")["mse"] > 0


def test_unknown_motion():
    with pytest.raises(ConfigError, match="'dance' is unknown"):
        MotionCapture("dance")


def test_unavailable_without_data(tmp_path, monkeypatch):
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    available, message = TASKS["mocap-run"].available()
    assert not available
    assert "ace data mocap" in message


@pytest.mark.data
@real_data
@pytest.mark.parametrize(
    ("motion", "sizes", "still", "drift"),
    [("run", (200, 240, 240), 89.8, 19.8), ("walk", (198, 600, 600), 12.89, 2.72)],
)
def test_real_data_have_the_published_sizes_and_baselines(motion, sizes, still, drift):
    """Error of no motion and of constant velocity at the last frame of the test split."""
    entry = TASKS[f"mocap-{motion}"]
    assert entry.available() == (True, "")
    task = entry.factory()
    assert tuple(task.size(split) for split in ("train", "valid", "test")) == sizes
    assert task.evaluate(Drift(0), "test")["mse"] == pytest.approx(still, rel=2e-3)
    assert task.evaluate(Drift(30), "test")["mse"] == pytest.approx(drift, rel=2e-3)
    assert task.edge_index.shape == (2, 130)
    assert int((task.splits["train"].edge_attr[0, :, 0] == 1).sum()) == 60
    feet_to_head = task.splits["train"].h[..., 1]
    assert -0.1 < float(feet_to_head.min()) < float(feet_to_head.max()) < 3.5


@pytest.mark.data
@real_data
@pytest.mark.parametrize("motion", ["run", "walk"])
def test_real_samples_are_the_definition(motion):
    task = MotionCapture(motion)
    arrays = load_motion({"run": "run09", "walk": "walk35"}[motion])
    assert_samples(task, arrays, "valid", "val", 600)


@pytest.mark.data
@real_data
def test_egno_learns_the_real_motions():
    task = MotionCapture("run")
    model = MODELS["egno"].build(**task.model_options("egno"), hidden=32, layers=2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(2):
        for batch in task.batches("train", 12, shuffle_seed=epoch):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    assert task.evaluate(model, "valid")["mse"] < 20.8  # constant velocity; no motion has 94.5
