from __future__ import annotations

import csv
import io
import itertools
import json
import re
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ace import plotting
from ace.errors import AceError, DataError
from ace.history import History
from ace.results import load_histories, load_results, status
from ace.tables import table

METHODS = ("strict", "ace")


def write_run(folder, task="nbody", model="egnn", method="ace", seed=0, *, layers=0, **summary):
    run = folder / f"{task}-{model}" / method / f"seed{seed}-3f9c1a2"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    if layers:
        history = History(run / "history.csv")
        for step in range(1, 4):
            history.log(step, loss=1 / (step + seed), valid_restored=1 / step)
            for index in range(layers):
                history.log(step, epoch=1, layer=f"{model}.{index}", gamma=1 / step)
        history.flush()
    identity = {"task": task, "model": model, "method": method, "seed": seed}
    (run / "summary.json").write_text(json.dumps({"status": "done"} | identity | summary))
    return run


def results(values: dict[tuple[str, str, str], list[float]], metric="test") -> pd.DataFrame:
    return pd.DataFrame(
        [(*key, seed, value) for key, column in values.items() for seed, value in enumerate(column)],
        columns=["task", "model", "method", "seed", metric],
    )


def cells(text: str) -> list[list[str]]:
    """The body of a markdown table."""
    return [[cell.strip() for cell in line.strip("| \n").split(" | ")] for line in text.splitlines()[2:]]


def test_one_row_for_each_finished_run(tmp_path):
    for task, method, seed in itertools.product(("mocap", "nbody"), METHODS, range(3)):
        write_run(tmp_path / "quick", task, method=method, seed=seed, test_shipped=seed / 3)
    write_run(tmp_path / "quick", "flow2d", test_shipped=float("nan"), extra="text")
    (tmp_path / "quick" / "nbody-egnn" / "ace" / "seed1-3f9c1a2" / "summary.json").unlink()
    loose = tmp_path / "quick" / "not-a-run"
    loose.mkdir()
    (loose / "summary.json").write_text("{}")

    frame = load_results(tmp_path)
    assert list(frame.columns[:5]) == ["run", "task", "model", "method", "seed"]
    assert len(frame) == 12
    assert frame["run"][0] == "quick/flow2d-egnn/ace/seed0-3f9c1a2"
    assert frame["run"].is_monotonic_increasing
    nbody = frame[(frame["task"] == "nbody") & (frame["method"] == "ace")]
    assert nbody["seed"].tolist() == [0, 2]
    assert nbody["test_shipped"].tolist() == [0, 2 / 3]
    assert np.isnan(frame["test_shipped"][0])
    assert frame["extra"].count() == 1
    assert load_results(str(tmp_path / "quick" / "nbody-egnn"))["run"][0] == "ace/seed0-3f9c1a2"
    assert load_results(tmp_path / "quick/mocap-egnn/ace/seed0-3f9c1a2")["run"].tolist() == ["."]


def test_no_runs_are_no_rows(tmp_path):
    assert load_results(tmp_path).empty
    assert {"run", "task", "model", "method", "seed"} == set(load_results(tmp_path))
    assert load_histories(tmp_path).empty
    assert status(tmp_path).empty
    for function in (load_results, load_histories, status):
        with pytest.raises(DataError, match="no such folder"):
            function(tmp_path / "absent")


def test_all_damaged_summaries_are_named(tmp_path):
    for seed, content in enumerate(['{"task": ', "[]", '{"task": "nbody", "seed": 1}']):
        (write_run(tmp_path, seed=seed) / "summary.json").write_text(content)
    write_run(tmp_path, seed=3)
    with pytest.raises(DataError) as caught:
        load_results(tmp_path)
    message = str(caught.value)
    assert all(f"seed{seed}-" in message for seed in range(3))
    assert "seed3-" not in message
    assert "no model, method" in message


def test_histories_of_all_runs(tmp_path):
    for model, layers in (("egnn", 2), ("segnn", 3)):
        for method, seed in itertools.product(METHODS, range(2)):
            write_run(tmp_path, model=model, method=method, seed=seed, layers=layers)
    write_run(tmp_path, method="cr")  # without a history
    unfinished = write_run(tmp_path, method="ace-paper", layers=2)
    (unfinished / "summary.json").unlink()

    frame = load_histories(tmp_path)
    assert list(frame.columns) == [
        *("run", "task", "model", "method", "seed"),
        *("step", "epoch", "layer", "quantity", "value"),
    ]
    assert len(frame) == 4 * 3 * (2 + 2) + 4 * 3 * (2 + 3)
    assert set(frame["method"]) == set(METHODS)
    for column in ("run", "task", "model", "method", "layer", "quantity"):
        assert isinstance(frame[column].dtype, pd.CategoricalDtype)
    for run, rows in frame.groupby("run", observed=True, sort=False):
        alone = History.load(tmp_path / str(run) / "history.csv").frame()
        pd.testing.assert_frame_equal(rows[alone.columns].reset_index(drop=True), alone, check_categorical=False)
        assert str(run) == f"{rows['task'].iloc[0]}-{rows['model'].iloc[0]}/{rows['method'].iloc[0]}/seed" + (
            f"{rows['seed'].iloc[0]}-3f9c1a2"
        )

    one = frame[frame["model"] == "segnn"]
    assert len(plotting.plot_learning_curves(one, Figure().subplots()).get_lines()) == 2
    ax = plotting.plot_gammas(one[one["method"] == "ace"], Figure().subplots())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"segnn.{i}" for i in range(3)]


