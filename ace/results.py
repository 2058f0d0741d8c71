"""Results of a suite: run folders in, data frames and tables out.

A run is a folder with a ``config.yaml``, wherever it lies under the folder given. Its ``summary.json``, a
flat object with at least ``task``, ``model``, ``method`` and ``seed``, is written last: its presence means
the run is done.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from ace.comparison import LEVEL, compare
from ace.errors import AceError, DataError
from ace.history import History

Mark = Literal["best", "close", ""]
_ROW = ("task", "model", "method")  # of a table
_IDENTITY = (*_ROW, "seed")  # of a run


def load_results(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Gather the summaries of all finished runs.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        One row per finished run, in order of their paths: ``run`` (the path of its folder relative to
        ``folder``), ``task``, ``model``, ``method``, ``seed``, then whatever the summaries hold, missing
        where one does not. Unfinished and failed runs have no row: see :func:`status`.

    Raises:
        DataError: If there is no such folder, or summaries are damaged; all of them are named.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for seed in (0, 1):
        ...     run = folder / f"seed{seed}"
        ...     run.mkdir()
        ...     _ = (run / "config.yaml").write_text("")
        ...     summary = {"task": "nbody", "model": "egnn", "method": "ace", "seed": seed, "test": 0.5 + seed}
        ...     _ = (run / "summary.json").write_text(json.dumps(summary))
        >>> load_results(folder)
             run   task model method  seed  test
        0  seed0  nbody  egnn    ace     0   0.5
        1  seed1  nbody  egnn    ace     1   1.5
    """
    rows, damaged = [], []
    for run, files in _runs(folder):
        if "summary.json" not in files:
            continue
        path = Path(folder, run, "summary.json")
        try:
            summary = json.loads(path.read_bytes())
        except FileNotFoundError:  # removed since
            continue
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        missing = [key for key in _IDENTITY if key not in summary] if isinstance(summary, dict) else _IDENTITY
        if missing:
            damaged.append(f"{path}: no {', '.join(missing)}")
        else:
            rows.append({"run": run} | {key: summary[key] for key in _IDENTITY} | summary)
    if damaged:
        raise DataError("damaged summaries; remove them and run the suite again:\n  " + "\n  ".join(damaged))
    return pd.DataFrame(rows, columns=None if rows else ["run", *_IDENTITY])


