"""The digits task: samples against their definition; the steerable classifier, where escnn is installed."""

from __future__ import annotations

import copy
import json
import os
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy import ndimage
from server import serving
from torch import nn

import ace
from ace.errors import ConfigError, ConstraintNotMet, DataError
from ace.terms import matrix_of
from benchmarks import data, train
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.regularizers import ProjectionRegularizer, TurnRegularizer, on_pixels
from benchmarks.tasks import TASKS
from benchmarks.tasks.rotmnist import ARRAYS, FILE, Digits, download, turned

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
needs_escnn = pytest.mark.skipif(find_spec("escnn") is None, reason="escnn has an environment of its own")
C4 = {"inputs": {"images": "image"}, "outputs": "scalar"}
SIDE = 8


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Thirty digits of 8 × 8 pixels, their splits mixed."""
    generator = np.random.default_rng(0)
    arrays = {
        "image": generator.integers(0, 256, (30, SIDE, SIDE)).astype(np.uint8),
        "rotated": generator.integers(0, 256, (30, SIDE, SIDE)).astype(np.uint8),
        "label": generator.integers(0, 10, 30).astype(np.uint8),
        "split": generator.permutation(np.repeat(np.arange(3), [18, 5, 7])).astype(np.uint8),
    }
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    monkeypatch.setitem(data.CHECKSUMS, "mnist10k_rot", data.checksum(arrays))
    data.save_arrays(tmp_path / FILE, arrays)
    return arrays


class Bins(nn.Module):
    """Class of an image by the mean of its pixels, as logits."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return -(mean[:, None] - torch.linspace(0.5, 1.2, 10)).square()


@pytest.mark.parametrize("images", ["upright", "rotated"])
@pytest.mark.parametrize("test", ["upright", "rotated"])
def test_samples_are_the_definition(made_up, images, test):
    task = Digits(images, test, train=11)
    stored = {"upright": made_up["image"] / 255, "rotated": made_up["rotated"] / 255}
    rows = {
        split: [i for i in range(30) if made_up["split"][i] == number]
        for split, number in (("train", 0), ("valid", 1), ("test", 2))
    }
    rows["train"] = rows["train"][:11]
    scale = np.sqrt(np.mean([stored[images][i] ** 2 for i in rows["train"]]))
    for split, numbers in rows.items():
        batches = list(task.batches(split, 4))
        assert task.size(split) == len(numbers) == sum(map(len, batches))
        expected = np.stack([stored[test if split == "test" else images][i] for i in numbers])[:, None] / scale
        found = torch.cat([batch.inputs["images"] for batch in batches])
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert torch.cat([batch.target for batch in batches]).tolist() == made_up["label"][numbers].tolist()


@pytest.mark.usefixtures("made_up")
def test_loss_and_metrics_count_one_digit_at_a_time():
    task, model = Digits(train=18), Bins()
    losses, wrong = [], []
    for batch in task.batches("train", 1):
        logits = [float(z) for z in model(**batch.inputs)[0].double()]
        label = int(batch.target)
        losses.append(np.log(sum(np.exp(z) for z in logits)) - logits[label])
        wrong.append(max(logits) > logits[label])
    assert 0 < sum(wrong) < 18
    [whole] = task.batches("train", 18)
    assert float(task.loss(model, whole)) == pytest.approx(np.mean(losses), rel=1e-5)
    task.evaluation_batch = 5
    error = np.mean(wrong)
    assert task.evaluate(model, "train") == {"error": pytest.approx(error), "accuracy": pytest.approx(1 - error)}


@pytest.mark.usefixtures("made_up")
def test_the_group_turns_images_and_leaves_labels():
    task = Digits(train=18)
    batch = next(task.batches("train", 4))
    elements = task.group.sample(4, seed=1)
    moved = task.transform(batch, *elements)
    quarters = [round(float(torch.atan2(g.plane[1, 0], g.plane[0, 0]) / (torch.pi / 2))) % 4 for g in elements]
    assert sorted(quarters) == [0, 1, 2, 3]
    for number, turns in enumerate(quarters):
        image = batch.inputs["images"][number, 0].numpy()
        # from x (columns) to y (rows, downwards): clockwise as numpy shows it
        np.testing.assert_array_equal(moved.inputs["images"][number, 0], np.rot90(image, -turns))
    assert torch.equal(moved.target, batch.target)
    assert float(task.loss(Bins(), moved)) == pytest.approx(float(task.loss(Bins(), batch)), rel=1e-6)
    assert len({tuple(g.plane.flatten().tolist()) for g in Digits(train=18, order=8).group.sample(8)}) == 8


