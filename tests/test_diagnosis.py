"""Diagnosis: what data break, what a model relaxes, what strict costs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ace
from ace import breaking, diagnosis
from ace.breaking import Rows, judge
from ace.comparison import holm
from ace.errors import AceError, CheckpointMismatch
from ace.groups import E3, O3, SO2, SO3, Cyclic, Generator, Inversion, Octahedral, act, act_generator
from ace.metrics import lie_derivative

Z = (0.0, 0.0, 1.0)
CHAIN = {
    "rotations": SO3(),
    "about x": SO2((1.0, 0.0, 0.0)),
    "about z": SO2(),
    "inversion": Inversion(),
    "cube": Octahedral(),
}


def rows_of(x, residual, origin=None):
    return Rows(x, origin, residual, "vector", torch.arange(len(x)))


def heavy(count, seed, *shape):
    """Isotropic noise with outliers: normal vectors, each sample with a scale of its own."""
    random = torch.Generator().manual_seed(seed)
    scale = (0.1 + torch.rand(count, *[1] * len(shape), generator=random)) ** -1.5
    return scale * torch.randn(count, *shape, generator=random)


def inputs(count, seed, channels=2):
    return torch.randn(count, channels, 3, generator=torch.Generator().manual_seed(1000 + seed))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Fewer features and copies: what is tested here is easy to see."""
    for name, value in {"MIXES": 4, "COPIES": 4, "POOL": 96, "PENALTIES": (1e-4, 0.01, 1.0, 100.0)}.items():
        monkeypatch.setattr(breaking, name, value)


# --- the test


LAWS = {  # additions to the residual, and what they keep
    "a direction": (lambda x: torch.tensor(Z).expand(len(x), 3), {"about z"}),
    "handedness": (lambda x: torch.linalg.cross(x[:, 0], x[:, 1]), {"rotations", "about x", "about z"}),
    "component-wise": (lambda x: x[:, 0] ** 3 / x[:, 0].square().sum(-1, keepdim=True), {"inversion", "cube"}),
    "along z": (lambda x: x[:, 0] * torch.tensor(Z), {"about z", "inversion"}),
}


@pytest.mark.parametrize("law", LAWS)
def test_planted_breaks_are_named(law):
    added, keeps = LAWS[law]
    x = inputs(1200, 0)
    size = added(x).square().mean().sqrt()
    found = judge(rows_of(x, added(x) / size + 0.25 * heavy(1200, 0, 3)), O3(), CHAIN)
    assert found[0].verdict == "broken"
    assert {f.name for f in found[1:] if f.verdict == "broken"} == set(CHAIN) - keeps
    assert {f.name for f in found if f.verdict == "kept"} == keeps
    for finding in found:
        assert finding.even
        assert finding.excess > 0 or finding.verdict == "kept"


def test_equivariant_residuals_are_no_break():
    """An equivariant law that the model has missed, larger than the noise, is not mistaken for a break."""
    x = inputs(1000, 1)
    law = x[:, 0] * x[:, 1].norm(dim=1, keepdim=True) + 0.5 * x[:, 1]
    [found] = judge(rows_of(x, law + 0.1 * heavy(1000, 1, 3)), O3(), CHAIN)
    assert found.verdict == "kept"
    assert found.even
    assert found.error < 0.5  # the fit under O(3) has found the law


def test_level_under_the_null(monkeypatch):
    """Residuals with outliers and an equivariant part: the whole group is rejected in about 5 % of the cases."""
    monkeypatch.setattr(breaking, "MIXES", 2)
    monkeypatch.setattr(breaking, "COPIES", 2)
    monkeypatch.setattr(breaking, "BLOCKS", 6)
    repeats = 200
    values = []
    for seed in range(repeats):
        x = inputs(90, seed, 1)
        [found, *_] = judge(rows_of(x, 0.5 * x[:, 0] + heavy(90, seed, 3)), SO3(), {"about z": SO2()}, seed)
        values.append(found.p)
    p = torch.tensor(values)
    bound = 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert (p < 0.05).float().mean() < 0.05 + bound
    assert abs((p < 0.5).float().mean() - 0.5) < 3 * 0.5 / math.sqrt(repeats)