def test_status_of_every_run(tmp_path):
    write_run(tmp_path, seed=0)
    for seed, files in {
        1: {"error.txt": "Traceback\n  File\nNonFiniteLoss: loss is nan\n\n"},
        2: {"checkpoint.pt": ""},
        3: {},
        4: {"error.txt": "", "checkpoint.pt": ""},
    }.items():
        run = write_run(tmp_path, seed=seed)
        (run / "summary.json").unlink()
        for name, content in files.items():
            (run / name).write_text(content)
    frame = status(tmp_path)
    assert frame["run"].tolist() == [f"nbody-egnn/ace/seed{seed}-3f9c1a2" for seed in range(5)]
    assert frame["status"].tolist() == ["done", "failed", "interrupted", "interrupted", "failed"]
    assert frame["detail"].tolist() == [
        "",
        "NonFiniteLoss: loss is nan",
        "has a checkpoint",
        "no checkpoint yet",
        "",
    ]
    assert list(frame["status"].cat.categories) == ["done", "failed", "interrupted"]


values = st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=4))
def test_numbers_of_a_table_are_numpys(columns):
    frame = results({("nbody", "egnn", f"m{index}"): column for index, column in enumerate(columns)})
    rows = list(csv.DictReader(io.StringIO(table(frame, "test", format="csv"))))
    assert [row["method"] for row in rows] == [f"m{index}" for index in range(len(columns))]
    for row, column in zip(rows, columns, strict=True):
        assert int(row["n"]) == int(row["test_n"]) == len(column)
        np.testing.assert_allclose(float(row["test_mean"]), np.mean(column), rtol=1e-12)
        if len(column) == 1:
            assert row["test_error"] == ""
        else:
            error = np.std(column, ddof=1) / np.sqrt(len(column))
            np.testing.assert_allclose(float(row["test_error"]), error, rtol=1e-6, atol=1e-12 * max(column))

    for row, column in zip(cells(table(frame, "test")), columns, strict=True):
        parsed = re.fullmatch(r"\(?([\d.]+)(?: ± ([\d.]+)\)?)?(?:e([+-]\d+))?", row[4].strip("*_"))
        assert parsed, row
        unit = 10.0 ** int(parsed[3] or 0)
        error = np.std(column, ddof=1) / np.sqrt(len(column)) if len(column) > 1 else 0.0
        # two digits of the error are shown, of the mean never more than six
        tolerance = max(0.05 * error, 5.1e-4 * np.mean(column) if not error > 0 else 5.1e-6 * np.mean(column))
        assert abs(float(parsed[1]) * unit - np.mean(column)) <= tolerance
        if parsed[2]:
            assert abs(float(parsed[2]) * unit - error) <= tolerance
    means = [np.mean(column) for column in columns]
    bold = [row[4].startswith("**") for row in cells(table(frame, "test"))]
    if len(columns) == 1:
        assert bold == [False]
    elif len(set(means)) == len(means) and min(np.diff(np.sort(means))) > 1e-9 * max(means):
        assert bold == [mean == min(means) for mean in means]


