"""How much does the learning rate matter, and how often does training fail? From the runs of ``rates.yaml``.

``python -m benchmarks.studies.rates docs/results`` reads ``rates.csv``, which ``python -m benchmarks.report rates``
writes, and writes ``rates-sensitivity.md``: for each method its best rate, chosen on the validation split, how wide the
range of good rates is, and the share of runs that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from ace.comparison import OPTION
from ace.history import replace_file
from ace.tables import layout
from benchmarks.methods import METHODS

RATE = f"{OPTION}lr"
GOOD = 1.1
"""A rate is good if its mean test error is at most so many times that at the best rate."""
FAILED = 3.0
"""A run failed if it ended with an error, or its test error is more than so many times that of the best setting."""


def sensitivity(runs: pd.DataFrame) -> pd.DataFrame:
    """Measure how sensitive the methods are to the learning rate.

    Args:
        runs: One row per run of one task and model: ``method``, ``seed``, the rate, ``valid_shipped`` and
            ``test_shipped``, which are missing where the run failed. Each method was run at the same rates.

    Returns:
        One row per method: the rate with the lowest mean on the validation split, mean and standard error of the test
        error there, the number of decades from the lowest to the highest good rate around it, and the share of all
        runs that failed.

    Example:
        >>> runs = pd.DataFrame(
        ...     [("ace", seed, rate, error, error) for seed in range(2)
        ...      for rate, error in ((1e-3, 2.0), (1e-2, 1.05), (1e-1, 1.0), (1.0, np.nan))],
        ...     columns=["method", "seed", RATE, "valid_shipped", "test_shipped"])
        >>> sensitivity(runs).iloc[0].round(2).to_dict()
        {'best rate': 0.1, 'test': 1.0, 'error': 0.0, 'good decades': 1.0, 'failed': 0.25}
    """
    errors = ["valid_shipped", "test_shipped"]
    runs = runs.assign(**runs[errors].astype(float).fillna(np.inf))
    chosen, means = (runs.pivot_table(error, "method", RATE) for error in errors)
    failed = (runs["test_shipped"] > FAILED * means.min(axis=None)).groupby(runs["method"]).mean()
    rows = {}
    for method in [method for method in METHODS if method in means.index]:
        of_rate = means.loc[method]
        best = chosen.loc[method].idxmin()
        at_best = runs.loc[(runs["method"] == method) & (runs[RATE] == best), "test_shipped"]
        bad = np.flatnonzero(of_rate > GOOD * of_rate[best])
        place = of_rate.index.get_loc(best)
        low = max(bad[bad < place], default=-1) + 1
        high = min(bad[bad > place], default=len(of_rate)) - 1
        rows[method] = {
            "best rate": best,
            "test": at_best.mean(),
            "error": at_best.sem(),
            "good decades": np.log10(of_rate.index[high] / of_rate.index[low]),
            "failed": failed[method],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def report(out: Path) -> None:
    """Write ``rates-sensitivity.md`` beside ``rates.csv``."""
    runs = pd.read_csv(out / "rates.csv")
    parts = []
    for (task, model), of_pair in runs.groupby(["task", "model"], sort=False):
        rows = [
            [
                str(method),
                f"{row['best rate']:.2g}",
                f"{row['test']:.4f} ± {row['error']:.2g}",
                f"{row['good decades']:.1f}",
                f"{100 * row['failed']:.0f} %",
            ]
            for method, row in sensitivity(of_pair).iterrows()
        ]
        heading = ["method", "best rate", "test error there", "decades of good rates", "failed runs"]
        parts += [f"### {task}, {model}\n", layout(heading, rows)]
    replace_file(out / "rates-sensitivity.md", "\n".join(parts).encode())


if __name__ == "__main__":
    report(Path(sys.argv[1]))