@pytest.mark.usefixtures("made_up")
@pytest.mark.parametrize("size", [0, 19])
def test_impossible_sizes(size):
    with pytest.raises(ConfigError, match=f"train={size}: there are 1 to 18"):
        Digits(train=size)


def test_missing_and_altered_data(made_up, tmp_path, monkeypatch):
    entry = TASKS["rotmnist"]
    assert entry.available() == (True, "")
    made_up["label"][0] ^= 1
    data.save_arrays(tmp_path / FILE, made_up)
    with pytest.raises(DataError, match="does not hold the published numbers of mnist10k_rot"):
        entry.factory()
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "nowhere"))
    available, message = entry.available()
    assert not available
    assert "mnist10k_rot.npz was looked for" in message
    assert "ace data rotmnist" in message


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """Address of a server with two or three made-up digits of each class, its folder, and the digits."""
    pytest.importorskip("pooch", reason="downloads need the extra 'bench'")
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "server"
    root.mkdir()
    generator, digits = np.random.default_rng(0), []
    for digit in range(10):
        gray = generator.integers(0, 256, (2 + digit % 2, 28, 28))
        (root / f"{digit}.json").write_text(json.dumps({"data": np.round(gray / 255, 3).ravel().tolist()}))
        digits += [(image, digit) for image in gray]
    with serving(root) as address:
        yield address, root, digits


def test_download_turns_and_verifies(origin, tmp_path, monkeypatch):
    """Against a loop over the digits."""
    address, root, digits = origin
    with pytest.raises(DataError, match=r"published numbers of mnist10k_rot: .* Try again"):
        download(address)
    assert not (tmp_path / "cache").exists()
    generator = np.random.default_rng(20250531)
    order, angles = generator.permutation(25), generator.uniform(0, 360, 25).astype(np.float32)
    expected = {name: [] for name in ARRAYS}
    for place, (number, angle) in enumerate(zip(order, angles, strict=True)):
        image, label = digits[number]
        rotated = ndimage.rotate(image.astype(float), float(angle), order=1, reshape=False).round()
        row = (image, rotated, label, 0 if place < 20 else 1 if place < 22 else 2)
        for name, value in zip(ARRAYS, row, strict=True):
            expected[name].append(value)
    arrays = {name: np.array(values).astype(np.uint8) for name, values in expected.items()}
    monkeypatch.setitem(data.CHECKSUMS, "mnist10k_rot", data.checksum(arrays))
    assert download(address) == tmp_path / "cache" / FILE
    assert TASKS["rotmnist"].available() == (True, "")
    for content in ('{"data": [0, 1]}', '{"data": 3', "{}", "[]"):
        (root / "7.json").write_text(content)
        with pytest.raises(DataError, match=r"7\.json is not laid out as published .* Try again"):
            download(address)
    (root / "7.json").unlink()
    with pytest.raises(DataError, match=r"7\.json could not be downloaded .* put mnist10k_rot\.npz"):
        download(address)


@pytest.fixture
def classifier():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escnn, at import
        return MODELS["c8cnn"].build(fields=2, hidden=8)


@needs_escnn
def test_the_classifier_is_equivariant_before_and_after(classifier):
    images = torch.rand(3, 1, 12, 12)
    classifier(images)  # batch norm moves off its start
    keys = list(classifier.state_dict())
    assert not any("filter" in key for key in keys)
    with torch.no_grad():
        before = copy.deepcopy(classifier).eval()(images)
    plain = ace.equivariance_error(classifier, images, ace.Cyclic(4), dtype=torch.float64, **C4)
    assert plain.max < 1e-6  # escnn keeps its kernels in float32
    relaxed = ace.relax(classifier, example=images, layers=lambda path, module: type(module).__name__ == "R2Conv")
    assert len(ace.relaxations(relaxed)) == 3
    for relaxation in ace.relaxations(relaxed).values():
        for weights in relaxation.term.parameters():
            weights.data += 0.1 * torch.randn_like(weights)
    assert ace.equivariance_error(relaxed, images, ace.Cyclic(4), **C4).max > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        restored = ace.restore(relaxed)
    assert restored is classifier
    assert list(restored.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(restored).eval()(images), before)
    assert ace.equivariance_error(restored, images, ace.Cyclic(4), dtype=torch.float64, **C4).max < 1e-6