def test_uneven_inputs_and_a_missed_equivariant_law_are_no_break():
    """All inputs lean one way, so that a fit that knows the way explains what the fit under O(3) has missed."""
    x = inputs(1500, 2) + 3 * torch.tensor(Z)
    law = x[:, 0] * torch.cos(3 * x[:, 1].norm(dim=1, keepdim=True))
    [found, *others] = judge(rows_of(x, law + 0.1 * heavy(1500, 2, 3)), O3(), CHAIN)
    assert not found.even
    assert found.verdict == "kept", found
    assert not others


def test_a_large_break_is_found_on_uneven_inputs():
    x = inputs(1500, 3) + 3 * torch.tensor(Z)
    residual = torch.linalg.cross(x[:, 0], torch.tensor([1.0, 0.0, 0.0]).expand(1500, 3)) + 0.3 * heavy(1500, 3, 3)
    found = {finding.name: finding for finding in judge(rows_of(x, residual), O3(), CHAIN)}
    assert found["O(3)"].verdict == "broken"
    assert found["about z"].verdict == "broken"
    assert not found["rotations"].even
    assert found["about z"].even


def test_translations():
    x, origin = inputs(1000, 4), inputs(1000, 5, 1)[:, 0]
    swept = torch.tensor([1.0, 0.0, 0.0]) * origin + 0.1 * heavy(1000, 4, 3)
    found = {finding.name: finding for finding in judge(rows_of(x, swept, origin), E3(5.0), {"rotations": SO3()})}
    assert found["translations"].verdict == "broken"
    assert not found["translations"].even
    assert judge(rows_of(x, heavy(1000, 7, 3), origin), E3(5.0), {"rotations": SO3()})[0].verdict == "kept"


@given(seed=st.integers(0, 100))
@settings(max_examples=3, deadline=None)
def test_the_fit_under_a_finite_group_is_the_closed_form(seed):
    r"""Residuals r = A x: under a group, the best linear fit is A's average, :math:`|G|^{-1} \sum_h h^{-1} A h`."""
    random = torch.Generator().manual_seed(seed)
    matrix = torch.randn(3, 3, generator=random, dtype=torch.float64)
    x = torch.randn(800, 1, 3, generator=random, dtype=torch.float64)
    probe = breaking._Probe(rows_of(x, x[:, 0] @ matrix.T), seed=0)
    x = probe.rows.vectors
    probe.residual = x[:, 0] @ matrix.T  # outliers included
    probe.features = lambda move: move(x, "vector").flatten(1).split(probe.blocks)
    group = Cyclic(4)
    elements = [element.matrix for element in group.sample(4)]
    mean = torch.stack([h.T @ matrix @ h for h in elements]).mean(0)
    [found] = probe.average(group, probe.fit(group))
    expected = x[:, 0] @ mean.T
    assert (found - expected).norm() < 0.15 * probe.residual.norm()  # the samples are not quite even
    [plain] = probe.average(None, probe.fit(None))
    assert (plain - probe.residual).norm() < 1e-3 * probe.residual.norm()


def test_no_sample_is_predicted_by_a_fit_to_itself():
    """Another residual of one late sample changes no prediction of its own block, nor of those before it."""
    x, r = inputs(400, 6), heavy(400, 6, 3)
    first, second = breaking._Probe(rows_of(x, r), 0), breaking._Probe(rows_of(x, r), 0)
    start, stop = sum(first.blocks[:5]), sum(first.blocks[:6])
    second.residual[start] += 10.0
    before, after = (probe.average(None, probe.fit(None))[0] for probe in (first, second))
    same = (before == after).all(1)
    assert same[:stop].all()
    assert not same[stop:].any()
    assert first.late.sum() == sum(first.blocks[4:])


