"""Figures of a history: one function a quantity, a frame in and Axes out."""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ace.comparison import EXACT, Ranks, by_setting, case_names, relative
from ace.errors import AceError
from ace.history import replace_file

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "0.3",
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.use_mathtext": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 100,
    "figure.figsize": (5.0, 3.4),
    "font.size": 9,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,  # text stays text
    "savefig.dpi": 200,
    "svg.fonttype": "none",
    "xtick.color": "0.3",
    "xtick.labelcolor": "black",
    "ytick.color": "0.3",
    "ytick.labelcolor": "black",
}
# Okabe and Ito's colours, told apart with any colour vision; without yellow, too pale for lines
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^D"
_LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
_LABELS = {
    "gamma": "relaxation strength γ",
    "violation": "constraint violation",
    "multiplier": "multiplier λ",
}
_CURVES: dict[str, tuple[str, str, Any, float]] = {  # quantity -> label, colour, line style, line width
    "loss": ("training loss", "0.65", "-", 0.8),
    "valid_relaxed": ("validation, relaxed", _COLOURS[1], (0, (4, 1.5)), 1.4),
    "valid_restored": ("validation, restored", _COLOURS[0], "-", 1.4),
}
_NAMED_LAYERS = 8  # up to here every layer has its line in a legend; beyond, a colour bar over depth
_TICKS = 10  # values of a swept option that each get a tick
_WORST = 3.0  # a ratio above it is written at the edge
_KEPT_NAME = 28  # characters of a layer's path in a legend: the end tells layers apart


def plot_gammas(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the relaxation strength γ of every layer against the step.

    At γ = 0, the marked line, the layer is equivariant. Up to eight layers are named in a legend; more
    are coloured by their depth. With a column ``run`` of several runs, the mean over runs is drawn and,
    for named layers, a band of one standard error.

    Args:
        frame: Rows of a history, ``History.frame()`` or those of one task, model and method of
            ``load_histories``.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on.

    Raises:
        AceError: If the frame has no such rows, or mixes tasks, models or methods.

    Example:
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, layer="layers.0", gamma=1 / step)
        >>> plot_gammas(history.frame(), Figure().subplots()).get_ylabel()
        'relaxation strength γ'
    """
    return _plot_layers(frame, "gamma", ax)


def plot_violations(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the constraint violation of every layer against the step.

    On or below zero, the marked line, the constraint is met. Values over more than a decade get a
    logarithmic scale; if some are not positive, it is linear near zero and logarithmic further off.

    Args:
        frame: As for :func:`plot_gammas`.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on.

    Raises:
        AceError: If the frame has no such rows, or mixes tasks, models or methods.

    Example:
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, layer="layers.0", violation=10.0**-step)
        >>> plot_violations(history.frame(), Figure().subplots()).get_yscale()
        'log'
    """
    return _plot_layers(frame, "violation", ax)


def plot_multipliers(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the multiplier λ of every layer against the step: the price the data pay for its constraint.

    Args:
        frame: As for :func:`plot_gammas`.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on.

    Raises:
        AceError: If the frame has no such rows, or mixes tasks, models or methods.

    Example:
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, layer="layers.0", multiplier=0.1 * step)
        >>> plot_multipliers(history.frame(), Figure().subplots()).get_ylabel()
        'multiplier λ'
    """
    return _plot_layers(frame, "multiplier", ax)


def plot_learning_curves(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the loss, and the validation metric of the relaxed and of the restored model.

    The distance between the relaxed curve (dashed) and the restored one (solid) is what removing the
    relaxation costs at that step. With a column ``method`` of several methods, the methods are the
    colours and the training loss is left out, since it measures a different model in each.

    Args:
        frame: Rows of a history, or those of one task and model of ``load_histories``. The quantities
            ``loss``, ``valid_relaxed`` and ``valid_restored`` are used, those that are there.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on; with several runs, each curve is the mean, in a band of one standard error.

    Raises:
        AceError: If the frame has no such rows, or mixes tasks or models.

    Example:
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, loss=1 / step, valid_relaxed=2 / step, valid_restored=3 / step)
        >>> ax = plot_learning_curves(history.frame(), Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['training loss', 'validation, relaxed', 'validation, restored']
    """
    return _plot(_draw_learning_curves, frame, ax)


