"""ModelNet: clouds from grids and meshes, what is drawn anew and what stays, and both vector-neuron models on it."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ace
from ace.errors import ConfigError, DataError
from ace.groups import SO3
from benchmarks import data, shapes
from benchmarks.config import load_run
from benchmarks.diagnose import Shuffled
from benchmarks.models import MODELS
from benchmarks.tasks import TASKS
from benchmarks.tasks.modelnet import ModelNet, centred, rotated
from benchmarks.train import CALIBRATION, build_model, build_task, run, shipped_model, training_batches

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
VECTORS = ("vn-pointnet", "vn-dgcnn")
every_vn = pytest.mark.parametrize("name", VECTORS)
needs_se3 = pytest.mark.skipif(
    not MODELS["se3-transformer"].installed, reason="se3-transformer-pytorch has an environment of its own"
)
every_model = pytest.mark.parametrize("name", [*VECTORS, pytest.param("se3-transformer", marks=needs_se3)])
SMALL = {
    "vn-pointnet": {"width": 3, "k": 4},
    "vn-dgcnn": {"width": 3, "k": 4, "layers": 2},
    "se3-transformer": {"width": 4, "k": 4, "layers": 1},
}
EXACT = {"vn-pointnet": 1e-10, "vn-dgcnn": 1e-10, "se3-transformer": 1e-8}
"""Largest equivariance error in float64."""
TINY = (
    "task.points=20",
    "task.valid=10",
    "model.width=3",
    "model.k=4",
    "steps=8",
    "batch_size=8",
    "eval_every=4",
    "log_every=1",
    "checkpoint_every=5",
)


def stand_in() -> dict[str, np.ndarray]:
    """Boxes in the raw format: ten classes that differ in their sides, 6 training and 3 test shapes of each."""
    generator, arrays = np.random.default_rng(0), {}
    for split, per_class in (("train", 6), ("test", 3)):
        grids = np.zeros((10 * per_class, 30, 30, 30), dtype=np.int32)
        label = np.arange(10).repeat(per_class)
        for grid, kind in zip(grids, label, strict=True):
            a, b, c = 3 + np.array([2 + kind, 14 - kind, 4 + 2 * (kind % 3)]) + generator.integers(0, 3, 3)
            grid[3:a, 3:b, 3:c] = 1
        arrays |= {f"X_{split}": grids, f"y_{split}": label}
    return arrays


@pytest.fixture(scope="module", autouse=True)
def _few_points():
    """Clouds of 64 points instead of 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.MOST_POINTS, 10, 64)
        yield


@pytest.fixture(scope="module")
def clouds():
    raw = stand_in()
    parts = (shapes._from_grids(raw[f"X_{split}"], raw[f"y_{split}"], split) for split in shapes.SPLITS)
    return {name: array for part in parts for name, array in part.items()}


@pytest.fixture
def made_up(clouds, tmp_path, monkeypatch):
    """The boxes in the place of ModelNet10."""
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(data.CHECKSUMS, "modelnet10_points", data.checksum(clouds))
    data.save_arrays(tmp_path / "cache" / shapes.FILES[10], clouds)
    return clouds


@pytest.fixture
def task(made_up):
    return ModelNet(10, points=20, valid=10)


def build(name, task, seed=0):
    torch.manual_seed(seed)
    return MODELS[name].build(**task.model_options(name), **SMALL[name])


def relaxed(name, task):
    layers = MODELS[name].layers
    model = build(name, task)
    return ace.relax(model, layers=lambda _, module: type(module).__name__ in layers, example=task.example())


# Clouds


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
@settings(max_examples=6)
def test_surface_points_are_the_farthest_each_time(seed, most):
    generator = np.random.default_rng(seed)
    grid = generator.random((4, 4, 3)) < generator.uniform(0.1, 0.9)
    grid[1, 1, 1] = True
    occupied = set(map(tuple, np.argwhere(grid).tolist()))
    faces = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    surface = [c for c in sorted(occupied) if any(tuple(np.add(c, f)) not in occupied for f in faces)]
    middle = np.mean(surface, 0)
    expected = [max(surface, key=lambda c: ((np.array(c) - middle) ** 2).sum())]
    while len(expected) < min(most, len(surface)):
        expected.append(max(surface, key=lambda c: min(((np.array(c) - np.array(e)) ** 2).sum() for e in expected)))
    expected = [expected[i % len(expected)] for i in range(most)]
    assert shapes.surface_points(grid, most).tolist() == [list(c) for c in expected]