@needs_escnn
def test_turns_by_an_eighth_are_as_good_as_the_pixels(classifier):
    """Blobs of a few pixels, turned exactly: far closer to each other than a plain network puts them."""

    def blobs(angle):
        x = torch.linspace(-1.5, 1.5, 24)
        turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).float()
        centres = torch.tensor([[0.7, 0.1], [-0.3, 0.6], [-0.2, -0.5]]) @ turn.T
        square = (x[None, None, :] - centres[:, 0, None, None]) ** 2 + (
            x[None, :, None] - centres[:, 1, None, None]
        ) ** 2
        return torch.exp(-square / 0.08).sum(0)[None, None]

    classifier.train()
    for _ in range(50):
        classifier(torch.cat([blobs(angle) for angle in (0.0, 0.4, 1.1)]))
    plain = nn.Sequential(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.Conv2d(16, 16, 5), nn.Flatten(), nn.Linear(4096, 10))

    def change(model):
        with torch.no_grad():
            here, there = (model(blobs(angle)) for angle in (0.0, np.pi / 4))
            return float((here - there).norm() / here.norm())

    with torch.no_grad():
        classifier.eval()
    assert change(classifier) < 0.05
    assert change(plain) > 3 * change(classifier)


@needs_escnn
@pytest.mark.usefixtures("made_up")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["ace", "strict"])
def test_an_interrupted_run_is_the_uninterrupted_one(tmp_path, method):
    words = f"method={method} model.fields=1 model.hidden=4 steps=4 batch_size=6 eval_every=2 checkpoint_every=2"
    config = load_run("rotmnist", [*words.split(), "task.train=18"])

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    whole = train.run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path / "cut", stop)
    cut = train.run(config, tmp_path / "cut")
    for key in whole:
        if not key.startswith(("seconds", "cpu_seconds", "peak", "git")):
            assert cut[key] == whole[key], key
    assert whole["equivariance_error_float64"] < 1e-6


def projection_of(layer, weight):
    return on_pixels(MODELS["c8cnn"].turns(layer), weight)


def filters(layer):
    """What escnn expands its own weights to, and a bias that is the same on all channels of a field."""
    with torch.no_grad():
        kernel, bias = layer.expand_parameters()
    return kernel.flatten(1), torch.ones(len(kernel)) if bias is None else bias