def plot_equivariance_error(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Plot the measured relative equivariance error of the model in training against the step.

    Args:
        frame: Rows of a history, or those of one task and model of ``load_histories``: with several
            methods, one colour each.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on, with a scale as for :func:`plot_violations`.

    Raises:
        AceError: If the frame has no such rows, or mixes tasks or models.

    Example:
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, equivariance_error=10.0**-step)
        >>> plot_equivariance_error(history.frame(), Figure().subplots()).get_yscale()
        'log'
    """
    return _plot(_draw_equivariance_error, frame, ax)


def plot_sweep(results: pd.DataFrame, option: str, metric: str = "test_shipped", ax: Axes | None = None) -> Axes:
    """Plot a metric against an option that was swept, such as the learning rate or the size of the training set.

    Args:
        results: Rows of one task and model of ``load_results``, which differ in the option. Where other options were
            swept as well, the rows with their most frequent value count.
        option: Its name: ``lr``, ``task.train``.
        metric: The column to plot; infinite values are left out.
        ax: Where to draw; None makes a new figure.

    Returns:
        The axes drawn on: a line a method, means with bars of one standard error over the seeds.

    Raises:
        AceError: The option was not swept, there is no such metric, or the frame mixes tasks or models.

    Example:
        >>> results = pd.DataFrame(
        ...     [("nbody", "egnn", method, seed, size, (1 + seed) / size)
        ...      for method in ("strict", "ace") for seed in range(3) for size in (100, 1000, 10000)],
        ...     columns=["task", "model", "method", "seed", "config.task.train", "test"])
        >>> plot_sweep(results, "task.train", "test", Figure().subplots()).get_xscale()
        'log'
    """
    _check_one(results, "task", "model")
    named, conditions = by_setting(results)
    if option not in conditions or metric not in named:
        raise AceError(
            f"no {metric} against {option}: swept were {', '.join(conditions) or 'no options'}; "
            f"columns are {', '.join(map(str, named))}"
        )
    for other in conditions:
        if other != option:
            named = named[named[other] == named[other].mode()[0]]

    def draw(ax: Axes, rows: pd.DataFrame) -> None:
        values = rows[metric].astype(float).replace([np.inf, -np.inf], np.nan)
        for number, (method, style) in enumerate(_methods(rows).items()):
            style["linestyle"] = _LINES[number // len(_COLOURS) % len(_LINES)]
            of_value = values[rows["method"] == method].groupby(rows[option])
            ax.errorbar(of_value.mean().index, of_value.mean(), of_value.sem().fillna(0.0), label=method, **style)
        if pd.api.types.is_numeric_dtype(places := rows[option].infer_objects()):
            _set_scale(ax, places, "x")
            if len(swept := sorted(places.unique())) <= _TICKS:
                ax.set_xticks(swept, [f"{value:g}" for value in swept])
                ax.minorticks_off()
        _set_scale(ax, values, span=3)
        ax.set(title=f"{rows['task'].iloc[0]}, {rows['model'].iloc[0]}", xlabel=option)
        ax.set_ylabel("test error of the shipped model" if metric == "test_shipped" else metric)
        ax.legend(**_beside(rows))

    return _plot(draw, named, ax)


def plot_trajectories(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Save one figure with a panel for everything the frame holds; the layers share one key.

    Args:
        frame: As for :func:`plot_gammas`.
        path: The image file, in a folder that exists; its suffix (``.png``, ``.pdf``, ``.svg``) decides
            the format.

    Raises:
        AceError: If there is nothing to plot, the format is unknown, or the frame mixes tasks, models
            or methods.
        NotWritten: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from ace.history import History
        >>> history = History()
        >>> for step in range(1, 4):
        ...     history.log(step, loss=1 / step)
        >>> plot_trajectories(history.frame(), tempfile.mkdtemp() + "/trajectories.png")
    """
    path = _image_path(path)
    _check_one(frame, "task", "model", "method")
    held = set(frame["quantity"].unique())
    layered = [quantity for quantity in _LABELS if quantity in held]
    layers = _layers(_rows(frame, *layered)) if layered else []
    panels: list[Callable[[Axes, pd.DataFrame], None]] = [
        functools.partial(_draw_layers, quantity=quantity, layers=layers) for quantity in layered
    ]
    panels += [_draw_learning_curves] if held & set(_CURVES) else []
    panels += [_draw_equivariance_error] if "equivariance_error" in held else []
    if not panels:
        raise AceError(f"nothing to plot: the frame holds {_listed(held)}")

    half = len(panels) if len(panels) <= 3 else (len(panels) + 1) // 2
    rows = [row for row in (panels[:half], panels[half:]) if row]
    with mpl.rc_context(_STYLE):
        width = 3.8 * half + 1.2 * bool(layers)
        figure = Figure(figsize=(width, 2.8 * len(rows)), layout="constrained")
        grid = figure.add_gridspec(len(rows), 6)  # divides among 1, 2 or 3 panels
        axes = []
        for index, row in enumerate(rows):
            for draw, cells in zip(row, np.split(np.arange(6), len(row)), strict=True):
                ax = figure.add_subplot(grid[index, cells[0] : cells[-1] + 1])
                draw(ax, frame)
                axes.append(ax)
        if len(layers) > _NAMED_LAYERS:
            _add_colour_bar(figure, axes, layers)
        elif layers:
            figure.legend(handles=_legend_lines(layers), loc="outside right center", title="layer")
        _save(figure, path)


