"""The results page: from the folder of a suite to a compact CSV, tables in Markdown, and figures.

``python -m benchmarks.report results/results docs/results`` rebuilds what ``docs/results.md`` shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from ace import plotting
from ace.history import replace_file
from ace.results import load_histories, load_results, table
from benchmarks.methods import METHODS

METRICS = {
    "test_shipped": "test, shipped",
    "test_relaxed": "test, relaxed",
    "test_restored": "test, restored",
    "equivariance_error": "equivariance error",
    "cpu_ms_per_step": "CPU ms/step",
    "peak_memory_mb": "peak MB",
}
"""Columns of the tables; lower is better in all of them."""
TRAJECTORIES = ["ace", "ace-paper", "ace-resilient"]


def report(folder: Path, out: Path) -> None:
    """Write ``runs.csv``, ``tables.md`` and the figures of a suite.

    Args:
        folder: Folder of the suite.
        out: Where to.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = load_results(folder)
    runs["run"] = [str(Path(run)) for run in runs["run"]]
    runs["cpu_ms_per_step"] = 1000 * runs["cpu_seconds_per_step"]
    if (out / "runs.csv").exists():  # runs of earlier folders stay, unless this folder has them again
        runs = pd.concat([pd.read_csv(out / "runs.csv"), runs]).drop_duplicates(
            ["task", "model", "method", "seed"], keep="last"
        )
    runs["method"] = pd.Categorical(runs["method"], list(METHODS), ordered=True)
    runs = runs.sort_values(["task", "model", "method", "seed"], ignore_index=True)
    replace_file(out / "runs.csv", runs.to_csv(index=False).encode())
    runs["method"] = runs["method"].astype(str)
    parts = []
    for (task, model), of_pair in runs.groupby(["task", "model"], sort=False):
        parts += [f"### {task}, {model}\n", f"{_setting(of_pair)}\n", _table(of_pair), "", compare(of_pair), ""]
    replace_file(out / "tables.md", "\n".join(parts).encode())
    frame = load_histories(folder)
    for (task, model), of_pair in frame.groupby(["task", "model"], observed=True):
        _draw(of_pair, out / f"{task}-{model}.png")


def compare(runs: pd.DataFrame) -> str:
    """Compare each method with strict training, seed by seed.

    Args:
        runs: One row per run of one task and model.

    Returns:
        A Markdown table: mean difference of the shipped model's test metric, its standard error, and the p-value
        of a paired t-test, multiplied by the number of comparisons (Bonferroni).
    """
    values = runs.pivot_table(index="seed", columns="method", values="test_shipped")
    lines = ["| against `strict` | pairs | difference | p (corrected) |", "|---|---|---|---|"]
    others = [method for method in METHODS if method in values and method != "strict"]
    for method in others:
        pair = values[["strict", method]].dropna()
        difference = pair[method] - pair["strict"]
        p = min(1.0, float(ttest_rel(pair[method], pair["strict"]).pvalue) * len(others)) if len(pair) > 1 else 1.0
        lines.append(
            f"| {method} | {len(pair)} | {difference.mean():+.3g} ± {difference.sem():.2g} "
            f"({100 * difference.mean() / pair['strict'].mean():+.0f} %) | {p:.2g} |"
        )
    return "\n".join(lines)


def _setting(runs: pd.DataFrame) -> str:
    parameters = ", ".join(
        f"{row.method} {row.parameters_train:,} / {row.parameters_inference:,}"
        for row in runs.drop_duplicates("method").itertuples()
    )
    return f"{runs['steps'].iloc[0]:,} steps. Parameters in training / shipped: {parameters}."


def _table(runs: pd.DataFrame) -> str:
    return table(runs.rename(columns=METRICS), list(METRICS.values()))


def _draw(frame: pd.DataFrame, path: Path) -> None:
    """Draw the validation curves of all methods, and γ by layer for the constrained ones (first seed)."""
    methods = [method for method in TRAJECTORIES if method in set(frame["method"])]
    figure = Figure(figsize=(4.2 * (1 + len(methods)), 3.4), layout="constrained", dpi=110)
    first, *others = figure.subplots(1, 1 + len(methods), squeeze=False)[0]
    plotting.plot_learning_curves(frame[frame["quantity"] != "loss"], first)
    for method, ax in zip(methods, others, strict=True):
        rows = frame[(frame["method"] == method) & (frame["seed"] == frame["seed"].min())]
        plotting.plot_gammas(rows.drop(columns="run"), ax).set_title(method)
    figure.savefig(path)


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
