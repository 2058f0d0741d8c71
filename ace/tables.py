"""Tables of a suite: mean ± standard error over seeds, the best marked, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import pandas as pd

from ace.comparison import LEVEL, OPTION, by_setting, case_names, check_seeds, compare, written
from ace.errors import AceError
from ace.results import IDENTITY

Format = Literal["markdown", "latex", "csv"]
Mark = Literal["best", "close", ""]
_CASE = ["task", "model"]
_STATISTICS = ("mean", "error", "n")


def table(
    results: pd.DataFrame,
    metrics: str | Sequence[str] = "test_shipped",
    format: Format = "markdown",  # noqa: A002  the word users type
    unmarked: Collection[str] = (),
) -> str:
    """Compare methods: mean ± standard error over seeds of each task × model × method, one row each.

    The standard error is s/√n, with s the standard deviation over the n seeds (n - 1 in its denominator);
    one seed has none. Of each task and model the lowest mean is bold, if there are several methods; those that
    are not significantly worse, by the paired test of ``ace.comparison.compare`` at 5 %, are italic (underlined in
    LaTeX). A seed without a value (a run that diverged) does not count: the cell then says how many of the seeds
    it stands for, and is never marked. Where options were swept, methods are compared for each value of ``lr`` or
    ``task.train``, and a method is one for each value of an option of its own: see ``ace.comparison.by_setting``.

    Args:
        results: One row per run, as ``load_results`` gives them; rows may be selected before. Tasks,
            models and methods keep their order of appearance; settings of a method are in that of their values.
        metrics: Columns to compare, for all of which lower is better.
        format: ``markdown``; ``latex``, which needs the package booktabs; or ``csv``, with the unrounded
            mean, standard error and number of values of each metric in columns of their own.
        unmarked: Metrics of which nothing is marked, such as an equivariance error: the lowest is rounding.

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
    cases, size, found = _statistics(results, metrics, format, unmarked)
    keys = [*cases, "method"]
    if format == "csv":
        columns = {f"{metric}_{name}": of[name] for metric, of in found.items() for name in _STATISTICS}
        return _csv(pd.DataFrame({"n": size} | columns).reset_index())
    rows = [[*map(_text(format), map(written, key)), str(count)] for *key, count in size.reset_index().to_numpy()]
    for of_metric in found.values():
        for row, count, cell in zip(rows, size, of_metric.itertuples(), strict=True):
            row.append(_cell(cell, count, format))
    heading = [*map(_text(format), keys), "n", *map(_text(format), metrics)]
    return layout(heading, rows, len(keys), format)


def wide_table(
    results: pd.DataFrame,
    metric: str = "test_shipped",
    format: Format = "markdown",  # noqa: A002
    unmarked: Collection[str] = (),
) -> str:
    """Compare methods over all tasks: one row per method, one column per task and model, as in a paper.

    Args:
        results: As for :func:`table`.
        metric: The column to compare, of which lower is better.
        format: As for :func:`table`.
        unmarked: As for :func:`table`.

    Returns:
        The table, ending in a line break, its cells marked as in :func:`table`. Methods are in order of appearance.

    Raises:
        AceError: As for :func:`table`.

    Example:
        >>> results = pd.DataFrame(
        ...     [(task, "egnn", method, seed, error + 0.01 * seed)
        ...      for task in ("nbody", "mocap") for method, error in (("strict", 0.75), ("ace", 0.5))
        ...      for seed in range(5)],
        ...     columns=["task", "model", "method", "seed", "test"])
        >>> print(wide_table(results, "test"), end="")
        | method | nbody egnn          | mocap egnn          |
        | ------ | ------------------- | ------------------- |
        | strict | 0.7700 ± 0.0071     | 0.7700 ± 0.0071     |
        | ace    | **0.5200 ± 0.0071** | **0.5200 ± 0.0071** |
    """
    cases, size, found = _statistics(results, [metric], format, unmarked)
    of_metric = found[metric]
    keys = list(dict.fromkeys(key[:-1] for key in of_metric.index))
    names = dict(zip(keys, map(" ".join, case_names(keys, cases[2:])), strict=True))
    methods = list(dict.fromkeys(key[-1] for key in of_metric.index))
    if format == "csv":
        columns = {
            f"{name} {statistic}": of_metric.xs(case, level=cases)[statistic].reindex(methods)
            for case, name in names.items()
            for statistic in _STATISTICS
        }
        return _csv(pd.DataFrame(columns, pd.Index(methods, name="method")).reset_index())
    cells = {
        key: _cell(row, size[key], format) for key, row in zip(of_metric.index, of_metric.itertuples(), strict=True)
    }
    text = _text(format)
    rows = [[text(method), *(cells.get((*case, method), "") for case in names)] for method in methods]
    return layout(["method", *map(text, names.values())], rows, 1, format)


