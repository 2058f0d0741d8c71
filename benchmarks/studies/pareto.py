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
from matplotlib.ticker import LogLocator, NullLocator

from ace.comparison import EXACT, OPTION, by_setting
from ace.errors import AceError
from ace.history import replace_file
from ace.tables import layout, table
from benchmarks.report import added

NEAR = 4.0
"""Settings whose errors differ by more than this factor are not joined: nothing is known of what lies between."""
COLUMNS = {
    "test_shipped": "test",
    "equivariance_rms": "error (rms)",
    "equivariance_p95": "error (95th percentile)",
    "cpu_ms_per_step": "CPU ms/step",
}
PAIR = ["task", "model"]
OF_MODEL = "ace-resilient, whole model"
"""The method that pays for the error of the model, not for the terms of its layers."""
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Of the vertical axis, in each decade."""
NARROW = (1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
"""The same where the highest point is less than three times the lowest."""
STYLE = {
    "strict": ("black", "*"),
    "ace": ("tab:red", "X"),
    "ace-resilient": ("tab:orange", "o"),
    OF_MODEL: ("darkred", "p"),
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
    runs = added(out / "pareto.csv", folder)
    runs["cpu_ms_per_step"] = 1000 * runs["cpu_seconds_per_step"]
    parts, kept = [], []
    for (task, model), of_task in runs.groupby(PAIR, sort=False):
        of_pair = complete(priced(of_task))
        parts += [f"### {task}, {model}\n", f"{of_pair['steps'].iloc[0]:,} steps.\n"]
        shown = of_pair.drop(columns=[column for column in of_pair if column.startswith(OPTION)])
        columns = {"setting": "method", **COLUMNS}
        parts += [table(shown.drop(columns="method").rename(columns=columns), list(COLUMNS.values())), ""]
        kept += [f"### {task}, {model}\n", tolerances(of_pair)]
        draw(of_pair, out / f"pareto-{task}-{model}.png")
    replace_file(out / "pareto.md", "\n".join(parts).encode())
    replace_file(out / "tolerance.md", "\n".join(kept).encode())


def priced(runs: pd.DataFrame) -> pd.DataFrame:
    """Tell the settings of each method apart.

    Args:
        runs: One row per run of one task and model, methods in order.

    Returns:
        The rows, with ``setting`` (the method with the option that was swept) and ``value`` (of that option, else 0),
        in whose order they are within a method. What `ace-resilient` pays for makes two methods of it.
    """
    if (measure := f"{OPTION}method.measure") in runs:
        of_model = runs[measure] == "equivariance"
        runs = runs.assign(method=runs["method"].mask(of_model, OF_MODEL)).drop(columns=measure)
    setting = by_setting(runs)[0]["method"]
    value = pd.to_numeric(setting.str.rpartition("=")[2], errors="coerce").fillna(0.0)
    order = {method: number for number, method in enumerate(runs["method"].unique())}
    return runs.assign(setting=setting, value=value).sort_values(
        ["method", "value", "seed"], key=lambda column: column.map(order) if column.name == "method" else column
    )


def complete(runs: pd.DataFrame) -> pd.DataFrame:
    """Keep the seeds of which every setting is done, and compare each with strict training from the same seed.

    Seeds differ by more than methods do.

    Raises:
        AceError: There is no run of strict training.
    """
    if "strict" not in set(runs["method"]):
        raise AceError(f"{runs['task'].iloc[0]}, {runs['model'].iloc[0]}: no run of strict training to compare with")
    settings = runs.groupby("seed").size()
    runs = runs[runs["seed"].isin(settings.index[settings == settings.max()])]
    strict = runs[runs["method"] == "strict"].set_index("seed")["test_shipped"]
    return runs.assign(relative=runs["test_shipped"] / runs["seed"].map(strict))


def tolerances(runs: pd.DataFrame) -> str:
    """Say for each tolerance whether it was kept on the test split, and what the best rival reaches at that error.

    Args:
        runs: One row per run of one task and model.

    Returns:
        A Markdown table. The rival's test error is read off its front, see `at_error`.
    """
    ours = runs[runs["method"] == "ace-tolerance"]
    rivals = [method for method in runs["method"].unique() if method not in ("ace-tolerance", "ace-paper")]
    heading = ["ε", "kept on test data", "error (rms)", "largest", "95th percentile", "test", "relative to strict"]
    lines = []
    for value, of_value in ours.groupby(f"{OPTION}method.eps"):
        error, relative = of_value["equivariance_rms"], of_value["relative"]
        reached = {rival: at_error(runs[runs["method"] == rival], error.mean()) for rival in rivals}
        best = min(reached, key=reached.__getitem__)
        cells = [f"{value:g}", f"{(error <= value).sum()} of {len(error)}", f"{error.mean():.3g}", f"{error.max():.3g}"]
        cells += [f"{of_value['equivariance_p95'].mean():.3g}", f"{of_value['test_shipped'].mean():.3g}"]
        cells += [f"{relative.mean():.3f} ± {relative.sem():.1g}", f"{reached[best]:.3f} ({best})"]
        lines.append(cells)
    return layout([*heading, "best rival at this error, relative to strict"], lines)


def at_error(rival: pd.DataFrame, error: float) -> float:
    """Return the test error, relative to strict, that a method reaches at an equivariance error when tuned to it.

    Means over the seeds of each setting; neighbours that are near are joined by straight lines over the logarithm of
    the error. Where none of its settings is that symmetric, a method is taken to reach strict training.
    """
    means = rival.groupby("setting")[["equivariance_rms", "relative"]].mean().sort_values("equivariance_rms")
    x, y = means["equivariance_rms"].to_numpy(), means["relative"].to_numpy()
    around = [pair for pair in near(x) if x[pair[0]] <= error <= x[pair[1]]]
    between = [float(np.interp(np.log(error), np.log(x[pair]), y[pair])) for pair in around]
    return min([1.0, *y[x <= error], *between])


def near(x: np.ndarray) -> list[list[int]]:
    """Return the pairs of neighbours in ascending errors that may be joined."""
    pairs = [[left, left + 1] for left in range(len(x) - 1)]
    return [pair for pair in pairs if x[pair[0]] > EXACT and x[pair[1]] < NEAR * x[pair[0]]]


def draw(runs: pd.DataFrame, path: Path) -> None:
    """Draw the fronts of one task and model; exactly equivariant models stand left of the axis break."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=120)
    ax = figure.subplots()
    inexact = runs.loc[runs["equivariance_rms"] > EXACT, "equivariance_rms"]
    edge = inexact.groupby([runs["method"], runs["setting"]]).mean().min() / 10 if len(inexact) else EXACT
    exact = 0
    for method in runs["method"].unique():
        of_method = runs[runs["method"] == method]
        grouped = of_method.groupby("setting")[["equivariance_rms", "relative"]]
        means, errors = grouped.mean(), grouped.sem().fillna(0.0)
        place = means.sort_values("equivariance_rms").index
        y = means.loc[place, "relative"]
        x = means.loc[place, "equivariance_rms"].copy()
        is_exact = x < EXACT
        x[is_exact] = edge * 1.12**exact  # side by side
        exact += int(is_exact.any())
        reach = errors.loc[place, "equivariance_rms"].where(~is_exact, 0.0)
        colour, marker = STYLE.get(method, ("tab:gray", "."))
        ours = method == "ace-tolerance"
        for pair in near(means.loc[place, "equivariance_rms"].to_numpy()):
            ax.plot(x.iloc[pair], y.iloc[pair], color=colour, linewidth=2.2 if ours else 1.0, zorder=2)
        ax.errorbar(
            x,
            y,
            xerr=[np.minimum(reach, 0.7 * x), reach],
            yerr=errors.loc[place, "relative"],
            color=colour,
            marker=marker,
            markersize=8 if ours or len(place) == 1 else 5,
            linestyle="none",
            elinewidth=0.8,
            zorder=3 if ours else 2,
            label=method,
        )
    ax.set(xscale="log", yscale="log", xlabel="equivariance error of the shipped model on test data (rms)")
    ax.set_ylabel("test error of the shipped model, relative to strict")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=NARROW if high < 3 * low else TICKS, numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter("{x:g}")
    ax.axvline(4 * edge, color="0.7", linewidth=0.8, linestyle=":")
    ax.annotate("exact", (edge, 1.0), xycoords=("data", "axes fraction"), ha="left", va="bottom", fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    report(Path(sys.argv[1]), Path(sys.argv[2]))
