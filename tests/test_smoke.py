"""The smoke task: windows against loops, predictions against closed forms; its models, with and without symmetry."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ace
from ace.errors import AceError, ConfigError, ConstraintNotMet, DataError
from ace.groups import act
from benchmarks import data, train
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.regularizers import on_pixels
from benchmarks.tasks import TASKS
from benchmarks.tasks.smoke import ARRAYS, FILE, PACKAGES, Smoke, generate, load, simulate

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
needs_escnn = pytest.mark.skipif(find_spec("escnn") is None, reason="escnn has an environment of its own")
FIELDS = {"inputs": {"frames": "vector_image"}, "outputs": "vector_image"}
RUNS = [(0, 0), (6, 1), (2, 3)]  # i and side
SIDE = 6


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Three runs on 6 × 6 pixels; the second is not seen in training."""
    velocity = np.random.default_rng(0).standard_normal((3, 100, 2, SIDE, SIDE)).cumsum(1) / 5
    arrays = {
        "velocity": velocity.astype(np.float16),
        "strength_k": np.array([4 * i + j + 1 for i, j in RUNS]),
        "inflow_side": np.array([j for _, j in RUNS]),
    }
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    monkeypatch.setitem(data.CHECKSUMS, "smoke_rotation_phiflow", data.checksum(arrays))
    data.save_arrays(tmp_path / FILE, arrays)
    return arrays