@needs_escnn
def test_the_projection_keeps_the_filters_of_escnn(classifier):
    """And of another kernel leaves what is the same turned, channels and pixels, and nothing when projected again."""
    for layer in (module for module in classifier.modules() if type(module).__name__ == "R2Conv"):
        weight, bias = filters(layer)
        kept, kept_bias = projection_of(layer, weight)(weight, bias)
        torch.testing.assert_close(kept, weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(kept_bias, bias)
        weight, bias = torch.randn_like(weight).double(), torch.randn_like(bias).double()
        projection = projection_of(layer, weight)
        kept, kept_bias = projection(weight, bias)
        assert 0.1 < float(kept.norm() / weight.norm()) < 0.9
        for again, once in zip(projection(kept, kept_bias), (kept, kept_bias), strict=True):
            torch.testing.assert_close(again, once, atol=1e-10, rtol=0)


def turned_slowly(layer, element, kernel, bias):
    """Move the pixels, counted from the centre, upwards, one by one."""
    into, out = (torch.tensor(fields.representation(element)) for fields in (layer.in_type, layer.out_type))
    angle = 2 * np.pi * element.value / layer.in_type.fibergroup.order()
    cos, sin = (round(part(angle)) for part in (np.cos, np.sin))
    moved = torch.zeros_like(kernel)
    for x in range(-2, 3):
        for y in range(-2, 3):
            to = cos * x - sin * y, sin * x + cos * y
            moved[:, :, 2 - to[1], 2 + to[0]] = out @ kernel[:, :, 2 - y, 2 + x] @ into.T
    return moved, out @ bias


def quarter_turns(layer):
    """Those in the group of the fields, the smallest after the identity."""
    order = layer.in_type.fibergroup.order()
    return [g for g in layer.in_type.testing_elements if float(4 * g.value / order).is_integer()]


@needs_escnn
@pytest.mark.parametrize("order", [2, 4, 6, 8])
def test_the_projection_is_the_mean_over_pixels_and_turns(order):
    model = MODELS["c8cnn"].build(order=order, fields=1, hidden=4)
    layer = [module for module in model.modules() if type(module).__name__ == "R2Conv"][1]
    weight, bias = torch.randn(2 * order, order * 25, dtype=torch.float64), torch.randn(2 * order, dtype=torch.float64)
    all_turned = [turned_slowly(layer, g, weight.unflatten(1, (order, 5, 5)), bias) for g in quarter_turns(layer)]
    assert len(all_turned) == (4 if order % 4 == 0 else 2)
    kept = projection_of(layer, weight)(weight, bias)
    for part, moved in zip(kept, zip(*all_turned, strict=True), strict=True):
        torch.testing.assert_close(part, sum(moved).view_as(part) / len(moved))


@needs_escnn
@pytest.mark.parametrize("order", [2, 4, 8])
@pytest.mark.parametrize("fields", [1, 3], ids=["full", "bottleneck"])
def test_the_price_of_a_quarter_turn_is_that_of_the_turned_kernels(order, fields):
    model, images = MODELS["c8cnn"].build(order=order, fields=fields, hidden=4), torch.rand(3, 1, 12, 12)
    ace.relax(model, example=images, layers=lambda path, module: type(module).__name__ == "R2Conv")
    for relaxation in ace.relaxations(model).values():
        relaxation.term.double()  # not the layers: escnn has them share what they are made of
    regularizer = TurnRegularizer(model, MODELS["c8cnn"].turns)
    differences, norms = 0, 0
    for path, relaxation in ace.relaxations(model).items():
        layer, term = model.get_submodule(path), relaxation.term
        bias = (term.map[-1] if isinstance(term.map, torch.nn.Sequential) else term.map).bias.detach()
        torch.nn.init.normal_(bias)
        kernel = matrix_of(term).detach().unflatten(1, (-1, 5, 5))
        moved, moved_bias = turned_slowly(layer, quarter_turns(layer)[1], kernel, bias)
        differences += ((kernel - moved).square().sum() + (bias - moved_bias).square().sum()).sqrt()
        norms += (kernel.square().sum() + bias.square().sum()).sqrt()
    assert regularizer.parts()[0].item() == pytest.approx(differences.item(), rel=1e-12)
    assert regularizer.parts(copies=2)[1].item() == pytest.approx(norms.item(), rel=1e-12)
    sum(regularizer.parts()).backward()
    assert all(p.grad.isfinite().all() for r in ace.relaxations(model).values() for p in r.term.parameters())


@needs_escnn
def test_equivariant_kernels_have_no_price_of_a_quarter_turn():
    model, images = MODELS["c8cnn"].build(fields=1, hidden=4), torch.rand(3, 1, 12, 12)
    ace.relax(model, example=images, layers=lambda path, module: type(module).__name__ == "R2Conv")
    regularizer = TurnRegularizer(model, MODELS["c8cnn"].turns)
    assert regularizer.parts()[0] > 1e-2
    for path, relaxation in ace.relaxations(model).items():
        dense = relaxation.term.map
        with torch.no_grad():
            weight, bias = projection_of(model.get_submodule(path), dense.weight)(dense.weight, dense.bias)
            dense.weight.copy_(weight)
            dense.bias.copy_(bias)
    difference, norm = regularizer.parts()
    assert difference < 1e-5 < 1e-2 < norm


@needs_escnn
def test_terms_at_distance_zero_leave_the_classifier_equivariant():
    model, images = MODELS["c8cnn"].build(fields=1, hidden=4), torch.rand(3, 1, 12, 12)
    ace.relax(model, example=images, layers=lambda path, module: type(module).__name__ == "R2Conv")
    relaxations = ace.relaxations(model)
    for relaxation in relaxations.values():
        torch.nn.init.normal_(relaxation.term.map.weight)
        torch.nn.init.normal_(relaxation.term.map.bias)
    regularizer = ProjectionRegularizer(model, lambda layer, weight: [(1.0, projection_of(layer, weight))])
    assert regularizer.distance() > 1
    assert ace.equivariance_error(model, images, ace.Cyclic(4), elements=4, **C4).max > 1e-2
    for path, relaxation in relaxations.items():
        dense = relaxation.term.map
        with torch.no_grad():
            weight, bias = projection_of(model.get_submodule(path), dense.weight)(dense.weight, dense.bias)
            dense.weight.copy_(weight)
            dense.bias.copy_(bias)
    assert regularizer.distance() < 1e-4
    assert ace.equivariance_error(model, images, ace.Cyclic(4), elements=4, dtype=torch.float64, **C4).max < 1e-5
    assert ace.projection_gap(model, images) > 1e-3


@needs_escnn
def test_the_distance_of_a_bottleneck_is_that_of_its_product():
    enn = pytest.importorskip("escnn.nn")
    model, images = MODELS["c8cnn"].build(fields=3, hidden=4), torch.rand(3, 1, 12, 12)
    ace.relax(model, example=images, layers=lambda path, module: type(module).__name__ == "R2Conv")
    regularizer = ProjectionRegularizer(model, lambda layer, weight: [(1.0, projection_of(layer, weight))])
    expected = 0
    for path, relaxation in ace.relaxations(model).items():
        layer, term = model.get_submodule(path), relaxation.term
        pixels = torch.eye(layer.in_type.size * 25).unflatten(1, (-1, 5, 5))  # each patch of one pixel and channel
        with torch.no_grad():
            answers = term(enn.GeometricTensor(pixels, layer.in_type))["tensor"][..., 2, 2]
            bias = term(enn.GeometricTensor(torch.zeros_like(pixels[:1]), layer.in_type))["tensor"][0, :, 2, 2]
        weight = (answers - bias).T
        kept, kept_bias = projection_of(layer, weight)(weight, bias)
        expected += float(((weight - kept).square().sum() + (bias - kept_bias).square().sum()).sqrt())
    distance = regularizer.distance()
    assert distance.item() == pytest.approx(expected, rel=1e-4)
    distance.backward()
    for relaxation in ace.relaxations(model).values():
        assert all(weights.grad is not None and weights.grad.any() for weights in relaxation.term.parameters())


@needs_escnn
@pytest.mark.usefixtures("made_up")
def test_groups_of_irreps_are_refused_on_pixels(tmp_path):
    words = ("method=projection", "method.groups={so2: 1}", "model.fields=1", "steps=2", "task.train=18")
    with pytest.raises(ConfigError, match=r"method\.groups is for terms between e3nn irreps"):
        train.run(load_run("rotmnist", words), tmp_path)


@pytest.mark.data
@real_data
def test_real_sizes_baselines_and_recipe():
    """Nearest class mean; and what the download makes of the digits."""
    for images, expected in (("upright", 0.202), ("rotated", 0.533)):
        task = Digits(images, images)
        assert tuple(task.size(split) for split in ("train", "valid", "test")) == (8000, 1000, 1000)
        [seen], [new] = task.batches("train", 8000), task.batches("test", 1000)
        x = seen.inputs["images"].flatten(1)
        means = torch.stack([x[seen.target == digit].mean(0) for digit in range(10)])
        nearest = torch.cdist(new.inputs["images"].flatten(1), means).argmin(1)
        assert float((nearest != new.target).double().mean()) == pytest.approx(expected, abs=0.002)
        torch.testing.assert_close(seen.inputs["images"].square().mean(), torch.tensor(1.0))
    arrays = data.load_file(FILE, ARRAYS, "")
    in_order = np.empty_like(arrays["image"])
    in_order[np.random.default_rng(20250531).permutation(10_000)] = arrays["image"]
    again = turned(np.split(in_order, np.cumsum(np.bincount(arrays["label"]))[:-1]))
    for name in ARRAYS:
        np.testing.assert_array_equal(again[name], arrays[name], strict=True)
