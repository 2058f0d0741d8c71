"""``python -m benchmarks.speed.accuracy FOLDER``: processor seconds to the strict model's last validation error.

Read from the runs that a suite wrote. For each task, model and seed, the error to reach is that of the strict run at
its last evaluation; a run has reached it at the first evaluation at which it has a model to ship that is as good: one
that keeps its tolerance, or whose schedule has come to its end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

import ace
from ace.comparison import OPTION, by_setting
from ace.errors import AceError
from ace.history import replace_file
from ace.results import IDENTITY
from ace.tables import layout
from benchmarks.methods import METHODS


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
    """Return one row a method: in how many runs, and in how many processor seconds, it got where strict ended.

    Args:
        found: What ``runs`` returned.

    Returns:
        The table; methods without a strict run of the same task, model and seed are left out.
    """
    named, conditions = by_setting(found)
    cases = ["task", "model", *conditions]
    strict = named[named["method"] == "strict"]
    targets = {tuple(row[[*cases, "seed"]]): row["errors"].iloc[-1] for _, row in strict.iterrows()}
    rows = []
    named["method"] = pd.Categorical(named["method"], [*dict.fromkeys([*METHODS, *named["method"]])])
    for keys, group in named.groupby([*cases, "method"], observed=True):
        seconds, compared = [], 0
        for _, row in group.iterrows():
            target = targets.get(tuple(row[[*cases, "seed"]]))
            if target is not None:
                compared += 1
                seconds += [step * row["seconds"] for step in row["errors"].index[row["errors"] <= target][:1]]
        if compared:
            reached = pd.Series(seconds, dtype=float)
            rows.append(
                dict(zip([*cases, "method"], keys, strict=True))
                | {"runs": compared, "reached": len(reached), "seconds, median": round(reached.median(), 1)}
                | {"least": round(reached.min(), 1), "most": round(reached.max(), 1)}
            )
    return pd.DataFrame(rows)


def wide(table: pd.DataFrame) -> str:
    """Return a Markdown table with a row a method and a column a task: the median time relative to strict training's.

    In brackets, where not all: in how many of the runs the method got there. A dash: in none.

    Args:
        table: What ``time_to_accuracy`` returned.

    Example:
        >>> columns = ["task", "model", "method", "runs", "reached", "seconds, median"]
        >>> rows = [("nbody", "egnn", "strict", 3, 3, 20.0), ("nbody", "egnn", "ace", 3, 2, 25.0)]
        >>> print(wide(pd.DataFrame(rows, columns=columns)), end="")
        | method | nbody egnn    |
        | ------ | ------------- |
        | strict | 1.00          |
        | ace    | 1.25 (2 of 3) |
    """
    cases = list(table.columns[: table.columns.get_loc("method")])
    columns = {}
    for case, rows in table.groupby(cases, sort=False):
        of_method = rows.set_index("method")
        reference = of_method["seconds, median"]["strict"]
        columns[" ".join(str(value) for value in case if value != "")] = {
            method: "–"
            if row["reached"] == 0
            else f"{row['seconds, median'] / reference:.2f}"
            + (f" ({row['reached']} of {row['runs']})" if row["reached"] < row["runs"] else "")
            for method, row in of_method.iterrows()
        }
    names = list(dict.fromkeys(table["method"]))
    rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in names]
    return layout(["method", *columns], rows)


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.accuracy", description=__doc__)
    parser.add_argument("folder", type=Path, help="results of a suite")
    parser.add_argument("--out", type=Path, help="folder for accuracy.csv, and for accuracy.md relative to strict")
    options = parser.parse_args()
    table = time_to_accuracy(runs(options.folder))
    print(table.to_string(index=False))
    if options.out is not None:
        replace_file(options.out / "accuracy.csv", table.to_csv(index=False).encode())
        replace_file(options.out / "accuracy.md", wide(table).encode())


if __name__ == "__main__":
    main()
