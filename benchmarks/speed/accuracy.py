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
from ace.results import IDENTITY


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
    for keys, group in named.groupby([*cases, "method"], sort=False):
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


def main() -> None:
    """Print the table, and write it where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.accuracy", description=__doc__)
    parser.add_argument("folder", type=Path, help="results of a suite")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args()
    table = time_to_accuracy(runs(options.folder))
    print(table.to_string(index=False))
    if options.out is not None:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
