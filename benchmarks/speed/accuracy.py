"""``python -m benchmarks.speed.accuracy FOLDER``: processor seconds to an error, and the error at equal seconds.

Read from the runs that a suite wrote. For each task, model and seed, the error to reach is that of the strict run at
its last evaluation; a run has reached it at the first evaluation at which it has a model to ship that is as good: one
that keeps its tolerance, or whose schedule has come to its end. The error at equal seconds is the lowest that such a
model had by the time that strict training took.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

import ace
from ace.comparison import OPTION, by_setting, case_names
from ace.errors import AceError
from ace.history import replace_file
from ace.results import IDENTITY
from ace.tables import layout, wide_table
from benchmarks.methods import METHODS
from benchmarks.report import in_order

MEASURED = ("seconds", "equal")


def runs(folder: Path) -> pd.DataFrame:
    """Return one row a finished run: what it is, its validation errors by step, and the seconds of a step.

    Raises:
        AceError: There is no finished run in the folder.
    """
    rows = []
    for path in sorted(folder.rglob("summary.json")):
        summary = json.loads(path.read_bytes())
        frame = ace.History.load(path.with_name("history.csv")).frame()
        relaxed = summary["test_shipped"] == summary["test_relaxed"] != summary["test_restored"]
        error, admitted = (
            frame[frame["quantity"] == quantity].set_index("step")["value"]
            for quantity in ("valid_relaxed" if relaxed else "valid_restored", "admitted")
        )
        rows.append(
            {key: value for key, value in summary.items() if key in IDENTITY or key.startswith(OPTION)}
            | {"errors": error[admitted == 1], "seconds": summary["cpu_seconds_per_step"]}
        )
    if not rows:
        raise AceError(f"{folder}: no finished run in it; see: ace status {folder}")
    return pd.DataFrame(rows)


def time_to_accuracy(found: pd.DataFrame) -> pd.DataFrame:
    """Return, for each run, in how many processor seconds it got where strict training ended, and how far in as many.

    Args:
        found: What ``runs`` returned.

    Returns:
        Task, model, the options that were swept, ``method``, ``seed``; ``seconds``, missing where it did not get there;
        and ``equal``, the lowest validation error in the processor time that strict training took, relative to the
        lowest of strict training, missing where there was no model to ship yet. Runs without a strict one of the same
        task, model and seed are left out.
    """
    named, conditions = by_setting(found)
    run = ["task", "model", *conditions, "seed"]
    strict = named[named["method"] == "strict"].set_index(run)[["errors", "seconds"]]
    references = {key: (errors, errors.index[-1] * seconds) for key, errors, seconds in strict.itertuples()}
    rows = []
    for row in named.to_dict("records"):
        key = tuple(row[name] for name in run)
        if key in references:
            errors, (aim, time) = row["errors"], references[key]
            steps = errors.index[errors <= aim.iloc[-1]]
            seconds = steps[0] * row["seconds"] if len(steps) else math.nan
            equal = errors[errors.index * row["seconds"] <= time].min() / aim.min()
            identity = dict(zip(run, key, strict=True)) | {"method": row["method"]}
            rows.append(identity | {"seconds": seconds, "equal": equal})
    return pd.DataFrame(rows, columns=[*run[:-1], "method", "seed", *MEASURED])


def by_method(times: pd.DataFrame) -> pd.DataFrame:
    """Return one row a method: in how many runs it got there, and the median, least and most seconds.

    A run that did not get there counts as one that takes forever, so that the median is infinite where fewer than half
    of the runs did.

    Args:
        times: What ``time_to_accuracy`` returned.
    """
    order = [*dict.fromkeys([*METHODS, *times["method"]])]
    cases = list(times.columns[: times.columns.get_loc("method")])
    keys = {case: pd.Categorical(times[case], times[case].unique()) for case in cases}
    keys["method"] = pd.Categorical(times["method"], order)
    groups = times.assign(**keys, ever=times["seconds"].fillna(math.inf)).groupby([*cases, "method"], observed=True)
    table = groups["seconds"].agg(["size", "count", "min", "max"])
    table.insert(2, "median", groups["ever"].median())
    table.columns = pd.Index(["runs", "reached", "seconds, median", "least", "most"])
    return table.reset_index()


def wide(table: pd.DataFrame) -> str:
    """Return a Markdown table with a row a method and a column a task: the median time relative to strict training's.

    Of strict training itself the seconds. In brackets, where not all: in how many of the runs the method got there. A
    dash: in fewer than half.

    Args:
        table: What ``by_method`` returned.

    Example:
        >>> columns = ["task", "model", "method", "runs", "reached", "seconds, median"]
        >>> rows = [("nbody", "egnn", "strict", 3, 3, 20.0), ("nbody", "egnn", "ace", 3, 2, 25.0)]
        >>> print(wide(pd.DataFrame(rows, columns=columns)), end="")
        | method | nbody egnn    |
        | ------ | ------------- |
        | strict | 20 s          |
        | ace    | 1.25 (2 of 3) |
    """
    cases = list(table.columns[: table.columns.get_loc("method")])
    groups = dict(iter(table.groupby(cases, sort=False)))
    columns = {}
    for case, rows in zip(case_names(list(groups), cases[2:]), groups.values(), strict=True):
        of_method = rows.set_index("method")
        reference = of_method["seconds, median"]["strict"]
        columns[" ".join(case)] = {
            method: f"{reference:.3g} s" if method == "strict" else _cell(row, reference)
            for method, row in of_method.iterrows()
        }
    names = list(dict.fromkeys(table["method"]))
    rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]
    return layout(["method", *columns], rows)


def _cell(row: pd.Series[Any], reference: float) -> str:
    ratio = row["seconds, median"] / reference
    text = f"{ratio:.2f}" if math.isfinite(ratio) else "–"
    return text if row["reached"] in (0, row["runs"]) else f"{text} ({row['reached']} of {row['runs']})"


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.accuracy", description=__doc__)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="results of a suite; without it the table is made of --out's CSV"
    )
    parser.add_argument("--out", type=Path, help="folder for accuracy.csv, to which runs are added, and its two tables")
    options = parser.parse_args()
    if options.folder is None and options.out is None:
        parser.error("name the results of a suite, a folder that has an accuracy.csv (--out), or both")
    path = None if options.out is None else options.out / "accuracy.csv"
    parts = [pd.read_csv(path)] if path is not None and path.exists() else []
    parts += [] if options.folder is None else [time_to_accuracy(runs(options.folder))]
    if not parts:
        parser.error(f"{path} does not exist: name the results of a suite")
    times = pd.concat(parts, ignore_index=True)  # runs of other folders stay
    times = times.drop_duplicates([name for name in times if name not in MEASURED], keep="last")
    if path is not None:
        replace_file(path, times.to_csv(index=False, float_format="%.7g").encode())
        replace_file(options.out / "accuracy.md", wide(by_method(times)).encode())
        replace_file(options.out / "accuracy-equal.md", wide_table(in_order(times), "equal").encode())
    print(by_method(times).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