def plot_diagnosis(diagnosis: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Save a figure of a diagnosis: relaxed layers, Lie derivative by axis, what each group costs.

    Args:
        diagnosis: What ``Diagnosis.save`` writes as JSON.
        path: The image file, in a folder that exists; its suffix decides the format.

    Raises:
        AceError: The format is unknown.
        NotWritten: The file cannot be written.
    """
    path = _image_path(path)
    colours = {"broken": _COLOURS[1], "kept": _COLOURS[2], "undecided": "0.6"}
    with mpl.rc_context(_STYLE):
        height = max(2.8, 1.0 + 0.24 * max(len(diagnosis["findings"]), len(diagnosis["layers"])))
        figure = Figure(figsize=(12.5, height), layout="constrained")
        layers, axes, groups = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
        names = list(diagnosis["layers"])
        for place, name in enumerate(names):
            values = diagnosis["layers"][name]
            layers.plot(values, [place] * len(values), "o", color=_COLOURS[0], alpha=0.4, markersize=4)
            layers.plot(np.mean(values), place, "|", color=_COLOURS[0], markersize=14, markeredgewidth=2)
        layers.set_yticks(range(len(names)), _short(names))
        layers.set(xlim=(0, None), ylim=(len(names) - 0.5, -0.5), xlabel="|γ| of the resilient model")

        gram = np.array(diagnosis["rotations"])
        sizes = np.sqrt(np.clip([*np.diag(gram), *np.linalg.eigvalsh(gram)], 0, None))
        found = ["least", "mid", "most"]
        axes.bar(["x", "y", "z", *found], sizes, color=[_COLOURS[0]] * 3 + [_COLOURS[4]] * 3)
        axes.set(ylabel="Lie derivative", xlabel="about the axis")

        for place, finding in enumerate(diagnosis["findings"]):
            groups.barh(place, 100 * finding["excess"], color=colours[finding["verdict"]])
        groups.set_yticks(range(len(diagnosis["findings"])), [finding["name"] for finding in diagnosis["findings"]])
        groups.set(
            ylim=(len(diagnosis["findings"]) - 0.5, -0.5), xlabel="excess error of the best fit under the group, %"
        )
        groups.axvline(0, color="0.3", linewidth=0.8)
        key = [Line2D([], [], color=colour, linewidth=5, label=verdict) for verdict, colour in colours.items()]
        figure.legend(handles=key, loc="outside right upper")
        _save(figure, path)


def plot_ranks(ranks: Ranks, path: str | os.PathLike[str]) -> None:
    """Save a critical-difference diagram: methods at their mean ranks, bars over those that cannot be told apart.

    Args:
        ranks: What ``ace.comparison.rank`` returns.
        path: The image file, in a folder that exists; its suffix decides the format.

    Raises:
        AceError: The format is unknown.
        NotWritten: The file cannot be written.
    """
    path = _image_path(path)
    places = {str(name): float(place) for name, place in ranks.mean.items()}
    count, half = len(places), (len(places) + 1) // 2
    lowest = -0.5 * (half + len(ranks.cliques)) - 0.5
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.0, 1.2 - 0.42 * lowest), layout="constrained")
        ax = figure.subplots()
        ax.axis("off")
        ax.set(xlim=(1 - 0.45 * count, count + 0.45 * count), ylim=(lowest, 1.3))
        ax.plot([1, count], [0, 0], color="0.3", linewidth=0.8)
        for tick in range(1, count + 1):
            ax.plot([tick, tick], [0, 0.12], color="0.3", linewidth=0.8)
            ax.text(tick, 0.2, str(tick), ha="center", va="bottom")
        ax.plot([1, 1 + ranks.critical], [1.0, 1.0], color=_COLOURS[1], linewidth=2)
        ax.text(1 + ranks.critical, 1.0, f"  critical difference {ranks.critical:.2f}", va="center")
        for number, clique in enumerate(ranks.cliques):
            span = [places[clique[0]] - 0.05, places[clique[-1]] + 0.05]
            ax.plot(span, [-0.3 - 0.35 * number] * 2, color=_COLOURS[0], linewidth=4)
        below = -0.35 * len(ranks.cliques) - 0.4
        for number, (name, place) in enumerate(places.items()):  # best on the left, from the top
            left = number < half
            height = below - 0.5 * (number if left else count - 1 - number)
            edge = 1 - 0.05 * count if left else count + 0.05 * count
            ax.plot([place, place, edge], [0, height, height], color="0.5", linewidth=0.8)
            ax.text(edge, height, f" {name}  {place:.2f} ", ha="right" if left else "left", va="center")
        _save(figure, path)


def plot_comparison(
    results: pd.DataFrame, path: str | os.PathLike[str], metric: str = "test_shipped", to: str = "strict"
) -> None:
    """Save a figure of all methods on all tasks: a metric relative to that of one method, coloured by symmetry.

    A panel for each task and model, and for each condition that was swept; in it, for each method, the mean over the
    seeds of the ratio to the reference with the same seed, and its standard error. The colour is the equivariance error
    of the shipped models, in the mean over the seeds; those below 1e-5 are exactly equivariant but for rounding. Ratios
    above 3 are arrows at the edge, with their value.

    Args:
        results: One row per run, as ``load_results`` gives them, with the column ``equivariance_rms``.
        path: The image file, in a folder that exists; its suffix decides the format.
        metric: The column to compare, lower is better; what is not finite is left out.
        to: The reference method, as in ``ace.comparison.relative``.

    Raises:
        AceError: The format is unknown, a column is missing, or no run has a reference.
        NotWritten: The file cannot be written.
    """
    path = _image_path(path)
    absent = {metric, "equivariance_rms"} - set(results)
    if absent:
        raise AceError(f"no column {_listed(absent)} in the results")
    named, conditions = by_setting(relative(results, metric, to))
    methods = list(named["method"].unique())
    cases = dict(iter(named.groupby(["task", "model", *conditions], sort=False, observed=True)))
    columns = min(5, math.ceil(len(cases) / math.ceil(len(cases) / 5)))
    lines = math.ceil(len(cases) / columns)
    norm = LogNorm(EXACT, 1.0, clip=True)
    with mpl.rc_context(_STYLE):
        size = (1.6 + 2.3 * columns, 0.8 + lines * (0.7 + 0.17 * len(methods)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
        for ax in axes.flat[len(cases) :]:
            ax.axis("off")
        names = case_names(list(cases), conditions)
        for ax, case, rows in zip(axes.flat, names, cases.values(), strict=False):
            ratios = rows[metric].astype(float).replace([np.inf, -np.inf], np.nan).groupby(rows["method"])
            errors = rows["equivariance_rms"].astype(float).groupby(rows["method"]).mean()
            ax.axvline(1.0, color="0.6", linewidth=0.8)
            for name, mean, error in ratios.agg(["mean", "sem"]).fillna({"sem": 0.0}).itertuples():
                symmetric = errors[name] < EXACT
                colour = "0.1" if symmetric else mpl.colormaps["plasma"](norm(errors[name]))
                place, marker = methods.index(name), "D" if symmetric else "o"
                if mean > _WORST:  # all others would be squeezed together
                    ax.plot(_WORST, place, color=colour, marker=">", markersize=5)
                    ax.annotate(
                        f"{mean:.3g}", (_WORST, place), (-5, 0), "data", "offset points", ha="right", va="center"
                    )
                else:
                    ax.errorbar(mean, place, xerr=error, color=colour, marker=marker, markersize=4.5)
            _set_ratio_scale(ax)
            ax.set_title("\n".join(case))
        axes[0, 0].set(yticks=range(len(methods)), yticklabels=methods, ylim=(len(methods) - 0.4, -0.6))
        label = "test error of the shipped model" if metric == "test_shipped" else metric
        figure.supxlabel(f"{label}, relative to {to}", fontsize=10)
        bar = figure.colorbar(ScalarMappable(norm, "plasma"), ax=axes, aspect=40, pad=0.02)
        bar.set_label("equivariance error\n(black: exact)")  # in one line it is higher than a single row of axes
        _save(figure, path)


def _set_ratio_scale(ax: Axes) -> None:
    """Logarithmic, with plain numbers that do not collide, and 1 in sight."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(min(low, 0.93), min(max(high, 1.08), 1.1 * _WORST))
    low, high = ax.get_xlim()
    narrow = high < 3 * low
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())


