"""The synthetic task whose symmetry is broken on purpose, and its model."""

from __future__ import annotations

import pytest
import torch
from e3nn import o3
from torch import nn

import ace
from ace.errors import ConfigError
from ace.groups import Element
from benchmarks.config import load_run
from benchmarks.models import MODELS
from benchmarks.tasks.broken import DIRECTION as Z
from benchmarks.tasks.broken import LAYERS, VECTORS, Broken, BrokenSO2
from benchmarks.train import build_model, build_task, run

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


def words(*further):
    return [*(f"task.{key}={n}" for key, n in SIZES.items()), *further]


@pytest.mark.parametrize("name", ["broken", "broken-so2"])
@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_the_same_seed_does_not_start_as_the_teacher(seed, name):
    config = load_run(name, words(f"seed={seed}", f"task.seed={seed}"))
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


# About one axis


AXES = [((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)), ((3.0, -6.0, 1.0), (2.0, 1.0, 0.0))]
"""An axis and a direction across it."""
about = pytest.mark.parametrize(("axis", "across"), AXES)


def mirror(normal):
    """The mirror at the plane through the origin with this normal."""
    normal = nn.functional.normalize(torch.tensor(normal, dtype=torch.float64), dim=0)
    return [Element(torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal))]


@about
def test_a_model_that_is_given_an_axis_is_equivariant_about_it_only(float64, axis, across):
    model = MODELS["vector-axis"].build(0, 0, vectors=VECTORS)
    x = torch.randn(6 * VECTORS, 3)
    given = {"pos": x, "vel": nn.functional.normalize(torch.tensor(axis), dim=0).expand_as(x)}

    def error(group):
        types = {"pos": "vector", "vel": "invariant"}
        return ace.equivariance_error(model, given, group, inputs=types, outputs="vector").max

    assert error(ace.SO2(axis)) < 1e-12
    assert error(ace.Dihedral(5, axis)) < 1e-12
    assert min(error(group) for group in (ace.SO3(), ace.SO2(across), ace.Inversion())) > 0.05
    relaxed = ace.relax(model, layers=type(model.layers[0]), example=given)
    maps = {path: relaxation.term.map for path, relaxation in ace.relaxations(relaxed).items()}
    assert {path: dense.in_features for path, dense in maps.items()} == {
        "layers.0": 3 * (VECTORS + 1),
        **{f"layers.{depth}": maps["layers.0"].out_features for depth in range(1, LAYERS)},
    }
    assert error(ace.SO2(axis)) > 1e-4


def test_without_an_axis_it_is_z():
    model, x = MODELS["vector-axis"].build(0, 0, vectors=VECTORS), torch.randn(6 * VECTORS, 3)
    assert torch.equal(model(x), model(x, Z.expand_as(x)))


@about
def test_without_strength_the_data_are_exactly_symmetric_about_the_axis(axis, across):
    task = BrokenSO2(strength=0.0, noise=0.0, axis=axis, across=across, **SIZES)
    assert task.group == ace.SO2(axis)
    assert break_under(task, task.group.sample(8)) < 1e-5
    assert break_under(task, ace.Dihedral(5, axis).sample(10)) < 1e-5
    assert break_under(task, ace.SO3().sample(8)) > 0.05


@about
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_direction_across_the_axis_leaves_one_mirror(axis, across, layer):
    breaks = [
        break_under(BrokenSO2(strength=s, layer=layer, axis=axis, across=across, **SIZES), ace.SO2(axis).sample(8))
        for s in (0.01, 0.1, 1.0)
    ]
    assert breaks[0] > 1e-4
    assert 3 < breaks[1] / breaks[0] < 30
    assert breaks[2] > max(0.05, 2 * breaks[1])
    task = BrokenSO2(strength=1.0, layer=layer, axis=axis, across=across, **SIZES)
    normal = torch.linalg.cross(torch.tensor(axis), torch.tensor(across)).tolist()
    assert break_under(task, mirror(normal)) < 1e-5
    assert min(break_under(task, mirror(other)) for other in (axis, across)) > 0.05


@pytest.mark.parametrize("method", ["strict", "ace", "unconstrained"])
def test_runs_about_an_axis(tmp_path, method):
    short = ("steps=6", "batch_size=8", "eval_every=3", f"method={method}")
    config = load_run("broken-so2", words("task.strength=1", "task.axis=[3, -6, 1]", "task.across=[2, 1, 0]", *short))
    summary = run(config, tmp_path)
    assert summary["status"] == "done"
    assert (summary["equivariance_error_float64"] < 1e-12) == (method != "unconstrained")
    assert summary["equivariance_error_float64"] < 1
    assert 0 < summary["test_shipped"] < 100


@pytest.mark.parametrize("method", ["cr", "cr-norm", "projection"])
def test_no_method_takes_the_axis_for_a_vector_that_turns(method):
    with pytest.raises(ConfigError, match=f"method '{method}' does not apply to model 'vector-axis'"):
        load_run("broken-so2", [f"method={method}"])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"axis": (0.0, 0.0, 0.0)}, "perpendicular"),
        ({"across": (1.0, 0.0, 0.1)}, "perpendicular"),
        ({"axis": (1.0, 0.0, 0.0)}, "perpendicular"),
        ({"layer": 3}, "layer=3"),
    ],
)
def test_breaks_about_an_axis_that_do_not_exist_are_refused(options, what):
    with pytest.raises(ConfigError, match=f"broken-so2 task: .*{what}"):
        BrokenSO2(**{**SIZES, **options})