class Growth(nn.Module):
    """The last frame times a factor; 1: nothing changes."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, frames):
        return self.factor * frames[:, -2:]


class Line(nn.Module):
    """Goes on as it went from the last frame but one to the last."""

    def forward(self, frames):
        return 2 * frames[:, -2:] - frames[:, -4:-2]


def windows(unrolled, horizon):
    """Run, first target frame and number of targets of every sample, by split."""
    seen, unseen = (0, 2), (1,)
    return {
        "train": [(run, first, unrolled) for run in seen for first in range(10, 60) if first + unrolled <= 60],
        "valid": [(run, 60, horizon) for run in seen],
        "test": [(run, 80, horizon) for run in seen],
        "domain": [(run, first, horizon) for run in unseen for first in (10, 30, 50, 70)],
    }


@pytest.mark.parametrize(("unrolled", "horizon"), [(6, 20), (1, 7)])
def test_samples_are_the_definition(made_up, unrolled, horizon):
    task = Smoke(unrolled, horizon)
    velocity = made_up["velocity"].astype(np.float64)
    scale = np.sqrt(np.mean([velocity[run, frame] ** 2 for run in (0, 2) for frame in range(60)]))
    for split, expected in windows(unrolled, horizon).items():
        found = list(task.batches(split, 1))
        assert len(found) == task.size(split) == len(expected)
        for batch, (run, first, steps) in zip(found, expected, strict=True):
            given = np.concatenate([velocity[run, frame] for frame in range(first - 10, first)])
            target = np.concatenate([velocity[run, frame] for frame in range(first, first + steps)])
            np.testing.assert_allclose(batch.inputs["frames"][0], given / scale, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(batch.target[0], target / scale, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("made_up")
def test_no_target_frame_is_in_two_splits():
    task, seen = Smoke(), {}
    for split, pairs in task.windows.items():
        for run, first in pairs.tolist():
            for frame in range(first, first + task.steps[split]):
                assert 10 <= frame < 100
                assert seen.setdefault((run, frame), split) == split
    assert set(seen.values()) == {"train", "valid", "test", "domain"}


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_rmse_is_that_of_frames_predicted_from_predictions(made_up, batch):
    """A straight line through the last two frames: k frames later it is k times the change away."""
    task = Smoke()
    task.evaluation_batch = batch
    velocity = made_up["velocity"].astype(np.float64)
    for split, samples in windows(6, 20).items():
        errors = []
        for run, first, steps in samples:
            last, change = velocity[run, first - 1], velocity[run, first - 1] - velocity[run, first - 2]
            errors += [((last + (k + 1) * change - velocity[run, first + k]) ** 2).mean() for k in range(steps)]
        assert task.evaluate(Line(), split) == {"rmse": pytest.approx(np.mean(errors) ** 0.5, rel=1e-4)}
    assert set(task.further_tests) < set(task.windows)


@pytest.mark.usefixtures("made_up")
def test_the_loss_reaches_through_all_frames():
    """Growth by a: the k-th frame is aᵏ times the last, and the loss has the derivative of a polynomial in a."""
    task, model = Smoke(unrolled=3), Growth(1.1)
    batch = next(task.batches("train", 4))
    last = batch.inputs["frames"][:, -2:].double()
    targets = batch.target.double().unflatten(1, (3, 2))
    a = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([(a ** (k + 1) * last - targets[:, k]).square().mean() for k in range(3)]).mean()
    expected.backward()
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert model.factor.grad.item() == pytest.approx(a.grad.item(), rel=1e-4)


@pytest.mark.usefixtures("made_up")
def test_a_part_of_the_training_samples():
    whole, few = Smoke(), Smoke(train=7)
    assert few.size("train") == 7
    assert {tuple(row) for row in few.windows["train"].tolist()} < {
        tuple(row) for row in whole.windows["train"].tolist()
    }
    assert few.scale == whole.scale
    assert torch.equal(few.windows["train"], Smoke(train=9).windows["train"][:7])


@pytest.mark.usefixtures("made_up")
def test_the_group_turns_pixels_and_components():
    """Under g, the value at g p is g times what was at p: pixel by pixel, p counted from the centre."""
    task = Smoke(unrolled=2)
    batch = next(task.batches("train", 4))
    elements = task.group.sample(4, seed=3)
    moved = task.transform(batch, *elements)
    half = (SIDE - 1) / 2
    for before, after in ((batch.inputs["frames"], moved.inputs["frames"]), (batch.target, moved.target)):
        for sample, element in enumerate(elements):
            plane = element.plane.round().numpy()
            for x in range(SIDE):
                for y in range(SIDE):
                    new_x, new_y = (plane @ [x - half, y - half] + half).round().astype(int)
                    pairs = before[sample, :, y, x].reshape(-1, 2).numpy() @ plane.T
                    np.testing.assert_allclose(after[sample, :, new_y, new_x], pairs.ravel(), atol=1e-6)
    for model in (Growth(1.2), Line()):  # equivariant
        torch.testing.assert_close(task.loss(model, moved), task.loss(model, batch))


@pytest.mark.usefixtures("made_up")
def test_impossible_options():
    with pytest.raises(ConfigError, match=r"unrolled=0: is from 1 to 50; horizon=21: is from 1 to 20"):
        Smoke(unrolled=0, horizon=21)
    with pytest.raises(ConfigError, match="train=91: there are 1 to 90"):
        Smoke(train=91)


def test_missing_and_altered_data(made_up, tmp_path, monkeypatch):
    entry = TASKS["smoke2d"]
    assert entry.available() == (True, "")
    made_up["velocity"][0, 0, 0, 0, 0] += 1
    data.save_arrays(tmp_path / FILE, made_up)
    with pytest.raises(DataError, match="does not hold the published numbers of smoke_rotation_phiflow"):
        entry.factory()
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "nowhere"))
    available, message = entry.available()
    assert not available
    assert f"`ace data smoke2d` does so (five minutes) after `python -m pip install {PACKAGES}`" in message


def test_without_phiflow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "phi", None)  # importing it raises ModuleNotFoundError
    with pytest.raises(DataError, match=f"phi is not installed: python -m pip install {PACKAGES}"):
        generate()
    assert not list(tmp_path.iterdir())


def build(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escnn, at import
        return MODELS[name].build(**options)


def test_the_plain_network_is_the_loop_and_has_no_symmetry():
    model = build("cnn", frames=2, width=5, layers=3)
    x = torch.randn(2, 4, 7, 7)
    first, second, third = (layer for layer in model.layers if isinstance(layer, nn.Conv2d))
    expected = x[:, -2:] + third(second(first(x).relu()).relu())
    assert torch.equal(model(x), expected)
    assert ace.equivariance_error(model, x, ace.Cyclic(4), **FIELDS).max > 1e-2
    with pytest.raises(AceError, match="no layer"):  # nothing in it is to be relaxed
        ace.relax(model, layers=lambda path, module: type(module).__name__ in MODELS["cnn"].layers, example=x)


@pytest.mark.usefixtures("made_up")
def test_a_run_of_the_plain_network(tmp_path):
    words = "model=cnn model.width=4 model.layers=2 method=strict steps=3 batch_size=4 eval_every=2 task.horizon=2"
    summary = train.run(load_run("smoke2d", words.split()), tmp_path)
    assert summary["status"] == "done"
    assert summary["domain_rmse"] > 0
    assert summary["equivariance_error"] > 1e-3
    task, model = Smoke(2, 2), build("cnn", width=4, layers=2)
    with torch.no_grad():
        model.layers[-1].weight.zero_()
        model.layers[-1].bias.zero_()
    assert task.evaluate(model, "test") == task.evaluate(Growth(), "test")


@needs_escnn
@settings(max_examples=10)
@given(frames=st.integers(1, 3), side=st.integers(3, 8), seed=st.integers(0, 99))
def test_the_steerable_network_is_equivariant(frames, side, seed):
    torch.manual_seed(seed)
    model = build("c4cnn", frames=frames, fields=2, layers=3)
    x = torch.randn(2, 2 * frames, side, side)
    with torch.no_grad():
        assert float((model(x) - x[:, -2:]).norm() / x[:, -2:].norm()) > 1e-2  # there is something to turn
    error = ace.equivariance_error(model, x, ace.Cyclic(4), elements=4, dtype=torch.float64, **FIELDS)
    assert error.max < 1e-6  # escnn keeps its kernels in float32


@needs_escnn
@pytest.mark.usefixtures("made_up")
def test_terms_learn_and_leave_the_model_as_it_was():
    task, model = Smoke(unrolled=2, horizon=2), build("c4cnn", fields=2, layers=3)
    example, [batch] = task.example(), task.batches("valid", 4)
    keys = list(model.state_dict())
    assert not any("filter" in key for key in keys)
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(**example)
    relaxed = ace.relax(
        model, example=example, layers=lambda path, module: type(module).__name__ in MODELS["c4cnn"].layers
    )
    assert len(ace.relaxations(relaxed)) == 3
    terms = [weights for relaxation in ace.relaxations(relaxed).values() for weights in relaxation.parameters()]
    optimizer = torch.optim.Adam(terms, 1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(task.loss(relaxed, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert ace.equivariance_error(relaxed, example, ace.Cyclic(4), **FIELDS).max > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        assert ace.restore(relaxed) is model
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model).eval()(**example), before)
    assert ace.equivariance_error(model, example, ace.Cyclic(4), dtype=torch.float64, **FIELDS).max < 1e-6


@needs_escnn
def test_the_projection_keeps_the_filters_of_vector_fields():
    """The convolutions of escnn commute with quarter turns; so does what the projection leaves of any other."""
    enn = pytest.importorskip("escnn.nn")
    for layer in build("c4cnn", frames=2, fields=2, layers=3).layers:
        if not isinstance(layer, enn.R2Conv):
            continue
        with torch.no_grad():
            kernel, bias = layer.expand_parameters()
        weight, bias = kernel.flatten(1), torch.zeros(len(kernel)) if bias is None else bias
        projection = on_pixels(MODELS["c4cnn"].turns(layer), weight)
        for kept, whole in zip(projection(weight, bias), (weight, bias), strict=True):
            torch.testing.assert_close(kept, whole, atol=1e-6, rtol=1e-5)
        kept, bias = projection(torch.randn_like(weight), torch.randn_like(bias))
        assert kept.norm() > 0.1
        x = enn.GeometricTensor(torch.randn(2, layer.in_type.size, 7, 7), layer.in_type)
        kernel = kept.view_as(kernel)
        for element in layer.in_type.testing_elements:
            before, after = (
                enn.GeometricTensor(nn.functional.conv2d(fields.tensor, kernel, bias, padding=1), layer.out_type)
                for fields in (x, x.transform(element))
            )
            torch.testing.assert_close(after.tensor, before.transform(element).tensor, atol=1e-4, rtol=1e-4)


@needs_escnn
@pytest.mark.usefixtures("made_up")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ace", "ace-tolerance", "cr", "cr-norm", "projection", "remul"])
def test_runs_of_the_steerable_network(tmp_path, method):
    words = f"method={method} model.fields=1 model.layers=2 steps=4 batch_size=4 eval_every=2 task.horizon=2"
    summary = train.run(load_run("smoke2d", words.split()), tmp_path)
    assert summary["status"] == "done"
    assert (summary["equivariance_error_float64"] < 1e-6) == (method in {"ace", "cr", "cr-norm"})


@pytest.mark.data
@real_data
def test_real_sizes_and_baselines():
    task = Smoke()
    assert {split: task.size(split) for split in task.windows} == {"train": 540, "valid": 12, "test": 12, "domain": 16}
    for split, expected in (("test", 0.469), ("domain", 1.015)):
        assert task.evaluate(Growth(), split) == {"rmse": pytest.approx(expected, abs=1e-3)}


@pytest.mark.data
@real_data
def test_real_runs_are_nearly_turned_copies_of_one_another():
    """Of each strength the four sides follow one another in the sense of the group, at the first frame."""
    arrays = data.load_file(FILE, ARRAYS, "")
    velocity = torch.from_numpy(arrays["velocity"]).double()
    [quarter] = [g for g in Smoke.group.sample(4) if g.plane[1, 0] == 1]
    backward = quarter.inverse()

    def cosine(a, b):
        return float((a * b).sum() / a.norm() / b.norm())

    for run in range(16):
        step = 1 if arrays["inflow_side"][run] < 3 else -3
        here, there = velocity[run, 0], velocity[run + step, 0]
        assert 0.5 < cosine(act(quarter, here, "vector_image"), there) < 0.9999
        assert cosine(act(backward, here, "vector_image"), there) < 0.1
        assert abs(cosine(act(quarter, here, "image"), there)) < 0.1


@pytest.mark.data
@real_data
@pytest.mark.skipif(find_spec("phi") is None, reason="PhiFlow is not installed")
@pytest.mark.filterwarnings("ignore")
def test_real_frames_are_those_that_phiflow_makes():
    """Of two sides, at once and alone."""
    stored = data.load_file(FILE, ARRAYS, "")
    runs = list(zip(stored["strength_k"].tolist(), stored["inflow_side"].tolist(), strict=True))
    for chosen in ([3, 13], [13]):
        found = simulate([runs[number] for number in chosen], frames=2)
        np.testing.assert_allclose(found, stored["velocity"][chosen, :2], atol=1e-3)


@pytest.mark.data
@real_data
def test_runs_made_on_another_processor_are_read(tmp_path, monkeypatch):
    """Rounding that grew until the last frames; but no other numbers, and none without their checksum."""
    published = data.load_file(FILE, ARRAYS, "")
    monkeypatch.delenv("ACE_DATA")
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    made = {name: array.copy() for name, array in published.items()}
    made["velocity"][:, -10:] += np.random.default_rng(0).normal(0, 0.005, (16, 10, 2, 64, 64)).astype(np.float16)
    data.save_arrays(tmp_path / FILE, made)
    np.testing.assert_array_equal(load()["velocity"], made["velocity"])
    assert Smoke().size("train") == 540
    checksum = data.checksum_file(tmp_path / FILE)
    stated = checksum.read_text()
    for wrong, message in (("0" * 64, "truncated or altered"), (None, "does not hold the published numbers")):
        checksum.unlink() if wrong is None else checksum.write_text(wrong)
        with pytest.raises(DataError, match=message):
            load()
    checksum.write_text(stated)
    for change in ({"velocity": 1.01 * made["velocity"]}, {"inflow_side": made["inflow_side"][::-1]}):
        data.save_arrays(tmp_path / FILE, {**made, **change})
        with pytest.raises(DataError, match="does not hold the published numbers"):
            load()
