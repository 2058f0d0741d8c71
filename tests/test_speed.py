"""The benchmark of speed: what its variants compute, and how its tables are read. No timings."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from runs import cache, tiny  # noqa: F401
from torch import nn
from toys import batches, network, regression

import ace
from benchmarks.speed import machinery, segnn, steps
from benchmarks.speed.__main__ import FOLDER, check
from benchmarks.speed.__main__ import main as measured
from benchmarks.speed.accuracy import by_method, main, runs, time_to_accuracy
from benchmarks.speed.timing import interleaved
from benchmarks.train import run


def test_once_all_terms_are_retired_training_is_bitwise_that_of_the_plain_model():
    torch.manual_seed(0)
    plain = network()
    relaxed = ace.relax(copy.deepcopy(plain), layers=nn.Linear, example=torch.zeros(1, 4))
    for relaxation in ace.relaxations(relaxed).values():
        relaxation.retire()
    problem = ace.Problem(relaxed, regression)
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(relaxed.parameters(), 1e-2), steps=100)
    reference = torch.optim.Adam(plain.parameters(), 1e-2)
    for batch in batches(20):
        reference.zero_grad()
        regression(plain, batch).backward()
        reference.step()
        report = optimizer.roll(batch).cmp_state.misc
        for name in ("gamma", "violation", "multiplier"):
            assert not report[name].any()
    for own, other in zip(ace.restore(relaxed).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_the_variants_of_the_machinery_all_take_the_same_step_on_the_weight(tmp_path):
    """A step that a variant left out would flatter it."""
    torch.manual_seed(0)
    for name, step in machinery.variants(3, tmp_path).items():
        losses = {}
        for count in range(3):
            result = step()
            losses[count] = getattr(result, "loss", None)
        if losses[0] is not None:
            assert losses[2] < losses[0], name
    assert len(ace.History.load(tmp_path / "3.csv").frame()) == 3 * (1 + 3 * 3)


def test_functions_take_turns():
    calls = []
    table = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, steps=2)
    assert "".join(calls) == "ab" + "aabb" + "bbaa"
    assert list(table) == ["a", "b"]
    assert len(table) == 2


@pytest.fixture
def tables(monkeypatch):
    """What is measured anew is what was committed, until a test changes it."""
    read = {name: pd.read_csv(FOLDER / f"{name}.csv", dtype=str) for name in ("cost", "segnn", "machinery")}
    monkeypatch.setattr(steps, "measure", lambda names, *_, **__: read["cost"][read["cost"]["model"].isin(names)])
    monkeypatch.setattr(segnn, "measure", lambda rounds: read["segnn"])
    monkeypatch.setattr(machinery, "measure", lambda rounds, layers: read["machinery"])
    return read


def test_the_check_names_the_rows_that_moved(tables):
    assert check(1, ["egnn", "segnn"]) == []
    cost, own = tables["cost"], tables["machinery"]
    cost.loc[cost["model"] == "egnn", "retired"] = "1.30 (1.20 to 1.40)"
    cost.loc[cost["model"] == "egno", "retired"] = "9.00 (8.00 to 10.00)"  # not asked for
    own.loc[own["a step"] == "ace", own.columns[1]] = "9000 (8000 to 10000)"
    found = check(1, ["egnn", "segnn"])
    assert len(found) == 2
    assert found[0].startswith("egnn, retired: ")
    assert found[0].endswith(" before, 1.30 now")
    assert found[1].startswith("machinery, relative to Cooper's: ")


def test_the_check_names_what_it_could_not_compare(tables):
    tables["cost"] = tables["cost"][tables["cost"]["model"] != "mace"]
    [line] = check(1, ["egnn", "mace"])
    assert line == "mace: not measured, its library is missing"


def test_options_that_a_part_does_not_have_are_refused(monkeypatch, capsys):
    for words, message in (
        (["machinery", "egnn"], "leave out egnn"),
        (["machinery", "--device", "cuda"], "only steps and segnn"),
        (["all", "--compile"], "--compile is for steps"),
        (["steps", "resnet"], "unknown models resnet: choose of segnn"),
    ):
        monkeypatch.setattr("sys.argv", ["speed", *words])
        with pytest.raises(SystemExit):
            measured()
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("cache")
def test_only_models_that_could_be_shipped_count_as_having_got_there(tmp_path):
    """γ is at its end in the last fifth of the steps only."""
    config = tiny("method=cosine-decay", "method.final=0.5")
    run(config, tmp_path / config.folder)
    [row] = runs(tmp_path).itertuples()
    assert row.errors.index.tolist() == [20]


@pytest.mark.usefixtures("cache")
def test_runs_of_a_second_folder_join_those_of_the_first(tmp_path, monkeypatch):
    for seed in range(2):
        for method in ("strict", "ace"):
            config = tiny(f"method={method}", f"seed={seed}")
            run(config, tmp_path / str(seed) / config.folder)
    (tmp_path / "out").mkdir()
    for folder in ("0", "1", "1"):
        monkeypatch.setattr("sys.argv", ["accuracy", str(tmp_path / folder), "--out", str(tmp_path / "out")])
        main()
    rows = pd.read_csv(tmp_path / "out" / "accuracy.csv")
    assert rows[["method", "seed"]].to_numpy().tolist() == [["ace", 0], ["strict", 0], ["ace", 1], ["strict", 1]]
    assert (tmp_path / "out" / "accuracy.md").read_text().count("\n") == 4
    assert by_method(rows)["runs"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("errors", "step_time", "equal"),
    [
        ({10: 0.9, 20: 0.25}, 0.5, 0.5),
        ({10: 0.9, 20: 0.25}, 0.6, 1.8),  # 16 steps in the time of strict training
        ({10: 0.4, 20: 0.45}, 0.5, 0.8),  # the best of those that could be shipped
        ({20: 0.25}, 0.6, None),  # scheduled to its end, or to its tolerance, too late
    ],
)
def test_error_in_the_time_of_strict_training(errors, step_time, equal):
    rows = [
        {"task": "t", "model": "m", "method": "strict", "seed": 0, "errors": {10: 0.7, 20: 0.5}, "seconds": 0.5},
        {"task": "t", "model": "m", "method": "ace", "seed": 0, "errors": errors, "seconds": step_time},
    ]
    found = time_to_accuracy(pd.DataFrame([row | {"errors": pd.Series(row["errors"])} for row in rows]))
    strict, ace_ = found.set_index("method")["equal"][["strict", "ace"]]
    assert strict == 1
    assert ace_ == pytest.approx(equal) if equal is not None else pd.isna(ace_)


@pytest.mark.parametrize(("errors", "reached", "seconds"), [([0.9, 0.4], 1, 10.0), ([0.9, 0.6], 0, None)])
def test_time_to_the_error_where_strict_ended(errors, reached, seconds):
    rows = [
        {"task": "t", "model": "m", "method": method, "seed": seed, "errors": found, "seconds": 0.5}
        for method, seed, found in [
            ("strict", 0, pd.Series([0.7, 0.5], index=[10, 20])),
            ("ace", 0, pd.Series(errors, index=[10, 20])),
            ("ace", 1, pd.Series(errors, index=[10, 20])),  # no strict run to compare with
        ]
    ]
    table = by_method(time_to_accuracy(pd.DataFrame(rows))).set_index("method")
    assert table.loc["ace", "runs"] == 1
    assert table.loc["ace", "reached"] == reached
    if seconds is not None:
        assert table.loc["ace", "seconds, median"] == seconds
