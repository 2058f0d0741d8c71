"""Test error against measured equivariance error: every method, its price or tolerance swept.

``python -m benchmarks.studies.pareto results/pareto docs/results`` writes what ``docs/pareto.md`` shows: a row a run,
the tables, and a figure for each task and model. The runs are those of ``configs/suites/pareto.yaml``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ace.history import replace_file
from ace.results import load_results, table
from benchmarks.methods import METHODS

EXACT = 1e-5
"""An error below this is rounding."""
COLUMNS = {
    "test_shipped": "test",
    "equivariance_rms": "error (rms)",
    "equivariance_p95": "error (95th percentile)",
    "cpu_ms_per_step": "CPU ms/step",
}
PAIR = ["task", "model"]
STYLE = {
    "strict": ("black", "*"),
    "ace": ("tab:red", "X"),
    "ace-resilient": ("tab:orange", "o"),
    "ace-tolerance": ("tab:red", "o"),
    "unconstrained": ("tab:gray", "P"),
    "augmentation": ("tab:olive", "P"),
    "linear-decay": ("tab:cyan", "v"),
    "cosine-decay": ("tab:cyan", "^"),
    "cr": ("tab:blue", "v"),
    "penalty": ("tab:green", "s"),
    "rpp": ("tab:purple", "D"),
    "projection": ("tab:brown", "d"),
    "remul": ("tab:pink", "h"),
    "remul-gradnorm": ("tab:pink", "H"),
}


def report(folder: Path, out: Path) -> None:
    """Write ``pareto.csv``, ``pareto.md``, ``tolerance.md`` and the figures.

    Args:
        folder: Folder of the suite; runs of earlier folders that ``pareto.csv`` holds stay.
        out: Where to.
    """
    runs = load_results(folder)
    runs["run"] = [str(Path(run)) for run in runs["run"]]
    runs["setting"] = runs["setting"].fillna("").astype(str)
    runs["cpu_ms_per_step"] = 1000 * runs["cpu_seconds_per_step"]
    if (out / "pareto.csv").exists():
        old = pd.read_csv(out / "pareto.csv", keep_default_na=False, na_values=["nan"])
        runs = pd.concat([old, runs]).drop_duplicates("config_hash", keep="last")
    order = {method: number for number, method in enumerate(METHODS)}
    runs["value"] = runs["setting"].str.extract(r"=([\d.e-]+)")[0].astype(float).fillna(0.0)
    runs = runs.sort_values([*PAIR, "method", "value", "seed"], key=lambda c: c.map(order) if c.name == "method" else c)
    replace_file(out / "pareto.csv", runs.drop(columns="value").to_csv(index=False).encode())
    parts, kept = [], []
    for (task, model), of_pair in runs.groupby(PAIR, sort=False):
        named = of_pair.assign(method=[_name(*row) for row in of_pair[["method", "setting"]].itertuples(index=False)])
        parts += [f"### {task}, {model}\n", f"{of_pair['steps'].iloc[0]:,} steps.\n"]
        parts += [table(named.rename(columns=COLUMNS), list(COLUMNS.values())), ""]
        kept += [f"### {task}, {model}\n", tolerances(of_pair), ""]
        draw(of_pair, out / f"pareto-{task}-{model}.png")
    replace_file(out / "pareto.md", "\n".join(parts).encode())
    replace_file(out / "tolerance.md", "\n".join(kept).encode())


def tolerances(runs: pd.DataFrame) -> str:
    """Say for each tolerance whether it was kept on the test split, and what the best rival reaches at that error.

    Args:
        runs: One row per run of one task and model.

    Returns:
        A Markdown table. The rival's test error is read off its front, see `at_error`.
    """
    ours = runs[runs["method"] == "ace-tolerance"]
    rivals = [m for m in METHODS if m in set(runs["method"]) and not m.startswith(("ace-tolerance", "ace-paper"))]
    lines = [
        "| ε | kept on test data | error (rms) | largest | 95th percentile | test | best rival at this error |",
        "|---|---|---|---|---|---|---|",
    ]
    for value, of_value in ours.groupby("value"):
        error, test = of_value["equivariance_rms"], of_value["test_shipped"]
        reached = {rival: at_error(runs[runs["method"] == rival], runs, error.mean()) for rival in rivals}
        name = min((rival for rival in reached if np.isfinite(reached[rival])), key=reached.__getitem__, default="")
        best = f"{reached[name]:.3g} ({name})" if name else "none reaches it"
        lines.append(
            f"| {value:g} | {(error <= value).sum()} of {len(error)} | {error.mean():.3g} | {error.max():.3g} "
            f"| {of_value['equivariance_p95'].mean():.3g} | {test.mean():.3g} ± {test.sem():.2g} | {best} |"
        )
    return "\n".join(lines)


def at_error(rival: pd.DataFrame, runs: pd.DataFrame, error: float) -> float:
    """Return the test error that a method reaches at an equivariance error, as if it had been tuned to it.

    Means over the seeds of each setting, joined by straight lines over the logarithm of the error. To the left of its
    most symmetric setting a method is taken to reach strict training. Infinite if no setting is that symmetric.
    """
    means = rival.groupby("setting")[["equivariance_rms", "test_shipped"]].mean().sort_values("equivariance_rms")
    strict = runs.loc[runs["method"] == "strict", "test_shipped"].mean()
    x, y = means["equivariance_rms"].to_numpy(), means["test_shipped"].to_numpy()
    reached = [strict] if np.isfinite(strict) else []
    reached += list(y[x <= error])
    for left, right in zip(range(len(x) - 1), range(1, len(x)), strict=True):
        if EXACT < x[left] <= error <= x[right]:
            reached.append(float(np.interp(np.log(error), np.log(x[[left, right]]), y[[left, right]])))
    return min(reached, default=np.inf)


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Draw the fronts of one task and model; exactly equivariant models stand left of the axis break."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=120)
    ax = figure.subplots()
    inexact = runs.loc[runs["equivariance_rms"] > EXACT, "equivariance_rms"]
    edge = 10 ** np.floor(np.log10(inexact.min())) / 3 if len(inexact) else EXACT
    for method in [m for m in METHODS if m in set(runs["method"])]:
        of_method = runs[runs["method"] == method]
        grouped = of_method.groupby("setting")[["equivariance_rms", "test_shipped"]]
        means, errors = grouped.mean(), grouped.sem().fillna(0.0)
        place = means.sort_values("equivariance_rms").index
        x = means.loc[place, "equivariance_rms"].clip(lower=edge)
        colour, marker = STYLE.get(method, ("tab:gray", "."))
        ours = method == "ace-tolerance"
        ax.errorbar(
            x,
            means.loc[place, "test_shipped"],
            xerr=errors.loc[place, "equivariance_rms"].where(x > edge, 0.0),
            yerr=errors.loc[place, "test_shipped"],
            color=colour,
            marker=marker,
            markersize=8 if ours or len(place) == 1 else 5,
            linewidth=2.2 if ours else 1.0,
            linestyle="-" if len(place) > 1 else "none",
            elinewidth=0.8,
            zorder=3 if ours else 2,
            label=method,
        )
    ax.set(xscale="log", yscale="log", xlabel="equivariance error of the shipped model on test data (rms)")
    ax.set_ylabel("test error of the shipped model")
    ax.axvline(1.6 * edge, color="0.7", linewidth=0.8, linestyle=":")
    ax.annotate("exact", (edge, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)


def _name(method: str, setting: str) -> str:
    return f"{method}, {setting}" if setting else method


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