def load_histories(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Gather the histories of all finished runs: the frame that the functions of ``plotting`` take.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        Columns ``run``, ``task``, ``model``, ``method`` (categories), ``seed``, then those of
        ``History.frame()``. A finished run without a ``history.csv`` has no rows.

    Raises:
        DataError: If there is no such folder, or a summary or history is damaged.

    Example:
        >>> import tempfile
        >>> list(load_histories(tempfile.mkdtemp()).columns[:5])
        ['run', 'task', 'model', 'method', 'seed']
    """
    runs = load_results(folder)[["run", *_IDENTITY]]
    paths = [Path(folder, run, "history.csv") for run in runs["run"]]
    runs = runs[np.array([path.is_file() for path in paths], dtype=bool)]
    frames = [History.load(path).frame() for path in paths if path.is_file()]
    of_row = np.repeat(np.arange(len(runs)), [len(frame) for frame in frames])
    frames = frames or [History().frame()]  # the columns, where there is no run
    for column in ("layer", "quantity"):
        names = dict.fromkeys(name for frame in frames for name in frame[column].cat.categories)
        for frame in frames:  # the same categories everywhere, or concatenation would give them up
            frame[column] = frame[column].cat.set_categories(list(names))
    identity = runs.iloc[of_row].reset_index(drop=True)
    for column in ("run", *_ROW):
        identity[column] = pd.Categorical(identity[column], categories=runs[column].unique())
    return pd.concat([identity, pd.concat(frames, ignore_index=True)], axis=1)


def status(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Tell how far each run that was ever started has come.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        One row per run folder, in order of their paths: ``run``, ``status`` (a category) and ``detail``.
        A run is ``done`` if it has a summary, else ``failed`` if it has an ``error.txt``, whose last line
        is the detail, else ``interrupted``: it may also be running still. The detail then says whether
        there is a checkpoint to continue from. Runs never started have no folder, hence no row.

    Raises:
        DataError: If there is no such folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.yaml").write_text("")
        >>> _ = (folder / "error.txt").write_text("NonFiniteLoss: loss is nan at step 812")
        >>> status(folder)
          run  status                                  detail
        0   .  failed  NonFiniteLoss: loss is nan at step 812
    """
    rows = []
    for run, files in _runs(folder):
        if "summary.json" in files:
            state, detail = "done", ""
        elif "error.txt" in files:
            lines = Path(folder, run, "error.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            state, detail = "failed", next((line for line in reversed(lines) if line.strip()), "")
        else:
            state, detail = "interrupted", "has a checkpoint" if "checkpoint.pt" in files else "no checkpoint yet"
        rows.append((run, state, detail))
    frame = pd.DataFrame(rows, columns=["run", "status", "detail"])
    return frame.assign(status=pd.Categorical(frame["status"], categories=["done", "failed", "interrupted"]))


def table(
    results: pd.DataFrame,
    metrics: str | Sequence[str] = "test_shipped",
    format: Literal["markdown", "latex", "csv"] = "markdown",  # noqa: A002  the word users type
) -> str:
    """Compare methods: mean ± standard error over seeds of each task × model × method.

    The standard error is s/√n, with s the standard deviation over the n seeds (n - 1 in its denominator);
    one seed has none. Of each task and model the lowest mean is bold, if there are several methods; those that
    are not significantly worse, by the paired test of ``ace.comparison.compare`` at 5 %, are italic (underlined in
    LaTeX). A seed without a value (a run that diverged) does not count: the cell then says how many of the seeds
    it stands for, and is never marked.

    Args:
        results: One row per run, as :func:`load_results` gives them; rows may be selected before. Tasks,
            models and methods keep their order of appearance.
        metrics: Columns to compare, for all of which lower is better.
        format: ``markdown``; ``latex``, which needs the package booktabs; or ``csv``, with the unrounded
            mean, standard error and number of values of each metric in columns of their own.

    Returns:
        The table, ending in a line break.

    Raises:
        AceError: If the format is unknown, a column is missing or not numeric, there is no run, or a
            seed appears twice in the same task, model and method: those are runs of different
            configurations, and their mean would mean nothing.

    Example:
        >>> results = pd.DataFrame(
        ...     [("nbody", "egnn", method, seed, error + 0.01 * seed)
        ...      for method, error in (("strict", 0.75), ("ace", 0.5)) for seed in range(5)],
        ...     columns=["task", "model", "method", "seed", "test"])
        >>> print(table(results, "test"), end="")
        | task  | model | method | n | test                |
        | ----- | ----- | ------ | - | ------------------- |
        | nbody | egnn  | strict | 5 | 0.7700 ± 0.0071     |
        | nbody | egnn  | ace    | 5 | **0.5200 ± 0.0071** |
    """
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    if format not in {"markdown", "latex", "csv"}:
        raise AceError(f"format {format!r}: give markdown, latex or csv")
    _check_results(results, metrics)
    # categories in order of appearance sort the groups in that order
    names = {key: pd.Categorical(results[key], categories=results[key].unique()) for key in _ROW}
    numbers = {metric: results[metric].astype(float) for metric in metrics}  # None, too, is a missing value
    grouped = results.assign(**names, **numbers).groupby(list(_ROW), observed=True)
    size = grouped.size()
    statistics = {
        metric: pd.DataFrame(
            {"mean": grouped[metric].mean(), "error": grouped[metric].sem(), "n": grouped[metric].count()}
        )
        for metric in metrics
    }
    if format == "csv":
        columns = {
            f"{metric}_{name}": statistic[name]
            for metric, statistic in statistics.items()
            for name in ("mean", "error", "n")
        }
        return str(pd.DataFrame({"n": size} | columns).reset_index().to_csv(index=False, lineterminator="\n"))

    cell, text = (_markdown_cell, _markdown_text) if format == "markdown" else (_latex_cell, _latex_text)
    rows = [[*(text(str(part)) for part in key), str(count)] for *key, count in size.reset_index().to_numpy().tolist()]
    for metric, statistic in statistics.items():
        values = zip(statistic["mean"], statistic["error"], statistic["n"], _marks(results, metric, size), strict=True)
        for row, count, (mean, error, n, mark) in zip(rows, size, values, strict=True):
            row.append(cell(mean, error, mark) + ("" if n == count else f" ({n} of {count})"))
    heading = [*_ROW, "n", *map(text, metrics)]
    return _markdown(heading, rows) if format == "markdown" else _latex(heading, rows)


def _runs(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Run folders at or under a folder, in order of their paths: path relative to it, and the names of the files.

    Each folder is listed once, and nothing else is asked of the file system.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; a suite's results lie in the folder it was given")
    top = str(Path(folder))
    for name, below, files in os.walk(top):
        below.sort()
        if "config.yaml" in files:
            below.clear()
            yield Path(name[len(top) :].lstrip(os.sep)).as_posix(), files


def _check_results(results: pd.DataFrame, metrics: list[str]) -> None:
    absent = [column for column in (*_IDENTITY, *metrics) if column not in results]
    if absent:
        raise AceError(f"no column {', '.join(absent)} among {', '.join(results.columns)}")
    if results.empty:
        raise AceError("no finished run: a table needs at least one")
    text = [metric for metric in metrics if not pd.api.types.is_numeric_dtype(results[metric].dropna())]
    text = [metric for metric in text if results[metric].notna().any()]
    if text:
        raise AceError(f"not numbers: column {', '.join(text)}")
    twice = results[results.duplicated(list(_IDENTITY), keep=False)]
    if not twice.empty:
        lines = [
            "  " + " ".join(map(str, row))
            for row in twice[[*_IDENTITY, *twice.columns.intersection(["run"])]].to_numpy()
        ]
        raise AceError(
            "these seeds appear more than once (task, model, method, seed, run), as runs of different "
            "configurations do: select the rows of one configuration\n" + "\n".join(lines)
        )


def _marks(results: pd.DataFrame, metric: str, size: pd.Series[int]) -> list[Mark]:
    """Which rows are best in their task and model, and which are not significantly worse, if there are several."""
    compared = compare(results, metric).reindex(size.index)
    several = compared.groupby(level=["task", "model"], observed=True)["p"].transform("size") > 1
    good = compared["p"] >= LEVEL
    return [
        "best" if best and many else "close" if close and many else ""
        for best, close, many in zip(compared["best"], good, several, strict=True)
    ]


def _rounded(mean: float, error: float) -> tuple[str, str, int]:
    """Mean and error to two digits of the error, and the power of ten both are in units of.

    Without an error, or with one too small to matter, the mean has four digits; an empty string stands
    for no error.
    """
    if not math.isfinite(mean):
        return str(mean), "", 0
    size = _exponent(mean)
    power = size if size < -3 or size > 4 else 0
    digits = 3 - size + power
    if error > 0:
        digits = min(1 - _exponent(error), 5 - size) + power
    unit, digits = 10.0**power, max(0, digits)
    return f"{mean / unit:.{digits}f}", f"{error / unit:.{digits}f}" if math.isfinite(error) else "", power


def _exponent(value: float) -> int:
    """Power of ten of the first digit after rounding to two: 0 for 1.04, but 1 for 9.96."""
    return int(f"{value:.1e}".partition("e")[2])


def _markdown_cell(mean: float, error: float, mark: Mark) -> str:
    if math.isnan(mean):
        return "–"
    number, deviation, power = _rounded(mean, error)
    cell = f"{number} ± {deviation}" if deviation else number
    if power:
        cell = f"({cell})e{power:+d}" if deviation else f"{cell}e{power:+d}"
    around = {"best": "**", "close": "_", "": ""}[mark]
    return around + cell + around


def _latex_cell(mean: float, error: float, mark: Mark) -> str:
    if math.isnan(mean):
        return "--"
    number, deviation, power = _rounded(mean, error)
    cell = rf"{number} \pm {deviation}" if deviation else number.replace("inf", r"\infty")
    if power:
        cell = rf"({cell}) \times 10^{{{power}}}" if deviation else rf"{cell} \times 10^{{{power}}}"
    return {"best": rf"$\mathbf{{{cell}}}$", "close": rf"$\underline{{{cell}}}$", "": f"${cell}$"}[mark]


def _markdown_text(text: str) -> str:
    return text.replace("|", r"\|")


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    lines = [heading, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def _latex(heading: list[str], rows: list[list[str]]) -> str:
    lines = [" & ".join(line) + r" \\" for line in (heading, *rows)]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{lllr{'r' * (len(heading) - 4)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