def test_points_of_a_mesh_are_spread_by_area():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 3], [1, 0, 3]])
    triangles = np.array([[0, 1, 2], [0, 2, 3], [0, 1, 5], [0, 5, 4]])  # a floor of area 1 and a wall of area 3
    points = shapes.mesh_points(vertices, triangles, 4000, np.random.default_rng(0))
    floor = points[:, 2] == 0
    assert (points[~floor, 1] == 0).all()
    assert floor.mean() == pytest.approx(0.25, abs=0.03)
    for side in (points[floor, 0], points[floor, 1], points[~floor, 0], points[~floor, 2] / 3):
        counts = np.histogram(side, bins=4, range=(0, 1))[0]
        assert counts / counts.sum() == pytest.approx(np.full(4, 0.25), abs=0.06)


@pytest.mark.parametrize("content", [b"PLY", b"OFF\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n"])
def test_what_is_no_triangle_mesh_is_refused(content):
    with pytest.raises(ValueError, match=r"OFF|no triangles"):
        shapes.read_off(content)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Give files to the downloads without a network."""
    pooch = pytest.importorskip("pooch", reason="downloads need the extra 'bench'")
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    files = {}

    def retrieve(url, known_hash, path, fname, progressbar):
        if url not in files:
            raise OSError("no connection")
        (tmp_path / fname).write_bytes(files[url])
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    return files


def test_download_of_the_grids(served, clouds, monkeypatch, tmp_path):
    file = io.BytesIO()
    raw = stand_in()
    raw["X_train"] = np.concatenate([np.zeros_like(raw["X_train"][:1]), raw["X_train"]])  # an empty grid is left out
    raw["y_train"] = np.concatenate([[3], raw["y_train"]])
    np.savez(file, **raw)
    served[shapes.VOXELS] = file.getvalue()
    with pytest.raises(DataError, match="checksum"):
        shapes.download_modelnet10()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setitem(data.CHECKSUMS, "modelnet10_points", data.checksum(clouds))
    assert shapes.download_modelnet10() == tmp_path / "cache" / shapes.FILES[10]
    for name, array in shapes.load_shapes(10).items():
        np.testing.assert_array_equal(array, clouds[name])
    served[shapes.VOXELS] = b"<html>"
    with pytest.raises(DataError, match="not laid out as published"):
        shapes.download_modelnet10()
    served.clear()
    with pytest.raises(DataError, match="no connection"):
        shapes.download_modelnet10()


def test_download_of_the_meshes(served, monkeypatch):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("__MACOSX/ModelNet40/chair/train/._a.off", "nothing")
        for name in ("chair/train/a", "vase/train/b", "vase/test/c"):
            archive.writestr(f"ModelNet40/{name}.off", "OFF\n3 1 0\n0 0 0\n2 0 0\n0 2 0\n3 0 1 2\n")
    served[shapes.MESHES] = file.getvalue()
    with pytest.raises(DataError, match="SHA-256"):
        shapes.download_modelnet40()
    assert not TASKS["modelnet40"].available()[0]
    monkeypatch.setattr(shapes, "_sha256", lambda path: shapes.MESHES_SHA256)
    shapes.download_modelnet40()
    assert TASKS["modelnet40"].available() == (True, "")
    found = shapes.load_shapes(40)
    assert (found["train_label"].tolist(), found["test_label"].tolist()) == ([0, 1], [1])
    assert found["train_points"].shape == (2, 1024, 3)
    assert not np.array_equal(found["train_points"][0], found["train_points"][1])
    task = ModelNet(40, points=30, valid=1)
    assert task.name == "modelnet40"
    assert task.model_options("vn-dgcnn") == {"classes": 40}


# Task


def test_splits_share_no_shape_and_hold_all(made_up, task):
    assert [task.size(split) for split in ("train", "valid", "test")] == [50, 10, 30]
    one, other = ModelNet(10, points=20, valid=10, train=7), ModelNet(10, points=20, valid=10, seed=1)
    assert one.size("train") == 7
    torch.testing.assert_close(one.views["train"].points, task.views["train"].points[:7])
    assert not torch.equal(other.views["valid"].label, task.views["valid"].label)
    both = torch.cat([task.views["train"].label, task.views["valid"].label])
    assert both.bincount().tolist() == [6] * 10


def test_clouds_are_the_cells_up_to_half_a_cell(made_up, task):
    cells = torch.from_numpy(made_up["test_points"][:, :20]).float()
    found = task.views["test-aligned"].points
    for cloud, grid in zip(found, cells, strict=True):
        scale = (grid - grid.mean(0)).norm() / cloud.norm()
        error = (cloud * scale - (grid - grid.mean(0))).abs().max()
        assert 0.05 < error < 1.3  # ±0.5 each, the mean moved, and the scale
    torch.testing.assert_close(found.mean(1), torch.zeros(30, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1).amax(1), torch.ones(30))


def test_test_clouds_are_turned_each_by_its_own_and_always_alike(task):
    turned, aligned = task.views["test"].points, task.views["test-aligned"].points
    matrices = torch.linalg.lstsq(aligned, turned).solution
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(30, 3, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(30))
    assert (matrices[0] - matrices[1]).norm() > 0.1
    torch.testing.assert_close(task.views["test"].points, ModelNet(10, points=20, valid=10).views["test"].points)


@pytest.mark.parametrize("rotation", ["z", "none"])
def test_rotations_about_the_vertical_keep_heights(task, rotation):
    points = task.views["test-aligned"].points
    turned = rotated(points, rotation, seed=3)
    torch.testing.assert_close(turned[..., 2], points[..., 2])
    assert torch.equal(turned, points) == (rotation == "none")


@given(dropout=st.floats(0, 0.85), jitter=st.sampled_from([0.0, 0.05]), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10)
def test_training_clouds_are_degraded_anew_by_the_seed_alone(clouds, dropout, jitter, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.tasks.modelnet.load_shapes", lambda classes: clouds)
        task = ModelNet(10, points=20, valid=10, dropout=dropout, jitter=jitter, train_rotation="none")
    batch = next(task.batches("train", 5))
    state = torch.get_rng_state()
    found, again, other = (task.augment(batch, s) for s in (seed, seed, seed + 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.inputs["points"], again.inputs["points"])
    points, left = found.inputs["points"], max(1, round(20 * (1 - dropout)))
    assert points.shape == (5, left, 3)
    assert task.views["valid"].points.shape[1] == left
    drawn = left < 20 or jitter > 0
    assert torch.equal(points, other.inputs["points"]) != drawn
    assert torch.equal(found.target, batch.target)
    if jitter == 0:  # what is left is a part of the cloud, centred and scaled
        for cloud, whole in zip(points, batch.inputs["points"], strict=True):
            scale = torch.cdist(cloud, cloud).max() or torch.tensor(1.0)
            gaps = torch.cdist(cloud, cloud) / scale
            rows = _matching(gaps, torch.cdist(whole, whole))
            assert len(set(rows)) == left


def _matching(gaps, whole):
    """Rows of a cloud that have the distances, up to a common factor, of another in the same or any order."""
    if len(gaps) == 1:
        return [0]
    i, j = divmod(int(gaps.argmax()), len(gaps))
    for a, b in [divmod(int(index), len(whole)) for index in torch.argsort(whole.flatten(), descending=True)]:
        if a == b:
            continue
        scaled = gaps * whole[a, b]
        pairs = torch.stack([scaled[:, i], scaled[:, j]], 1)[:, None] - torch.stack([whole[:, a], whole[:, b]], 1)
        miss, rows = pairs.abs().amax(-1).min(1)
        if miss.max() < 1e-4:
            return rows.tolist()
    raise AssertionError("no part of the cloud has these distances")


def test_rotations_of_training_clouds(task):
    batch = next(task.batches("train", 6))
    moved = task.augment(batch, 5).inputs["points"]
    matrices = torch.linalg.lstsq(batch.inputs["points"], moved).solution
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(6, 3, 3), atol=1e-4, rtol=0)
    assert (matrices[0] - matrices[1]).norm() > 0.1


class Oracle(nn.Module):
    """Knows the class of each aligned cloud by heart, but for those it is to get wrong; 0 for all others."""

    def __init__(self, clouds, wrong):
        super().__init__()
        self.points, self.label = clouds.points, clouds.label.clone()
        self.label[wrong] = (self.label[wrong] + 1) % 10

    def forward(self, points):
        same = (points[:, None] - self.points).abs().amax((-1, -2)) < 1e-6
        return (
            nn.functional.one_hot(same.int().argmax(1).where(same.any(1), -1) + 1, len(self.label) + 1)[:, 1:].float()
            @ nn.functional.one_hot(self.label, 10).float()
        )


def test_metrics_of_clouds_and_of_classes(made_up):
    task = ModelNet(10, points=20, valid=10)
    clouds = task.views["test-aligned"]
    clouds = type(clouds)(clouds.points[:23], clouds.label[:23])  # classes 0 to 6 have 3 clouds, class 7 has 2
    task.views["test"] = task.views["test-aligned"] = clouds
    found = task.evaluate(Oracle(clouds, [0, 22]), "test")
    assert found["error"] == pytest.approx(2 / 23)
    assert found["accuracy"] == found["accuracy_aligned"] == pytest.approx(21 / 23)
    assert found["class_accuracy"] == pytest.approx((2 / 3 + 6 + 1 / 2) / 8)
    assert set(task.evaluate(Oracle(clouds, [0]), "valid")) == {"error", "accuracy", "class_accuracy"}


def test_aligned_clouds_are_told_from_rotated_ones(task):
    found = task.evaluate(Oracle(task.views["test-aligned"], []), "test")
    assert found["accuracy_aligned"] == 1
    assert found["accuracy"] == pytest.approx(0.1)  # all take the first class
    assert found["error"] == pytest.approx(0.9)


@pytest.mark.usefixtures("made_up")
def test_wrong_options_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        ModelNet(10, points=65, dropout=1.0, jitter=-1, train_rotation="x", valid=60)
    for word in ("points=65", "dropout=1.0", "jitter=-1", "train_rotation=x", "valid=60"):
        assert word in str(caught.value)


def test_unavailable_without_data(tmp_path, monkeypatch):
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    for name in ("modelnet10", "modelnet40"):
        available, message = TASKS[name].available()
        assert not available
        assert f"ace data {name}" in message
        with pytest.raises(DataError, match=f"ace data {name}"):
            TASKS[name].factory()


def test_a_cloud_of_one_place_has_no_radius():
    assert centred(torch.ones(2, 3, 3)).tolist() == torch.zeros(2, 3, 3).tolist()


# Models


@every_model
def test_models_are_invariant_before_and_after(name, task):
    plain, batch = build(name, task).eval(), next(task.batches("valid", 6))
    inputs = {"points": batch.inputs["points"].double()}
    before = plain(**batch.inputs)

    def error(model):
        types = {"inputs": task.input_types, "outputs": task.output_type}
        return ace.equivariance_error(model, inputs, SO3(), dtype=torch.float64, **types).max

    assert error(plain) < EXACT[name]
    model = relaxed(name, task).eval()
    attached = ace.relaxations(model)
    assert len(attached) == sum(type(m).__name__ in MODELS[name].layers for m in plain.modules())
    assert error(model) > 1e-3
    for relaxation in attached.values():
        relaxation.retire()
    assert error(ace.restore(model)) < EXACT[name]
    assert torch.equal(model(**batch.inputs), before)
    assert model.state_dict().keys() == plain.state_dict().keys()


@every_vn
def test_a_term_between_the_named_representations_breaks_nothing(name, task):
    """The irreps of the entry are those of the features that a term reads and writes, in their order."""
    from e3nn import o3

    model, entry = relaxed(name, task).double().eval(), MODELS[name]
    inputs = {"points": task.example()["points"].double()}
    plain = {"inputs": task.input_types, "outputs": task.output_type}
    for path, relaxation in ace.relaxations(model).items():
        layer, dense = model.get_submodule(path), relaxation.term.map
        linear = o3.Linear(entry.read_types(layer), entry.write_types(layer)).double()
        with torch.no_grad():
            dense.weight.copy_(linear(torch.eye(dense.in_features, dtype=torch.float64)).T)
            dense.bias.zero_()
    assert ace.equivariance_error(model, inputs, SO3(), **plain).max < 1e-8
    assert ace.projection_gap(model, inputs) > 1e-3


@every_model
def test_transforming_a_batch_turns_its_clouds_and_keeps_the_classes(name, task):
    model, batch = build(name, task).double().eval(), next(task.batches("valid", 4))
    batch = type(batch)({"points": batch.inputs["points"].double()}, batch.target)
    for elements in (task.group.sample(1, seed=1), task.group.sample(4, seed=1)):
        moved = task.transform(batch, *elements)
        matrices = torch.stack([element.matrix for element in elements])
        torch.testing.assert_close(moved.inputs["points"], batch.inputs["points"] @ matrices.mT)
        assert torch.equal(moved.target, batch.target)
        torch.testing.assert_close(task.loss(model, moved), task.loss(model, batch))


# Runs


def configured(*words):
    return load_run("modelnet10", (*TINY, *words))


@pytest.mark.usefixtures("made_up")
def test_batches_are_drawn_anew_in_each_step_and_alike_from_any_start():
    config = configured("task.dropout=0.3", "task.jitter=0.02")
    task = build_task(config)
    straight = training_batches(config, task)
    seen = [next(straight)[1].inputs["points"] for _ in range(9)]  # an epoch has 7
    for start in (0, 3, 8):
        assert torch.equal(next(training_batches(config, task, start))[1].inputs["points"], seen[start])
    kept = next(task.batches("train", 8))
    assert not torch.equal(*(task.augment(kept, seed).inputs["points"] for seed in (0, 1)))


@pytest.mark.usefixtures("made_up")
def test_a_diagnosis_trains_on_clouds_drawn_anew_too():
    task = ModelNet(10, points=20, valid=10, dropout=0.5)
    torch.manual_seed(0)
    first, second, again = (next(iter(Shuffled(task, 50))) for _ in range(3))
    assert first.inputs["points"].shape == (50, 10, 3)
    assert not torch.equal(first.inputs["points"].sort(0).values, second.inputs["points"].sort(0).values)
    assert not torch.equal(second.inputs["points"], again.inputs["points"])
    torch.manual_seed(0)
    assert torch.equal(next(iter(Shuffled(task, 50))).inputs["points"], first.inputs["points"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vn-pointnet", "ace"),
        ("vn-pointnet", "cr"),
        pytest.param("se3-transformer", "ace", marks=needs_se3),
    ],
)
@pytest.mark.usefixtures("made_up")
def test_a_killed_run_resumes_bitwise(tmp_path, name, method):
    config = configured(f"model={name}", f"method={method}", "task.dropout=0.5", "task.jitter=0.02")

    def stop(step):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        run(config, tmp_path / "killed", stop)
    resumed, straight = run(config, tmp_path / "killed"), run(config, tmp_path / "straight")
    assert (tmp_path / "killed/history.csv").read_bytes() == (tmp_path / "straight/history.csv").read_bytes()
    measured = [key for key in straight if key.startswith(("test", "valid", "equivariance", "final"))]
    assert {key: resumed[key] for key in measured} == {key: straight[key] for key in measured}
    assert 0 <= straight["test_class_accuracy_aligned"] <= 1
    assert straight["test_accuracy"] == pytest.approx(1 - straight["test_shipped"])
    assert straight["equivariance_error_float64"] < EXACT[name]


# Statistics of BatchNorm


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


@every_vn
def test_statistics_are_those_of_the_restored_model(name, task):
    """Evaluated with its terms off and shipped without them, a model has the statistics of its plain forward pass."""
    model = relaxed(name, task).train()
    batches = [task.augment(batch, 7) for batch in task.batches("train", 10)]
    for batch in batches:
        model(**batch.inputs)
    stale = statistics(model)
    inputs = next(task.batches("valid", 5)).inputs
    with ace.restored(model, recalibrate=(batch.inputs for batch in batches)):
        fresh, scores = statistics(model), model.eval()(**inputs)
        model.train()
        assert all(relaxation.gamma == 0 for relaxation in ace.relaxations(model).values())
    assert all(torch.equal(stale[key], value) for key, value in statistics(model).items())
    assert all(relaxation.gamma == 1 for relaxation in ace.relaxations(model).values())
    plain = build(name, task).train()
    momentum = {norm: norm.momentum for norm in plain.modules() if isinstance(norm, nn.BatchNorm1d)}
    for norm in momentum:
        norm.momentum = None  # PyTorch's word for the plain average
    for batch in batches:
        plain(**batch.inputs)
    expected = statistics(plain)
    for key in expected:
        if "running" in key:
            torch.testing.assert_close(fresh[key], expected[key], rtol=1e-4, atol=1e-6)
    means = [key for key in expected if "mean" in key]
    assert max(float((stale[key] - expected[key]).norm() / expected[key].norm()) for key in means) > 0.05
    with pytest.warns(ace.errors.ConstraintNotMet):
        shipped = ace.restore(model, recalibrate=[batch.inputs for batch in batches])
    assert torch.equal(shipped.eval()(**inputs), scores)


@pytest.mark.usefixtures("made_up")
def test_a_run_ships_the_model_that_it_measured(tmp_path, monkeypatch):
    taken = []
    original = ace.relaxation._recalibrate

    def watched(model, batches):
        batches = list(batches)
        taken.append(torch.cat([batch["points"].flatten() for batch in batches]))
        original(model, batches)

    monkeypatch.setattr(ace.relaxation, "_recalibrate", watched)
    config = configured("method=ace-paper", "steps=4")
    summary = run(config, tmp_path)
    assert summary["max_gamma"] > 0.5
    assert summary["test_shipped"] == summary["test_restored"]
    assert len(taken) == 2  # at the evaluation, and for shipping
    assert all(torch.equal(one, taken[0]) for one in taken)
    batches = training_batches(config, build_task(config))
    first = torch.cat([next(batches)[1].inputs["points"].flatten() for _ in range(CALIBRATION)])
    assert torch.equal(taken[0], first)
    shipped, task = shipped_model(tmp_path)
    assert task.evaluate(shipped, "test")["error"] == summary["test_restored"]


# Real data


@pytest.mark.data
@real_data
def test_real_data_have_the_official_sizes():
    entry = TASKS["modelnet10"]
    assert entry.available() == (True, "")
    task = entry.factory(points=40)
    assert [task.size(split) for split in ("train", "valid", "test")] == [3584, 400, 907]
    assert task.views["test"].label.bincount().tolist() == [50, 100, 100, 85, 86, 100, 86, 100, 100, 100]
    both = torch.cat([task.views["train"].label, task.views["valid"].label])
    assert both.bincount().tolist() == [101, 515, 889, 200, 200, 465, 200, 680, 391, 343]


@pytest.mark.data
@real_data
def test_the_real_clouds_are_those_that_the_download_makes(monkeypatch):
    monkeypatch.setitem(shapes.MOST_POINTS, 10, 512)
    stored = shapes.load_shapes(10)
    folder = os.environ["ACE_DATA"]
    with np.load(f"{folder}/modelnet10/modelnet10_voxels24.npz") as voxels:
        grids = np.unpackbits(voxels["test_bits"][::30], axis=1).reshape(-1, 24, 24, 24)
        found = shapes._from_grids(np.pad(grids, ((0, 0), *[(3, 3)] * 3)), voxels["test_label"][::30], "test")
    np.testing.assert_array_equal(found["test_points"], stored["test_points"][::30])
    np.testing.assert_array_equal(found["test_label"], stored["test_label"][::30])


@pytest.mark.data
@real_data
@every_model
def test_models_are_invariant_on_real_clouds(name):
    config = load_run("modelnet10", [f"model={name}", "task.points=64"])
    task = build_task(config)
    model = build_model(config, task).eval()
    types = {"inputs": task.input_types, "outputs": task.output_type}
    inputs = next(task.batches("test", 8)).inputs
    assert ace.equivariance_error(model, inputs, SO3(), dtype=torch.float64, elements=3, **types).max < EXACT[name]