@pytest.mark.parametrize(
    ("column", "markdown", "latex"),
    [
        ([0.5], "0.5000", "$0.5000$"),
        ([0.5, 0.5], "0.5000 ± 0.0000", r"$0.5000 \pm 0.0000$"),
        ([0.7, 0.8], "0.750 ± 0.050", r"$0.750 \pm 0.050$"),
        ([1.0, 1.002], "1.0010 ± 0.0010", r"$1.0010 \pm 0.0010$"),
        ([7.1e-5, 7.3e-5], "(7.20 ± 0.10)e-5", r"$(7.20 \pm 0.10) \times 10^{-5}$"),
        ([7.1e-5], "7.100e-5", r"$7.100 \times 10^{-5}$"),
        ([2e6, 4e6], "(3.0 ± 1.0)e+6", r"$(3.0 \pm 1.0) \times 10^{6}$"),
        ([1.0, 2001.0], "1001 ± 1000", r"$1001 \pm 1000$"),
        ([0.0, 0.0], "0.000 ± 0.000", r"$0.000 \pm 0.000$"),
        ([-1.0, 1.0], "0.0 ± 1.0", r"$0.0 \pm 1.0$"),
        ([0.0002, 0.0004, 3.0], "1.0 ± 1.0", r"$1.0 \pm 1.0$"),
        ([1.0, float("inf")], "inf", r"$\infty$"),
        ([float("nan")], "– (0 of 1)", "-- (0 of 1)"),
        ([None, None], "– (0 of 2)", "-- (0 of 2)"),
        ([0.7, 0.8, float("nan")], "0.750 ± 0.050 (2 of 3)", r"$0.750 \pm 0.050$ (2 of 3)"),
    ],
)
def test_how_a_number_is_written(column, markdown, latex):
    frame = results({("nbody", "egnn", "ace"): column})
    assert cells(table(frame, "test"))[0][4] == markdown
    assert table(frame, "test", format="latex").splitlines()[4] == (rf"nbody & egnn & ace & {len(column)} & {latex} \\")


def test_the_best_of_each_task_and_model_is_bold():
    nan = float("nan")
    frame = results(
        {
            ("nbody", "segnn", "strict"): [2.0, 2.0],
            ("nbody", "segnn", "ace"): [3.0, 3.0],
            ("nbody", "segnn", "cr"): [1.0, nan],  # the best of the seeds that did not diverge
            ("mocap", "egno", "ace"): [1.0, 1.0],
            ("mocap", "egno", "strict"): [1.0, 1.0],
            ("alone", "egnn", "strict"): [1.0, 1.0],
        }
    )
    rows = cells(table(frame, "test"))
    assert [row[:3] for row in rows] == [
        ["nbody", "segnn", "strict"],
        ["nbody", "segnn", "ace"],
        ["nbody", "segnn", "cr"],
        ["mocap", "egno", "strict"],
        ["mocap", "egno", "ace"],
        ["alone", "egnn", "strict"],
    ]
    assert [row[4].startswith("**") for row in rows] == [True, False, False, True, True, False]
    latex = table(frame, "test", format="latex")
    assert latex.count(r"\mathbf") == 3
    assert latex.startswith("\\begin{tabular}{lllrr}\n\\toprule\n")
    assert latex.endswith("\\bottomrule\n\\end{tabular}\n")


def test_several_metrics_and_names_with_special_characters():
    frame = results({("n_body", "a|b", "50%"): [1.0, 2.0]}, "test_mse").assign(seconds=[10.0, None])
    rows = table(frame, ["test_mse", "seconds"]).splitlines()
    assert [cell.strip() for cell in rows[0].strip("| ").split("|")][3:] == ["n", "test_mse", "seconds"]
    assert r"a\|b" in rows[2]
    assert len({len(row) for row in rows}) == 1  # columns are aligned
    assert "10.00 (1 of 2)" in rows[2]
    latex = table(frame, ["test_mse", "seconds"], format="latex")
    assert r"n\_body & a|b & 50\% & 2 & $1.50 \pm 0.50$ & $10.00$ (1 of 2) \\" in latex
    assert r"test\_mse & seconds" in latex
    columns = pd.read_csv(io.StringIO(table(frame, ["test_mse", "seconds"], format="csv")))
    assert columns["seconds_n"].tolist() == [1]


def test_what_cannot_be_compared_is_refused():
    frame = results({("nbody", "egnn", "ace"): [1.0, 2.0]})
    with pytest.raises(AceError, match=r"no column other among task, model"):
        table(frame, ["test", "other"])
    with pytest.raises(AceError, match="not numbers: column method"):
        table(frame, "method")
    with pytest.raises(AceError, match="format 'html'"):
        table(frame, "test", format="html")
    with pytest.raises(AceError, match="no finished run"):
        table(frame[:0], "test")
    twice = pd.concat([frame, frame[1:]]).assign(run=["a", "b", "c"])
    with pytest.raises(AceError, match="more than once") as caught:
        table(twice, "test")
    assert "nbody egnn ace 1 b\n  nbody egnn ace 1 c" in str(caught.value)
    assert "ace 0" not in str(caught.value)


def test_ten_thousand_runs_take_seconds(tmp_path):
    for method, seed in itertools.product(range(100), range(100)):
        write_run(tmp_path, method=f"m{method}", seed=seed, test_shipped=float(seed))
    start = time.process_time()
    frame = load_results(tmp_path)
    text = table(frame)
    elapsed = time.process_time() - start
    assert len(frame) == 10_000
    assert len(text.splitlines()) == 102
    assert elapsed < 10  # about 1 s on a quiet machine
