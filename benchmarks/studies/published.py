"""Published numbers beside ours.

``python -m benchmarks.studies.published docs/results`` reads ``published.csv``, which has the published numbers with
their sources and why ours differ, and the CSVs of the suites, and writes ``published.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from ace.history import replace_file
from ace.tables import layout

SUITES = ("results", "quick")
"""Suites whose runs are compared, the first one that has the row counts."""


def beside(published: pd.DataFrame, suites: list[pd.DataFrame]) -> str:
    """Return a Markdown table of published numbers, ours, and why they differ.

    Args:
        published: ``task``, ``model``, ``method``, ``metric`` (a column of the runs), ``unit`` (of the published
            number, in those of the metric), ``published``, ``source``, ``difference``.
        suites: Runs, one row each; those of the first that has task, model, method and metric are ours.

    Returns:
        One line per published number; ours is the mean ± standard error over seeds, with their number and the steps.
    """
    lines = []
    for row in published.itertuples():
        ours = "–"
        for runs in suites:
            same = (runs["task"] == row.task) & (runs["model"] == row.model) & (runs["method"] == row.method)
            found = runs[same].dropna(subset=[row.metric]) if row.metric in runs else runs[:0]
            if len(found):
                values, steps = found[row.metric] / row.unit, found["steps"].max()
                error = f" ± {values.sem():.2g}" if len(values) > 1 else ""
                ours = f"{values.mean():.3g}{error} ({len(values)} seeds, {steps:,} steps)"
                break
        metric = "" if row.metric.startswith("test_") else f"{row.metric}, "
        theirs = f"{row.published} ({row.source})"
        lines.append([row.task, row.model, row.method, f"{metric}{row.unit:g}", theirs, ours, row.difference])
    return layout(["task", "model", "method", "unit", "published", "ours", "why they differ"], lines)


def report(out: Path) -> None:
    """Write ``published.md`` beside ``published.csv``."""
    suites = [pd.read_csv(path) for name in SUITES if (path := out / f"{name}.csv").exists()]
    replace_file(out / "published.md", beside(pd.read_csv(out / "published.csv"), suites).encode())


if __name__ == "__main__":
    report(Path(sys.argv[1]))