def _statistics(
    results: pd.DataFrame,
    metrics: Sequence[str],
    format: Format,  # noqa: A002
    unmarked: Collection[str],
) -> tuple[list[str], pd.Series[int], dict[str, pd.DataFrame]]:
    """Columns of a case, number of runs, and for each metric mean, standard error, number of values and mark."""
    if format not in {"markdown", "latex", "csv"}:
        raise AceError(f"format {format!r}: give markdown, latex or csv")
    _check_columns(results, metrics)
    named, conditions = by_setting(results)
    cases = [*_CASE, *conditions]
    check_seeds(named, [*cases, "method", "seed"])
    # categories sort the groups: options by their values, all else in order of appearance
    order = {key: pd.Categorical(named[key], categories=named[key].unique()) for key in _CASE}
    order["method"] = pd.Categorical(named["method"], categories=_methods(results, named["method"]))
    order |= {key: pd.Categorical(named[key], categories=sorted(named[key].unique(), key=_place)) for key in conditions}
    numbers = {metric: named[metric].astype(float) for metric in metrics}  # None, too, is a missing value
    grouped = named.assign(**order, **numbers).groupby([*cases, "method"], observed=True)
    size = grouped.size()
    found = {}
    for metric in metrics:
        of_metric = grouped[metric]
        marks = [""] * len(size) if metric in unmarked else _marks(named, metric, cases, size)
        found[metric] = pd.DataFrame(
            {"mean": of_metric.mean(), "error": of_metric.sem(), "n": of_metric.count(), "mark": marks}
        )
    return cases, size, found


def _methods(results: pd.DataFrame, named: pd.Series[str]) -> list[str]:
    """Names of the methods in order of appearance, those of one method by the values of its options."""
    options = [column for column in map(str, results) if column.startswith(f"{OPTION}method.")]
    values = {column: pd.to_numeric(results[column], errors="coerce").to_numpy() for column in options}
    frame = pd.DataFrame({"method": pd.factorize(results["method"])[0], "name": named.to_numpy()} | values)
    return list(frame.sort_values(["method", *options], kind="stable")["name"].unique())


def _check_columns(results: pd.DataFrame, metrics: Sequence[str]) -> None:
    absent = [column for column in (*IDENTITY, *metrics) if column not in results]
    if absent:
        raise AceError(f"no column {', '.join(absent)} among {', '.join(results.columns)}")
    if results.empty:
        raise AceError("no finished run: a table needs at least one")
    text = [metric for metric in metrics if not pd.api.types.is_numeric_dtype(results[metric].dropna())]
    text = [metric for metric in text if results[metric].notna().any()]
    if text:
        raise AceError(f"not numbers: column {', '.join(text)}")


def _marks(named: pd.DataFrame, metric: str, cases: list[str], size: pd.Series[int]) -> list[Mark]:
    """Which rows are best in their case, and which are not significantly worse, if there are several."""
    compared = compare(named, metric, cases).reindex(size.index)
    several = compared.groupby(level=cases, observed=True)["p"].transform("size") > 1
    good = compared["p"] >= LEVEL
    return [
        "best" if best and many else "close" if close and many else ""
        for best, close, many in zip(compared["best"], good, several, strict=True)
    ]


def _cell(row: Any, count: int, format: Format) -> str:  # noqa: A002
    write = _markdown_cell if format == "markdown" else _latex_cell
    return write(row.mean, row.error, row.mark) + ("" if row.n == count else f" ({row.n} of {count})")


def _place(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


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


def _text(format: Format) -> Callable[[str], str]:  # noqa: A002
    """Return what writes plain text in a format."""
    if format == "markdown":
        return lambda text: text.replace("|", r"\|")
    return lambda text: "".join(_LATEX.get(character, character) for character in text)


_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def layout(heading: list[str], rows: list[list[str]], keys: int = 1, format: Format = "markdown") -> str:  # noqa: A002
    """Lay a table out.

    Args:
        heading: Of each column.
        rows: Their cells, each as many as there are columns.
        keys: How many of the first columns name the row; LaTeX aligns them to the left, the others to the right.
        format: ``markdown`` or ``latex``.

    Returns:
        The table, ending in a line break.

    Example:
        >>> print(layout(["method", "error"], [["strict", "0.75"], ["ace", "0.5"]]), end="")
        | method | error |
        | ------ | ----- |
        | strict | 0.75  |
        | ace    | 0.5   |
    """
    if format == "markdown":
        widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
        lines = [heading, ["-" * width for width in widths], *rows]
        return "".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
            for line in lines
        )
    first, *others = [" & ".join(line) + r" \\" for line in (heading, *rows)]
    begin = rf"\begin{{tabular}}{{{'l' * keys}{'r' * (len(heading) - keys)}}}"
    return "\n".join([begin, r"\toprule", first, r"\midrule", *others, r"\bottomrule", r"\end{tabular}", ""])


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n"))