def test_a_break_in_close_encounters_is_found_by_the_nearest_row():
    """Rows that are pushed component by component away from the nearest one: only what is near shows it."""
    random = torch.Generator().manual_seed(8)
    count, nodes = 1500, 5
    x = torch.randn(count * nodes, 3, generator=random)
    index = torch.arange(count).repeat_interleave(nodes)
    place = [SimpleNamespace(kind="position", value=x)]
    near = diagnosis._near(place, x, "vector", index)
    away = torch.nn.functional.normalize(near[:, 0], dim=-1)
    push = away**3 - 0.6 * away  # of third order: no linear map is near it
    rows = Rows(x[:, None], None, push + 0.2 * heavy(count * nodes, 8, 3), "vector", index, None, near[:, :1])
    found = {finding.name: finding.verdict for finding in judge(rows, O3(), CHAIN)}
    kept = {"cube", "inversion"}
    assert found == {name: "kept" if name in kept else "broken" for name in ("O(3)", *CHAIN)}
    order = torch.randperm(count * nodes, generator=random)
    [whole, *_], [again, *_] = judge(rows, O3(), {"cube": Octahedral()}), judge(rows.sorted(order), O3(), CHAIN)
    assert whole.verdict == again.verdict == "broken"
    [blind] = judge(replace(rows, near=None), O3(), CHAIN)
    assert blind.verdict == "kept"


@given(sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4), seed=st.integers(0, 100))
@settings(deadline=None)
def test_the_nearest_row_is_the_nearest_one(sizes, seed):
    random = torch.Generator().manual_seed(seed)
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x, v, y = torch.randn(3, sum(sizes), 3, generator=random)
    entries = [SimpleNamespace(kind="position", value=x), SimpleNamespace(kind="vector", value=v)]
    found = diagnosis._near(entries, y, "position", index)
    for i in range(len(x)):
        others = [j for j in range(len(x)) if index[j] == index[i] and j != i]
        j = min(others, key=lambda j: float((x[j] - x[i]).norm()))
        torch.testing.assert_close(found[i], torch.stack([x[j] - x[i], v[j] - v[i], y[j] - y[i]]))
    assert not diagnosis._near(entries[1:], y, "vector", index).numel()
    assert not diagnosis._near(entries, y, "vector", torch.arange(len(x))).numel()


def test_the_size_that_is_expected_knows_lengths_only():
    """Turning the vectors changes no standardised residual; noise that grows with a length is made even."""
    x, noise = inputs(3000, 9), heavy(3000, 9, 3)
    rows = rows_of(x, noise * x[:, 0].norm(dim=1, keepdim=True) ** 3)
    [turn] = [element.matrix for element in O3().sample(1, seed=3)]
    even = breaking._standardized(rows)
    torch.testing.assert_close(breaking._standardized(rows_of(x.double() @ turn.T, rows.residual)), even)
    length = x[:, 0].norm(dim=1)
    short, long = (even[part].norm(dim=1).median() for part in (length < 1, length > 2.5))
    assert 0.8 < long / short < 1.25


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.02}, 0.0) == pytest.approx({"a": 0.03, "c": 0.04, "b": 0.04})
    assert holm({"a": 0.0001}, 0.02) == {"a": 0.02}


def test_too_few_samples_are_refused():
    with pytest.raises(AceError, match="30 samples"):
        judge(rows_of(inputs(30, 0), heavy(30, 0, 3)), O3(), CHAIN)


# --- the diagnosis


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x


def build(seed):
    return torch.nn.Sequential(Scale(), Scale())


def mse(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def pairs(wind, count=300, seed=0):
    random = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, count, 2, 3, generator=random)
    return [(x, 2 * x + 0.3 * noise + torch.tensor(wind))]


