"""The pages of a suite: from the folder of its runs to one compact CSV, and from that to tables and figures.

``python -m benchmarks.report quick docs/results --runs results/quick`` adds the runs of a folder to
``docs/results/quick.csv`` and writes what the page of that suite shows; without ``--runs`` it is built from the CSV
alone. Files begin with the name of the suite: ``-tables.md`` (each task and model), ``-wide.md``, ``-wide.tex`` and
``-wide.csv`` (a row a method), ``-comparison.png`` (the same at a glance), ``-ranks.md`` and ``-ranks.png``,
``-TASK-MODEL-OPTION.png`` for each swept option, and ``-TASK-MODEL.png``, the curves, which need the histories of the
runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ace import plotting
from ace.comparison import OPTION, by_setting, compare, rank, relative, written
from ace.errors import AceError
from ace.history import replace_file
from ace.results import IDENTITY, load_histories, load_results, status
from ace.tables import layout, table, wide_table
from benchmarks.config import load_run
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
ERRORS = ("equivariance error", "equivariance_rms")
"""Columns in which nothing is marked as best: the lowest is rounding."""
WIDE = {
    "test_shipped": "Test error of the shipped model, relative to {reference} with the same seed",
    "equivariance_rms": "Equivariance error of the shipped model on test data (root mean square over samples)",
    "cpu_ms_per_step": "Processor time of a training step, relative to {reference} with the same seed",
}
"""Columns of the wide tables, and their headings."""
CURVES = ["strict", "unconstrained", "penalty", "linear-decay", "ace", "ace-tolerance"]
TRAJECTORIES = ["ace", "ace-paper", "ace-resilient"]


def report(name: str, out: Path, folder: Path | None = None, reference: str = "strict") -> None:
    """Write the files of a suite's page.

    Args:
        name: Name of the suite, with which the files begin.
        out: Where to; ``NAME.csv`` there may hold rows of earlier folders.
        folder: Folder of the suite's runs, if they are to be added. A run replaces the same one of an earlier folder.
        reference: The method, with its setting where that was swept, to which the wide tables are relative.
    """
    out.mkdir(parents=True, exist_ok=True)
    runs = added(out / f"{name}.csv", folder)
    runs["cpu_ms_per_step"] = 1000 * runs["cpu_seconds_per_step"]
    _write(out / f"{name}-tables.md", _tables(runs))
    _write(out / f"{name}-wide.md", _wide(runs, reference))
    scores = relative(runs, "test_shipped", reference)
    _write(out / f"{name}-wide.tex", wide_table(scores, format="latex"))
    _write(out / f"{name}-wide.csv", wide_table(scores, format="csv"))
    if "equivariance_rms" in runs:
        plotting.plot_comparison(runs, out / f"{name}-comparison.png", to=reference)
    named, conditions = by_setting(runs)
    try:
        ranks = rank(named, cases=["task", "model", *conditions])
    except AceError:  # too little to rank
        pass
    else:
        _write(out / f"{name}-ranks.md", str(ranks))
        plotting.plot_ranks(ranks, out / f"{name}-ranks.png")
    for (task, model), of_pair in runs.groupby(["task", "model"], sort=False):
        for option in by_setting(of_pair)[1]:
            ax = plotting.plot_sweep(of_pair, option, ax=_axes())
            ax.figure.savefig(out / f"{name}-{task}-{model}-{option}.png")
    if folder is not None and not conditions:
        frame = load_histories(folder)
        for (task, model), of_pair in frame.groupby(["task", "model"], observed=True):
            same = (runs["task"] == task) & (runs["model"] == model)
            _draw(of_pair, runs[same], out / f"{name}-{task}-{model}.png")


def added(path: Path, folder: Path | None) -> pd.DataFrame:
    """Add the runs of a folder to a CSV; return the rows as it has them, from which a page can be had again."""
    replace_file(path, gather(path, folder).to_csv(index=False, float_format="%.7g").encode())
    return gather(path, None)


def gather(path: Path, folder: Path | None) -> pd.DataFrame:
    """Return the rows of a CSV, if there is one, and of a folder, which replace those of the same run in the CSV.

    Args:
        path: The CSV.
        folder: Folder of runs, or None.

    Returns:
        One row per run that is done or failed, the latter without results: by task and model in order of appearance,
        method in the order of the benchmarks, and seed.

    Raises:
        AceError: There is neither.
    """
    frames = [pd.read_csv(path)] if path.exists() else []
    if folder is not None:
        frames += [load_results(folder), _failed(folder)]
    runs = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    if runs.empty:
        raise AceError(f"no runs: there is no {path}, and no folder with runs was given")
    runs = runs.drop_duplicates("config_hash", keep="last")
    for option in [column for column in runs if column.startswith(OPTION)]:
        runs[option] = _alike(runs[option])
    return in_order(runs)


def in_order(runs: pd.DataFrame) -> pd.DataFrame:
    """Sort by task and model in order of appearance, method in the order of the benchmarks, and seed."""
    runs = runs.reset_index(drop=True)
    orders = {column: list(runs[column].unique()) for column in ("task", "model")} | {"method": list(METHODS)}
    by_place = {column: pd.Categorical(runs[column], values) for column, values in orders.items()}
    places = runs.assign(**by_place).sort_values(list(IDENTITY), kind="stable").index
    return runs.loc[places].reset_index(drop=True)


def _alike(values: pd.Series) -> pd.Series:
    """Give the values of an option one type: a CSV has 2000 as text where it has a word as well, a folder as number."""
    text = values.map(written, na_action="ignore")
    numbers = pd.to_numeric(text, errors="coerce")
    return numbers if numbers.notna().equals(text.notna()) else text


def _failed(folder: Path) -> pd.DataFrame:
    """Return a row without results for each run that failed."""
    rows = []
    states = status(folder)
    for path in states.loc[states["status"] == "failed", "run"]:
        config = load_run(folder / path / "config.yaml")
        identity = {"task": config.task.name, "model": config.model.name, "method": config.method.name}
        rows.append({"run": path, "status": "failed", **identity, "seed": config.seed, "steps": config.steps})
        rows[-1] |= {"config_hash": config.hash, **config.options()}
    return pd.DataFrame(rows)


def against_strict(runs: pd.DataFrame) -> str:
    """Compare each method with strict training, seed by seed.

    Args:
        runs: One row per run of one task and model, under the same conditions.

    Returns:
        A Markdown table: mean difference of the shipped model's test metric, its standard error, and the p-value of
        ``ace.comparison.compare``: two-sided, paired by seeds, adjusted for the number of methods.
    """
    values = runs.pivot_table(index="seed", columns="method", values="test_shipped", sort=False)
    p = compare(runs, against="strict").droplevel(["task", "model"])["p"]
    rows = []
    for method in [method for method in values if method != "strict"]:
        pair = values[["strict", method]].dropna()
        difference = pair[method] - pair["strict"]
        percent = 100 * difference.mean() / pair["strict"].mean()
        cell = f"{difference.mean():+.3g} ± {difference.sem():.2g} ({percent:+.0f} %)"
        rows.append([method, str(len(pair)), cell, f"{p[method]:.2g}"])
    return layout(["against `strict`", "pairs", "difference", "p (corrected)"], rows)


def _tables(runs: pd.DataFrame) -> str:
    parts = []
    for (task, model), of_pair in runs.groupby(["task", "model"], sort=False):
        columns = of_pair.rename(columns=METRICS)
        parts += [
            f"### {task}, {model}\n",
            f"{_setting(of_pair)}\n",
            table(columns, list(METRICS.values()), unmarked=ERRORS),
        ]
        named, conditions = by_setting(of_pair)
        if not conditions and "strict" in set(named["method"]):
            parts.append(against_strict(named))
    return "\n".join(parts)


def _wide(runs: pd.DataFrame, reference: str) -> str:
    parts = []
    named = "strict training" if reference == "strict" else reference
    for metric, heading in WIDE.items():
        if metric in runs:
            shown = relative(runs, metric, reference) if "relative" in heading else runs
            parts += [f"### {heading.format(reference=named)}\n", wide_table(shown, metric, unmarked=ERRORS)]
    return "\n".join(parts)


def _setting(runs: pd.DataFrame) -> str:
    parameters = ", ".join(
        f"{row.method} {row.parameters_train:,} / {row.parameters_inference:,}"
        for row in runs.drop_duplicates("method").itertuples()
    )
    steps = ", ".join(f"{steps:,}" for steps in sorted(runs["steps"].unique()))
    return f"{steps} steps. Parameters in training / shipped: {parameters}."


def _draw(frame: pd.DataFrame, runs: pd.DataFrame, path: Path) -> None:
    """Draw the validation curves of what some methods ship, and γ by layer for the constrained ones (first seed).

    A folder with none of these methods leaves the figure as it is.
    """
    with_terms = (runs["test_shipped"] != runs["test_restored"]).groupby(runs["method"]).any()
    shipped = frame["method"].astype(str).map(with_terms).map({True: "valid_relaxed", False: "valid_restored"})
    curves = frame[frame["method"].isin(CURVES) & (frame["quantity"].astype(str) == shipped)]
    if curves.empty:
        return
    methods = [method for method in TRAJECTORIES if method in set(frame["method"])]
    figure = Figure(figsize=(4.2 * (1 + len(methods)), 3.4), layout="constrained", dpi=110)
    first, *others = figure.subplots(1, 1 + len(methods), squeeze=False)[0]
    plotting.plot_learning_curves(curves, first)
    if (key := first.get_legend()) is not None:  # beside the curves, which fill the axes
        key.set_loc("center left")
        key.set_bbox_to_anchor((1.0, 0.5))
    for method, ax in zip(methods, others, strict=True):
        rows = frame[(frame["method"] == method) & (frame["seed"] == frame["seed"].min())]
        plotting.plot_gammas(rows.drop(columns="run"), ax).set_title(method)
    figure.savefig(path)


def _axes() -> plotting.Axes:
    return Figure(figsize=(7.2, 4.4), layout="constrained", dpi=110).subplots()


def _write(path: Path, text: str) -> None:
    replace_file(path, text.encode())


def main(words: Sequence[str] | None = None) -> None:
    """Write the files of the page of a suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the suite")
    parser.add_argument("out", type=Path, help="folder of the files, such as docs/results")
    parser.add_argument("--runs", type=Path, help="folder of the suite's runs")
    parser.add_argument(
        "--relative-to", default="strict", metavar="METHOD", help='"strict", or such as "ace, polish=0.2"'
    )
    options = parser.parse_args(words)
    report(options.name, options.out, options.runs, options.relative_to)


if __name__ == "__main__":
    main()