def _image_path(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise AceError(f"{path}: the suffix must name an image format: {', '.join(sorted(formats))}")
    return path


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    replace_file(path, image.getvalue())


def _plot_layers(frame: pd.DataFrame, quantity: str, ax: Axes | None) -> Axes:
    _check_one(frame, "task", "model", "method")
    layers = _layers(_rows(frame, quantity))
    with mpl.rc_context(_STYLE):
        ax = _new_axes() if ax is None else ax
        _draw_layers(ax, frame, quantity, layers)
        if len(layers) > _NAMED_LAYERS:
            _add_colour_bar(ax.figure, ax, layers)
        else:
            ax.legend(handles=_legend_lines(layers))
    return ax


def _plot(draw: Callable[[Axes, pd.DataFrame], None], frame: pd.DataFrame, ax: Axes | None) -> Axes:
    _check_one(frame, "task", "model")
    with mpl.rc_context(_STYLE):
        ax = _new_axes() if ax is None else ax
        draw(ax, frame)
    return ax


def _draw_layers(ax: Axes, frame: pd.DataFrame, quantity: str, layers: list[str]) -> None:
    rows = _rows(frame, quantity)
    few = len(layers) <= _NAMED_LAYERS
    ax.axhline(0, color="0.3", linewidth=0.8, linestyle=(0, (4, 2)), zorder=1)
    for layer, colour in zip(layers, _colours(len(layers)), strict=True):
        _draw_mean(ax, rows[rows["layer"] == layer], few, color=colour, linewidth=1.4 if few else 0.8)
    if quantity == "violation":
        _set_scale(ax, rows["value"])
    _label(ax, _LABELS[quantity])


def _draw_learning_curves(ax: Axes, frame: pd.DataFrame) -> None:
    rows = _rows(frame, *_CURVES)
    methods = _methods(rows)
    if len(methods) > 1:
        rows = _rows(rows, "valid_relaxed", "valid_restored")
        key = [Line2D([], [], label=method, **look) for method, look in methods.items()]
        for quantity, of_quantity in rows.groupby("quantity", observed=True):
            _, _, style, width = _CURVES[str(quantity)]
            meaning = str(quantity).removeprefix("valid_")
            key.append(Line2D([], [], color="0.4", linestyle=style, label=meaning))
            for method, look in methods.items():
                curve = of_quantity[of_quantity["method"] == method]
                _draw_mean(ax, curve, linestyle=style, linewidth=width, **look)
        ax.legend(handles=key, **_beside(rows))
    else:
        for quantity, (label, colour, style, width) in _CURVES.items():
            curve = rows[rows["quantity"] == quantity]
            _draw_mean(ax, curve, color=colour, linestyle=style, linewidth=width, label=label)
        ax.legend()
    if (rows["value"].dropna() > 0).all():  # some losses are negative
        ax.set_yscale("log")
    _label(ax, "loss" if len(methods) <= 1 else "validation metric")


def _draw_equivariance_error(ax: Axes, frame: pd.DataFrame) -> None:
    rows = _rows(frame, "equivariance_error")
    methods = _methods(rows)
    if len(methods) > 1:
        for method, look in methods.items():
            _draw_mean(ax, rows[rows["method"] == method], label=method, **look)
        ax.legend(**_beside(rows))
    else:
        _draw_mean(ax, rows, color=_COLOURS[0])
    _set_scale(ax, rows["value"])
    _label(ax, "relative equivariance error")


def _draw_mean(ax: Axes, rows: pd.DataFrame, band: bool = True, **style: Any) -> None:
    """A line through the mean of each step, over runs if there are several, then in a band."""
    if rows.empty:
        return
    per_step = rows.groupby("step")["value"]
    mean = per_step.mean()
    marker = style.pop("marker", "o") if len(mean) <= 30 else ""
    ax.plot(mean.index, mean, marker=marker, **({"markersize": 3} | style))
    if band and "run" in rows and len(rows["run"].unique()) > 1:
        error = per_step.sem()
        ax.fill_between(mean.index, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)


def _label(ax: Axes, quantity: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
    ax.set(xlabel="step", ylabel=quantity)


def _set_scale(ax: Axes, values: pd.Series[float], axis: Literal["x", "y"] = "y", span: float = 10) -> None:
    """Logarithmic where values are factors of ``span`` and more apart; linear around zero, which has no logarithm."""
    sizes = values.abs()[values != 0].dropna()
    if sizes.empty or sizes.max() < span * sizes.min():
        return
    set_scale = ax.set_xscale if axis == "x" else ax.set_yscale
    if (values.dropna() > 0).all():
        set_scale("log")
    else:
        smallest = max(float(np.quantile(sizes, 0.05)), float(sizes.max()) * 1e-6)
        set_scale("symlog", linthresh=10 ** np.floor(np.log10(smallest)), linscale=0.5)


def _rows(frame: pd.DataFrame, *quantities: str) -> pd.DataFrame:
    """The rows of some quantities; what is infinite is left out as what is not a number is."""
    rows = frame[frame["quantity"].isin(quantities)]
    if rows.empty:
        raise AceError(
            f"no row of {' or '.join(quantities)}: the frame holds {_listed(set(frame['quantity'].unique()))}"
        )
    return rows.assign(value=rows["value"].replace([np.inf, -np.inf], np.nan))


def _check_one(frame: pd.DataFrame, *columns: str) -> None:
    """A mean over different tasks means nothing."""
    values = {column: set(frame[column].unique()) for column in columns if column in frame}
    mixed = [f"{len(names)} {column}s ({_listed(names)})" for column, names in values.items() if len(names) > 1]
    if mixed:
        raise AceError(f"the frame mixes {' and '.join(mixed)}: select the rows of one before plotting")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _methods(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """A style for each method: colours, and beyond those another marker."""
    names: list[str] = list(rows["method"].unique()) if "method" in rows else []
    styles = itertools.product(_MARKERS, _COLOURS)
    size = 3 if len(names) <= len(_COLOURS) else 5
    return {
        name: {"color": colour, "marker": marker, "markersize": size}
        for name, (marker, colour) in zip(names, itertools.cycle(styles), strict=False)
    }


def _beside(rows: pd.DataFrame) -> dict[str, Any]:
    """Where a legend of many methods has room."""
    many = len(_methods(rows)) > len(_COLOURS)
    return {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if many else {}


def _layers(rows: pd.DataFrame) -> list[str]:
    """Layers in order of appearance, which is the order of the modules."""
    return list(rows["layer"].unique())


def _colours(count: int) -> list[str]:
    """A colour for each layer, from the first (dark) to the last; the palest end is left out."""
    return [to_hex(colour) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.88, count))]


def _legend_lines(layers: list[str]) -> list[Line2D]:
    colours = _colours(len(layers))
    labels = _short(layers)
    return [Line2D([], [], color=colour, label=label) for label, colour in zip(labels, colours, strict=True)]


def _short(layers: list[str]) -> list[str]:
    """Paths that fit in a legend: long ones lose the parts all of them share, which tell nothing apart."""
    if max(map(len, layers)) <= _KEPT_NAME:
        return layers
    paths = [name.split(".") for name in layers]
    start = _shared(paths)
    paths = [path[start:] for path in paths]
    end = _shared([path[::-1] for path in paths])
    labels = []
    for path in paths:
        label = "…" * bool(start) + ".".join(path[: len(path) - end]) + "…" * bool(end)
        labels.append(label if len(label) <= _KEPT_NAME else "…" + label[-_KEPT_NAME:])
    return labels


def _shared(paths: list[list[str]]) -> int:
    """Number of leading parts that are the same in all paths, short of a whole path."""
    first, shortest = paths[0], min(map(len, paths))
    same = itertools.takewhile(lambda index: all(path[index] == first[index] for path in paths), range(shortest))
    return min(len(list(same)), shortest - 1)


def _add_colour_bar(figure: Any, axes: Axes | list[Axes], layers: list[str]) -> None:
    last = len(layers)
    norm = BoundaryNorm(np.arange(last + 1) + 0.5, last)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(_colours(last))), ax=axes, aspect=30, pad=0.02)
    ticks = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(1, last)
    bar.set_ticks([1, *(tick for tick in ticks if 1 < tick <= last)])
    bar.minorticks_off()
    bar.set_label("layer, from first to last")


def _new_axes() -> Axes:
    """Axes of a new pyplot figure: a notebook shows it, and ``pyplot.show()`` finds it."""
    from matplotlib import pyplot  # chooses a backend when imported

    return pyplot.figure(layout="constrained").subplots()