OPTIONS = {
    "steps": 150,
    "seeds": 2,
    "lr": 0.1,
    "inputs": {0: "vector"},
    "outputs": "vector",
    "relaxing": {"layers": Scale},
}


def test_a_wind_is_found():
    wind = torch.tensor([0.3, 0.6, 0.2])
    found = ace.diagnose(build, mse, pairs(wind.tolist()), pairs(wind.tolist(), seed=1), O3(), **OPTIONS)
    assert not found.symmetric
    axis = torch.tensor(found.axis)
    assert (axis @ wind).abs() > math.cos(math.radians(5)) * wind.norm() * axis.norm()
    assert {"rotations", "rotations about x", "rotations about y", "rotations about z"} <= set(found.named("broken"))
    assert any(name.startswith("rotations about (") for name in found.named("kept"))
    assert found.cost > 0.5
    assert list(found.layers) == ["0", "1"]
    assert min(found.layers["0"]) > 0.02
    assert "broken: O(3); rotations" in str(found)


def test_without_wind_the_data_are_symmetric(tmp_path):
    state = torch.get_rng_state()
    found = ace.diagnose(build, mse, pairs([0.0] * 3), pairs([0.0] * 3, seed=1), O3(), **OPTIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.symmetric
    assert [finding.name for finding in found.findings] == ["O(3)"]
    assert abs(found.cost) < 0.1
    assert str(found).startswith("symmetric: the data show no break of O(3) (p")
    found.save(tmp_path / "diagnosis.json")
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    assert content["symmetric"] is True
    assert content["findings"][0]["p"] == found.findings[0].p
    found.plot(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AceError, match="suffix"):
        found.plot(tmp_path / "diagnosis.txt")


def test_it_goes_on_from_its_folder(tmp_path, monkeypatch):
    data = pairs([0.0, 0.0, 0.5]), pairs([0.0, 0.0, 0.5], seed=1)
    steps = []
    whole = ace.diagnose(build, mse, *data, O3(), **OPTIONS, folder=tmp_path, progress=steps.append)
    assert steps[-1] == 2 * 2 * 150
    assert steps == sorted(steps)
    (tmp_path / "seed1.pt").unlink()
    trained = []
    monkeypatch.setattr(diagnosis, "relax", lambda *args, **kw: trained.append(args) or ace.relax(*args, **kw))
    again = ace.diagnose(build, mse, *data, O3(), **OPTIONS, folder=tmp_path)
    assert len(trained) == 1
    assert str(again) == str(whole)
    with pytest.raises(CheckpointMismatch):
        ace.diagnose(build, mse, *data, O3(), **{**OPTIONS, "steps": 50}, folder=tmp_path)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(AceError) as error:
        ace.diagnose(build, mse, iter(()), [torch.ones(3)], Cyclic(4), **{**OPTIONS, "steps": 0})
    for word in ("steps=0", "train has no batches", "group is C_4", "split="):
        assert word in str(error.value)


def test_targets_that_do_not_fit_are_refused():
    data = [(x, y[:, 0]) for x, y in pairs([0.0] * 3)]
    with pytest.raises(AceError, match=r"split="):
        ace.diagnose(build, lambda m, b: m(b[0]).square().mean(), data, data, O3(), **OPTIONS)


class Turned(torch.nn.Module):
    """Breaks rotations about every axis but one, by different amounts."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(3)))

    def forward(self, pos):
        return torch.tanh(pos @ self.matrix)


@given(axis=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: math.hypot(*axis) > 0.1))
@settings(max_examples=10, deadline=None)
def test_the_gram_matrix_is_the_squared_lie_derivative_about_every_axis(axis):
    model, x = Turned().double(), inputs(50, 0)[:, 0].double()
    run = diagnosis._Run(build, mse, [], [], [(x, x)], O3(), 1, {"pos": "vector"}, "vector", 1e-3, None, 1.0, {})
    gram = run.gram(model, E3().generators()[:3])
    unit = torch.tensor(axis, dtype=torch.float64)
    unit = unit / unit.norm()
    report = lie_derivative(model, x, SO2(tuple(unit.tolist())), inputs={"pos": "vector"}, outputs="vector")
    assert float(unit @ gram @ unit) == pytest.approx(report.mean**2, rel=1e-6)
    generator = Generator(sum(part * g.matrix for part, g in zip(unit, SO3().generators(), strict=True)))
    step = 1e-6
    turn = torch.linalg.matrix_exp(step * generator.matrix)
    with torch.no_grad():
        slope = (model(x @ turn.T) - model(x)) / step - act_generator(generator, model(x), "vector")
        expected = slope.square().sum() / model(x).square().sum()
    assert float(unit @ gram @ unit) == pytest.approx(float(expected), rel=1e-3)


def test_rotations_of_the_gram_matrix_are_about_the_centre_of_a_sample():
    """Where translations are kept, it does not matter where the samples are."""
    model, x = Turned().double(), inputs(50, 0)[:, 0].double()
    batch = torch.arange(5).repeat_interleave(10)

    class Steps(torch.nn.Module):
        def forward(self, pos, batch):
            mean = torch.stack([part.mean(0) for part in pos.split(10)])[batch]
            return mean + model(pos - mean)

    def gram(shift):
        example = {"pos": x + shift, "batch": batch}
        run = diagnosis._Run(build, mse, [], [], [(example, x)], E3(), 1, None, "position", 1e-3, None, 1.0, {})
        with torch.no_grad():
            size = Steps()(**example).square().sum()
        return size * run.gram(Steps(), E3().generators()[:3])

    assert torch.allclose(gram(0.0), gram(torch.tensor([5.0, -20.0, 7.0])), rtol=1e-9)
    run = diagnosis._Run(
        build, mse, [], [], [({"pos": x, "batch": batch}, x)], E3(), 1, None, "position", 1, None, 1, {}
    )
    assert run.gram(Steps(), E3().generators()[3:]).abs().max() < 1e-20


def test_an_axis_is_named_only_if_it_stands_out():
    eye = torch.eye(3, dtype=torch.float64)
    assert diagnosis._axis(torch.stack([eye, eye])) == (None, None)
    one = torch.diag(torch.tensor([1.0, 0.1, 1.0], dtype=torch.float64))
    assert diagnosis._axis(torch.stack([one, one])) == ((0.0, 1.0, 0.0), pytest.approx(0.0, abs=1e-5))


def test_rows_of_graphs_move_with_them():
    """Vectors, origins and residuals of moved graphs are the moved ones."""
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = torch.arange(3).repeat_interleave(10)
    [element] = E3(2.0).sample(1)

    class Shift(torch.nn.Module):
        def forward(self, pos, batch):
            return 1.5 * pos

    def rows(move):
        moved = move(x, "position")
        example = {"pos": moved, "batch": batch}
        return diagnosis._rows(Shift(), [(example, 2 * moved)], 1.5 * moved, None, "vector")

    here, there = rows(lambda t, kind: t), rows(lambda t, kind: act(element, t, kind))
    assert here.samples == 3
    assert here.slot is not None
    assert here.vectors.shape == (30, 3, 3)  # place in its graph, prediction, mean prediction
    assert torch.allclose(act(element, here.vectors[:, 0], "vector"), there.vectors[:, 0])
    assert torch.allclose(act(element, here.origin, "position"), there.origin)


def test_command_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ace.cli",
        "diagnose",
        "broken",
        "steps=200",
        "task.strength=1.0",
        "task.valid=200",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, "--seeds", "1", "--out", str(tmp_path)], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "the data break O(3)" in done.stdout
    assert (tmp_path / "diagnosis.png").exists()
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    assert not content["symmetric"]
    assert abs(content["axis"][2]) > 0.9
