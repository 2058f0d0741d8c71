"""The synthetic task whose symmetry is broken on purpose, and its model."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import nn

import ace
from ace.errors import ConfigError
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.tasks.broken import DIRECTION as Z
from benchmarks.tasks.broken import LAYERS, VECTORS, Broken
from benchmarks.train import build_model, build_task

SIZES = {"train": 30, "valid": 5, "test": 5}


def moved(element, x):
    return x @ element.matrix.to(x.dtype).T


def break_under(task, elements):
    """Largest relative violation of the teacher over group elements."""
    x = task.splits["train"].pos
    y = task.clean(x)
    return max((task.clean(moved(g, x)) - moved(g, y)).norm() / y.norm() for g in elements)


def test_without_strength_the_data_are_exactly_symmetric():
    task = Broken(strength=0.0, noise=0.0, **SIZES)
    assert break_under(task, ace.O3().sample(8)) < 1e-5
    assert torch.equal(task.splits["train"].target, task.clean(task.splits["train"].pos))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_the_break_grows_with_its_strength_and_leaves_the_axis(layer):
    breaks = [break_under(Broken(strength=s, layer=layer, **SIZES), ace.SO3().sample(8)) for s in (0.01, 0.1, 1.0)]
    assert breaks[0] > 1e-4
    assert 3 < breaks[1] / breaks[0] < 30
    assert breaks[2] > 2 * breaks[1]
    task = Broken(strength=1.0, layer=layer, **SIZES)
    assert break_under(task, ace.SO2(tuple(Z.tolist())).sample(8)) < 1e-5
    assert break_under(task, ace.SO2((1.0, 0.0, 0.0)).sample(8)) > 0.05


def test_the_break_is_an_offset_after_its_layer():
    task = Broken(strength=0.7, layer=1, noise=0.0, **SIZES)
    x = task.splits["valid"].pos
    hidden = task.teacher.layers[1](task.teacher.layers[0](x))
    shifted = hidden.clone()
    shifted[..., 2] += task.offset[:, 2]
    expected = task.teacher.readout(task.teacher.layers[2](shifted))
    torch.testing.assert_close(task.splits["valid"].target, expected)
    assert not task.offset[:, :2].any()


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_the_same_seed_does_not_start_as_the_teacher(seed):
    config = load_run("broken", [f"seed={seed}", f"task.seed={seed}", *(f"task.{key}={n}" for key, n in SIZES.items())])
    task = build_task(config)
    own, taught = (nn.utils.parameters_to_vector(net.parameters()) for net in (build_model(config, task), task.teacher))
    assert torch.corrcoef(torch.stack([own, taught]))[0, 1].abs() < 0.15  # 1,248 weights


def test_data_depend_on_the_seed_only():
    state = torch.random.get_rng_state()
    first, again = (Broken(**SIZES).splits["test"] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.pos, Broken(seed=1, **SIZES).splits["test"].pos)
    noisy, clean = (Broken(noise=noise, train=2000, valid=1, test=1).splits["train"].target for noise in (0.05, 0.0))
    assert (noisy - clean).std().item() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("options", [{"strength": -1}, {"layer": 3}, {"noise": -0.1}, {"train": 0}])
def test_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Broken(**{**SIZES, **options})


def test_model_is_equivariant_and_its_entry_describes_its_layers(float64):
    entry = MODELS["vector"]
    model = entry.build(0, 0, vectors=VECTORS)
    x = torch.randn(6 * VECTORS, 3)
    report = ace.equivariance_error(model, (x,), ace.O3(), inputs={"pos": "vector"}, outputs="vector")
    assert report.max < 1e-13
    relaxed = ace.relax(model, example=(x,))
    assert list(ace.relaxations(relaxed)) == [*(f"layers.{depth}" for depth in range(LAYERS)), "readout"]
    for layer in model.layers:
        term = layer.relaxation.term
        assert term.map.in_features == o3.Irreps(entry.read_types(layer)).dim
        assert term.map.out_features == o3.Irreps(entry.write_types(layer)).dim


KEPT = {
    "direction": {"rotations about the axis", "mirror along the axis"},
    "mirror": {"rotations", "rotations about the axis"},
    "cube": {"inversion", "quarter turns about the axis", "mirror along the axis"},
}


@pytest.mark.parametrize("axis", [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (1.0, -2.0, 0.5)])
@pytest.mark.parametrize("kind", KEPT)
def test_each_kind_of_break_keeps_what_it_says(kind, axis):
    task = Broken(strength=1.0, noise=0.0, kind=kind, axis=axis, **SIZES)
    groups = {
        "rotations": ace.SO3(),
        "rotations about the axis": ace.SO2(axis),
        "mirror along the axis": ace.Dihedral(1, axis),
        "inversion": ace.Inversion(),
        "quarter turns about the axis": ace.Cyclic(4, axis),
    }
    breaks = {name: break_under(task, group.sample(8)) for name, group in groups.items()}
    kept = {name for name, size in breaks.items() if size < 1e-5}
    assert kept == KEPT[kind] | ({"quarter turns about the axis"} if kind != "cube" else set())
    assert all(size > 0.05 for name, size in breaks.items() if name not in kept)


def test_the_cube_has_its_edges_along_the_axes():
    task = Broken(strength=1.0, noise=0.0, kind="cube", **SIZES)
    assert break_under(task, ace.Octahedral().sample(48)) < 1e-5


def test_uneven_inputs_break_no_symmetry_of_the_law():
    task = Broken(strength=0.0, noise=0.0, uneven=3.0, axis=(1.0, 0.0, 0.0), **{**SIZES, "train": 500})
    mean = task.splits["train"].pos.mean((0, 1))
    assert torch.allclose(mean, torch.tensor([3.0, 0.0, 0.0]), atol=0.15)
    assert break_under(task, ace.O3().sample(8)) < 1e-5


@pytest.mark.parametrize("options", [{"kind": "spiral"}, {"axis": (0.0, 0.0, 0.0)}])
def test_kinds_and_axes_that_do_not_exist_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Broken(**{**SIZES, **options})
