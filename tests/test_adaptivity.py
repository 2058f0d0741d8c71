"""Tightening adapts to the data: short runs, and the study that shows it at length."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from runs import narrow

import ace.problem
from ace.proximal import ProximalGradient
from benchmarks.studies import adaptivity
from benchmarks.studies.adaptivity import ABLATIONS, SCALES, Setting, describe, grid, train

LAYERS = range(3)


@pytest.fixture(scope="module")
def short():
    """Rows of short runs by strength, and whether γ was exactly 0 at the end."""
    return {strength: train(Setting(strength=strength, steps=600)) for strength in (0.0, 1.0)}


def test_useless_relaxation_lets_go_early(short):
    row, gammas = short[0.0]
    assert not gammas[-1].any()
    for layer in LAYERS:
        assert row[f"lets_go_{layer}"] < 0.5  # 0.12 to 0.35 over seeds and layers
        assert row[f"mean_{layer}"] < 0.15  # 0.03 to 0.12
    assert row["gap_before_polish"] == 0


def test_useful_relaxation_is_held(short):
    useless, (useful, gammas) = short[0.0][0], short[1.0]
    assert not gammas[-1].any()  # whatever the data want, the end is exact
    assert useful["gap_end"] == 0
    assert useful["mean_0"] > 2.5 * useless["mean_0"]  # the break is after layer 0; 4 to 7 times over seeds
    assert useful["mean_0"] > max(useful["mean_1"], useful["mean_2"])  # by 0.00 to 0.07
    assert useful["settled"] > 1.25 * useless["settled"]  # 2.0 to 2.4 times


def test_the_unit_of_the_loss_does_not_change_the_path():
    usual = Setting(strength=0.3, steps=250, primal="adam, eps = 0")
    _, path = train(usual)
    assert path.any()
    for scale in (SCALES[0], SCALES[-1]):
        assert torch.equal(train(replace(usual, scale=scale))[1], path)


def test_describe():
    gammas = torch.tensor([[1.0, 0.5], [0.5, 0.0], [-0.25, 1e-4], [0.0, 0.0]])
    row = describe(gammas)
    assert [row["lets_go_0"], row["lets_go_1"]] == [0.75, 0.75]
    assert row["mean_0"] == pytest.approx(1.75 / 4)
    assert (row["overshoot"], row["settled"], row["final"]) == (0.25, 0.75, 0.0)
    assert describe(torch.zeros(5, 1))["lets_go_0"] == 0
    assert describe(torch.ones(5, 1))["settled"] == 1


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_the_path_and_leaves_the_library_as_it_was(name):
    # what terms are worth decides where they are worth little
    setting = Setting(strength=0.0, steps=1000) if "saliency" in name else Setting(strength=1.0, steps=120)
    _, before = train(setting)
    _, changed = train(replace(setting, variant=name))
    assert not torch.equal(changed, before)
    assert ace.problem.ProximalGradient is ProximalGradient
    assert torch.equal(train(setting)[1], before)


def test_the_grid_has_each_run_once_with_a_strict_run_beside_it():
    settings = grid()
    assert len({setting.name for setting in settings}) == len(set(settings)) == len(settings)
    frame = pd.DataFrame([{**vars(setting), "test": 1.0} for setting in settings])
    assert adaptivity.with_strict(frame)["strict"].notna().all()
    parts = adaptivity.parts(adaptivity.with_strict(frame))
    used = pd.concat([rows for _, rows in parts.values()])[adaptivity.KEY].drop_duplicates()
    assert len(used) == (frame["variant"] != "strict").sum()


def test_runs_resume_and_failures_leave_no_row(tmp_path, capsys):
    first, second = Setting(steps=40, strength=0.3), Setting("strict", steps=40, strength=0.3)
    bad = Setting(steps=40, strength=-1.0)
    assert adaptivity.run(tmp_path, [first, bad], jobs=1) == 1
    assert "strength=-1.0" in capsys.readouterr().out
    row = adaptivity.runs_of(tmp_path)
    assert len(row) == 1
    assert adaptivity.path_of(tmp_path, first).shape == (40, len(LAYERS))
    assert adaptivity.run(tmp_path, [first, second], jobs=1) == 0
    rows = adaptivity.runs_of(tmp_path)
    assert list(rows["variant"]) == ["ace", "strict"]
    assert rows["seconds"][0] == row["seconds"][0]  # not done again
    assert math.isnan(rows["final"][1])
    assert adaptivity.with_strict(rows)["strict"].to_list() == [rows["test"][1]]


def test_report(tmp_path):
    rows = []
    generator = np.random.default_rng(0)
    (tmp_path / "paths").mkdir()
    for setting in grid():
        if setting.steps > 3000 or setting.seed > 1:
            continue
        row = {**vars(setting), "test": 1 + setting.seed, "seconds": 2.0}
        if setting.variant != "strict":
            gammas = torch.tensor(generator.uniform(0, 0.1, (20, 3)))
            gammas[:, setting.depth] += 1
            row |= {"gap_before_polish": 0.5, "gap_end": 0.0, **describe(gammas)}
            np.save(tmp_path / "paths" / f"{setting.name}.npy", gammas.numpy())
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    out = tmp_path / "out"
    out.mkdir()
    assert adaptivity.main(["report", str(tmp_path), str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        *(f"adaptivity{name}.md" for name in ("", "_where", "_units")),
        *(f"adaptivity{name}.csv" for name in ("", "_paths")),
        *(f"adaptivity{name}.png" for name in ("_paths", "_shares")),
    }
    where = narrow((out / "adaptivity_where.md").read_text())
    line = next(x for x in where.splitlines() if x.startswith("| 0.3 | 2 "))
    assert line == "| 0.3 | 2 | 0 | **2** | 0 |"
    assert "| 1.5 (1 to 2) | 1.5 (1 to 2) | 2 |" in narrow((out / "adaptivity.md").read_text())
    assert len(pd.read_csv(out / "adaptivity.csv")) == len(rows)
