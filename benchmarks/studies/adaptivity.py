"""Does tightening adapt to the data without a rate to set? The runs behind ``docs/adaptivity.md``.

``python -m benchmarks.studies.adaptivity run FOLDER --jobs N`` trains on data whose break of symmetry is known, over
strength and depth of the break, training length, batch size, optimizer and unit of the loss, and with one ingredient
of the method taken out at a time. The same command resumes; a run that failed leaves no row.
``python -m benchmarks.studies.adaptivity report FOLDER docs/results`` writes tables and figures.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import ace
import ace.problem
import ace.terms
from ace.history import replace_file
from ace.proximal import ProximalGradient
from ace.tables import layout
from benchmarks.locks import locked
from benchmarks.models.vector import VectorLayer, VectorNet
from benchmarks.tasks.broken import LAYERS, VECTORS, Broken

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 3e-3, "fused": True}),
    # 1e-30 is lost beside any gradient but 0, where 0 / 0 would not be a number
    "adam, eps = 0": (torch.optim.Adam, {"lr": 3e-3, "eps": 1e-30, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 3e-3, "fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 3e-2, "momentum": 0.9}),
}
"""The optimizers of the weights. Nothing below sets a rate of γ or of λ."""
SMALL = 1e-3
"""Below this size of γ a run counts as settled."""
POLISH = 0.2
"""Share of the steps, at the end, in which the default has every term off."""


@dataclass(frozen=True)
class Setting:
    """What tells one run from another; the row of a run starts with it.

    Attributes:
        variant: ``"ace"`` (the default), ``"strict"`` (no terms), or a name of ``ABLATIONS``.
        strength: Strength of the break in the data.
        depth: Layer of the teacher after which it happens.
        steps: Training steps T.
        batch: Samples in a batch.
        samples: Samples to train on.
        primal: A name of ``OPTIMIZERS``.
        scale: What the loss is multiplied by.
        seed: Seed of data, initial weights and batches.
    """

    variant: str = "ace"
    strength: float = 0.0
    depth: int = 0
    steps: int = 3000
    batch: int = 64
    samples: int = 4000
    primal: str = "adam"
    scale: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """A name for files."""
        return "_".join(str(part) for part in asdict(self).values()).replace(" ", "").replace(",", "")


KEY = [entry.name for entry in fields(Setting)]


@dataclass(frozen=True)
class Ablation:
    """The method with one ingredient changed.

    Attributes:
        relax: Arguments of ``ace.relax``.
        optimizer: Arguments of ``ace.PrimalDual``.
        patches: (owner, name, value) replaced while the model is relaxed and the optimizer made.
    """

    relax: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    patches: tuple[tuple[Any, str, Any], ...] = ()


class NoCarry(ProximalGradient):
    """λ keeps its value when the unit of the gradient changes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "carry": False})


class NoClip(ProximalGradient):
    """One batch may move γ by any amount."""

    clip = math.inf


class NoCap(ProximalGradient):
    """γ may exceed its value at the start."""

    cap = math.inf


def _step_by(optimizer: type[ProximalGradient]) -> Ablation:
    return Ablation(patches=((ace.problem, "ProximalGradient", optimizer),))


ABLATIONS = {
    "no carry": _step_by(NoCarry),
    "no clip": _step_by(NoClip),
    "no cap": _step_by(NoCap),
    "full-size start": Ablation(patches=((ace.terms, "START", 1.0),)),
    "no polish": Ablation(optimizer={"polish": 0.0}),
    "no saliency": Ablation(optimizer={"saliency": 0.0}),
    "saliency 0.003": Ablation(optimizer={"saliency": 0.003}),
    "saliency 0.03": Ablation(optimizer={"saliency": 0.03}),
    "normalize": Ablation(relax={"normalize": True}),
    "spectral": Ablation(relax={"term": "spectral"}),
    "augmented": Ablation(optimizer={"form": "augmented"}),
    "paper": Ablation(optimizer={"preset": "paper"}),
}
"""One ingredient at a time."""

STRENGTHS = (0.0, 0.03, 0.1, 0.3, 1.0)
LENGTHS = (500, 1500, 5000, 15000, 50000)
BATCHES = (16, 64, 128, 512)
SAMPLES = (4000, 200000)
PRIMALS = ("adam", "adamw", "sgd")
SCALES = (2.0**-10, 1e-3, 1.0, 1e3, 2.0**10)
FEW = (0.0, 0.1, 0.3)
TWO = (0.0, 0.3)


def grid() -> list[Setting]:
    """Every run of the study, those first whose absence would hurt most; data of strength 0 have no depth."""
    runs: list[Setting] = []
    for seed in range(3):
        runs += [Setting(strength=s, depth=d, seed=seed) for s in STRENGTHS for d in range(LAYERS) if s or not d]
        if seed == 0:
            runs += [Setting(strength=s, primal="adam, eps = 0", scale=scale) for s in TWO for scale in SCALES]
            runs += [Setting(strength=s, scale=scale) for s in TWO for scale in (1e-3, 1e3)]
        if seed < 2:
            runs += [Setting(name, strength=s, seed=seed) for name in ABLATIONS for s in FEW]
            runs += [Setting(strength=s, primal=primal, seed=seed) for primal in PRIMALS for s in FEW]
            runs += [Setting(strength=s, batch=batch, seed=seed) for batch in BATCHES for s in FEW]
        runs += [Setting(strength=s, steps=steps, seed=seed) for steps in LENGTHS[:3] for s in TWO]
    runs += [Setting(strength=s, batch=512, samples=n, seed=seed) for seed in range(2) for n in SAMPLES for s in TWO]
    runs += [Setting(strength=s, steps=LENGTHS[3], seed=seed) for seed in range(2) for s in TWO]
    runs += [Setting(strength=s, steps=LENGTHS[4]) for s in TWO]
    # so many samples that none is seen often: long training, but nothing to learn by heart
    runs += [
        Setting(strength=s, steps=steps, samples=SAMPLES[-1], seed=seed)
        for seed in range(2)
        for steps in LENGTHS[3:]
        for s in TWO
    ]
    result: dict[Setting, None] = {}
    for run in runs:
        result[run] = None
        if run.variant == "ace" and run.scale == 1 and run.primal in PRIMALS:
            result[Setting(**{**asdict(run), "variant": "strict"})] = None
    return list(result)


@contextmanager
def _patched(ablation: Ablation) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in ablation.patches:
            stack.enter_context(patch.object(owner, name, value))
        yield


def train(setting: Setting) -> tuple[dict[str, float], Tensor]:
    """Do one run.

    Args:
        setting: Which.

    Returns:
        What was measured, and γ after each step, shape (T, layers), without layers for strict training.
    """
    task = Broken(strength=setting.strength, layer=setting.depth, train=setting.samples, seed=setting.seed)
    x, y = task.splits["train"].pos, task.splits["train"].target
    test = task.splits["test"].pos
    clean = task.clean(test).flatten(0, 1)
    test = test.flatten(0, 1)
    torch.manual_seed(setting.seed)
    model = VectorNet(0, 0, vectors=VECTORS)
    batches = torch.Generator().manual_seed(setting.seed)

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (setting.batch,), generator=batches)
        return x[chosen].flatten(0, 1), y[chosen].flatten(0, 1)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return setting.scale * mse_loss(model(batch[0]), batch[1])

    kind, options = OPTIMIZERS[setting.primal]
    start = time.process_time()
    if setting.variant == "strict":
        plain = kind(model.parameters(), **options)
        for _ in range(setting.steps):
            plain.zero_grad()
            loss(model, draw()).backward()
            plain.step()
        seconds = time.process_time() - start
        with torch.no_grad():
            return {"test": mse_loss(model(test), clean).item(), "seconds": seconds}, torch.zeros(setting.steps, 0)

    ablation = ABLATIONS.get(setting.variant, Ablation())
    with _patched(ablation):
        ace.relax(model, layers=VectorLayer, example=(test[: 8 * VECTORS],), **ablation.relax)
        problem = ace.Problem(model, loss=loss)
        optimizer = ace.PrimalDual(
            problem, kind(model.parameters(), **options), steps=setting.steps, **ablation.optimizer
        )
    gammas = torch.zeros(setting.steps, len(problem.relaxations))
    before = math.floor((1 - POLISH) * setting.steps)
    gap = math.nan
    for step in range(setting.steps):
        gammas[step] = optimizer.roll(draw()).cmp_state.misc["gamma"]
        if step + 1 == before:
            gap = ace.projection_gap(model, (test,))
    seconds = time.process_time() - start
    row = {
        "test": math.nan,
        "seconds": seconds,
        "gap_before_polish": gap,
        "gap_end": ace.projection_gap(model, (test,)),
        **describe(gammas),
    }
    with torch.no_grad(), ace.restored(model):
        row["test"] = mse_loss(model(test), clean).item()
    return row, gammas


def describe(gammas: Tensor) -> dict[str, float]:
    """Numbers that say how γ moved.

    Args:
        gammas: γ after each step, shape (T, layers).

    Returns:
        ``lets_go_i``: share of the steps after which layer i stays at 0; ``mean_i``: mean |γ_i| over training;
        ``overshoot``: how far below 0 any γ was; ``settled``: share of the steps after which all |γ| < ``SMALL``;
        ``final``: largest |γ| at the end.

    Example:
        >>> describe(torch.tensor([[1.0], [0.5], [-0.25], [0.0]]))["lets_go_0"]
        0.75
    """
    row = {f"lets_go_{i}": _last(column != 0) for i, column in enumerate(gammas.T)}
    row |= {f"mean_{i}": value for i, value in enumerate(gammas.abs().mean(0).tolist())}
    return row | {
        "overshoot": max(0.0, -gammas.min().item()),
        "settled": _last(gammas.abs().amax(1) >= SMALL),
        "final": gammas[-1].abs().max().item(),
    }


def _last(where: Tensor) -> float:
    """Share of the steps up to and with the last one of those."""
    return (int(where.nonzero().max()) + 1) / len(where) if where.any() else 0.0


def runs_of(folder: Path) -> pd.DataFrame:
    """The rows of all finished runs."""
    path = folder / "runs.csv"
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)


def path_of(folder: Path, setting: Setting) -> np.ndarray[Any, Any]:
    """γ after each step of a finished run, shape (T, layers)."""
    result: np.ndarray[Any, Any] = np.load(folder / "paths" / f"{setting.name}.npy")
    return result


def run(folder: Path, settings: list[Setting], jobs: int) -> int:
    """Do those runs that have no row yet.

    Args:
        folder: Where rows and paths lie.
        settings: The runs.
        jobs: Processes side by side.

    Returns:
        How many failed; the reasons are printed.
    """
    (folder / "paths").mkdir(parents=True, exist_ok=True)
    with locked(folder), Progress() as progress:
        frame = runs_of(folder)
        done = {Setting(**row) for row in frame[KEY].to_dict("records")}
        left = [setting for setting in settings if setting not in done]
        bar = progress.add_task("runs", total=len(settings), completed=len(settings) - len(left))
        failures = 0
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            futures = {pool.submit(train, setting): setting for setting in left}
            for future in as_completed(futures):
                setting = futures[future]
                try:
                    row, gammas = future.result()
                except Exception:  # whatever went wrong, the other runs go on
                    failures += 1
                    progress.console.print(f"{setting}\n{traceback.format_exc()}", markup=False)
                else:
                    saved = io.BytesIO()
                    np.save(saved, gammas.numpy())
                    replace_file(folder / "paths" / f"{setting.name}.npy", saved.getvalue())
                    frame = pd.DataFrame([*frame.to_dict("records"), {**asdict(setting), **row}])
                    replace_file(folder / "runs.csv", frame.to_csv(index=False).encode())
                progress.advance(bar)
    return failures


HEADINGS = {"depth": "break after layer", "primal": "optimizer", "scale": "loss times"}
BY_LAYER = {"lets_go": "lets go, by layer", "mean": "mean γ, by layer"}
NUMBERS = {
    "overshoot": "overshoot",
    "settled": "all settled",
    "final": "final γ",
    "gap_before_polish": "gap before the polish",
    "gap_end": "gap at the end",
    "test": "test",
    "strict": "test, strict",
    "seconds": "CPU s",
}
"""Columns of the tables: column of the rows -> heading."""
POINTS = 150
"""Points of a path that are drawn."""
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's, one a layer
DATA_COLOURS = ("0.45", "#D55E00")  # symmetric, broken
MARKERS = ("o", "s", "^")
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
}


def with_strict(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with terms, each beside the test error of strict training on the same data and batches."""
    alike = [name for name in KEY if name not in {"variant", "scale"}]
    strict = frame[frame["variant"] == "strict"].set_index(alike)["test"].rename("strict")
    runs = frame[frame["variant"] != "strict"]
    # Adam with another eps is compared with Adam
    beside = runs.assign(primal=runs["primal"].str.partition(",")[0]).join(strict, on=alike)["strict"]
    return runs.assign(strict=beside)


def parts(runs: pd.DataFrame) -> dict[str, tuple[list[str], pd.DataFrame]]:
    """Title of each table -> the columns that tell its rows apart, and its runs in order."""
    usual = asdict(Setting())
    for name, order in {"variant": ["ace", *ABLATIONS], "primal": list(OPTIMIZERS)}.items():
        runs = runs.assign(**{name: pd.Categorical(runs[name], order)})

    def varying(*free: str) -> tuple[list[str], pd.DataFrame]:
        fixed = [name for name in KEY if name not in {*free, "seed"}]
        alike = np.logical_and.reduce([runs[name] == usual[name] for name in fixed])
        return list(free), runs[alike].sort_values([*free, "seed"])

    batch, primal, length, one_out = (varying(name, "strength") for name in ("batch", "primal", "steps", "variant"))
    unit = varying("primal", "scale", "strength")
    samples = varying("samples", "batch", "strength")[1].query("batch == 512 and strength in @TWO")
    unseen = varying("steps", "samples", "strength")[1].query("samples == @SAMPLES[-1]")
    return {
        "Strength and depth of the break": varying("depth", "strength"),
        "Training length": _among(length, "strength", TWO),
        f"Training length, on {SAMPLES[-1]:,} samples": (["steps", "strength"], unseen),
        "Batch size": _among(batch, "strength", FEW),
        "Training samples, at batch 512": (["samples", "strength"], samples),
        "Optimizer of the weights": _among(_among(primal, "strength", FEW), "primal", PRIMALS),
        "Unit of the loss": _among(_among(unit, "strength", TWO), "primal", list(OPTIMIZERS)[:2]),
        "One ingredient out": _among(_among(one_out, "strength", FEW), "seed", range(2)),
    }


def _among(part: tuple[list[str], pd.DataFrame], name: str, values: Any) -> tuple[list[str], pd.DataFrame]:
    return part[0], part[1][part[1][name].isin(values)]


def table(keys: list[str], runs: pd.DataFrame) -> str:
    """A Markdown table: n, and of each number the median over the seeds and its least and largest value.

    By layer only the median; numbers that are 0 in all runs have no column.
    """
    numbers = {name: heading for name, heading in NUMBERS.items() if runs[name].fillna(0).any()}
    headings = [*(HEADINGS.get(key, key) for key in keys), "n", *BY_LAYER.values(), *numbers.values()]
    lines = []
    for values, rows in runs.groupby(keys, observed=True):
        layers = [
            " · ".join(f"{rows[f'{name}_{i}'].median():.2f}" for i in range(LAYERS) if f"{name}_{i}" in rows)
            for name in BY_LAYER
        ]
        cells = [
            *(_value(value + 1 if key == "depth" else value) for key, value in zip(keys, values, strict=True)),
            str(len(rows)),
            *layers,
            *(_spread(rows[name]) for name in numbers),
        ]
        lines.append(cells)
    return layout(headings, lines)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"2^{round(math.log2(value))}" if value in SCALES[::4] else f"{value:,g}"


def _spread(values: pd.Series[float]) -> str:
    values = values.dropna()
    if values.empty:
        return ""
    low, middle, high = (_short(value) for value in (values.min(), values.median(), values.max()))
    return middle if low == high else f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def where(runs: pd.DataFrame) -> str:
    """A Markdown table: in which layer γ was largest over training, against the layer of the break."""
    _, rows = parts(runs)["Strength and depth of the break"]
    rows = rows[rows["strength"] > 0]
    largest = rows[[f"mean_{i}" for i in range(LAYERS)]].to_numpy().argmax(1)
    counts = pd.crosstab(
        [rows["strength"], rows["depth"] + 1], pd.Series(largest + 1, rows.index), rownames=["strength", "break after"]
    ).reindex(columns=range(1, LAYERS + 1), fill_value=0)
    lines = []
    for (strength, depth), row in counts.iterrows():
        cells = [f"**{count}**" if layer == depth else str(count) for layer, count in row.items()]
        lines.append([f"{strength:g}", str(depth), *cells])
    return layout(["strength", "break after layer", *(f"largest in layer {i}" for i in counts.columns)], lines)


def units(folder: Path, runs: pd.DataFrame) -> str:
    """A Markdown table: how far the path of γ differs from that with the loss times 1."""
    lines = []
    _, rows = parts(runs)["Unit of the loss"]
    for row in rows[rows["scale"] != 1].to_dict("records"):
        setting = Setting(**{name: row[name] for name in KEY})
        reference = Setting(**{**asdict(setting), "scale": 1.0})
        if not (folder / "paths" / f"{reference.name}.npy").exists():
            continue
        path, other = path_of(folder, setting), path_of(folder, reference)
        same = "bitwise the same" if np.array_equal(path, other) else "differs"
        apart = np.abs(path - other)
        means = np.abs(np.abs(path).mean(0) - np.abs(other).mean(0)).max()
        what = [setting.primal, _value(setting.scale), f"{setting.strength:g}"]
        lines.append([*what, same, _short(apart[:100].max()), _short(apart.max()), _short(means)])
    heading = ["optimizer", "loss times", "strength", "γ path", "largest difference, first 100 steps", "all steps"]
    return layout([*heading, "of mean γ"], lines)


def draw_paths(folder: Path, runs: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """γ of each layer over training, one panel a strength (columns) and depth (rows) of the break.

    Returns:
        The figure, and what is drawn: median, least and largest value over the seeds at ``POINTS`` steps.
    """
    _, rows = parts(runs)["Strength and depth of the break"]
    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=130)
    axes = figure.subplots(LAYERS, len(STRENGTHS), sharex=True, sharey=True, squeeze=False)
    drawn = []
    for (depth, strength), ax in zip([(d, s) for d in range(LAYERS) for s in STRENGTHS], axes.flat, strict=True):
        chosen = rows[(rows["strength"] == strength) & (rows["depth"] == (depth if strength else 0))]
        settings = [Setting(**{name: row[name] for name in KEY}) for row in chosen.to_dict("records")]
        _frame(ax)
        if depth == 0:
            ax.set_title("symmetric data" if strength == 0 else f"strength {strength:g}")
        if strength == 0:
            ax.set_ylabel(f"break after layer {depth + 1}\nγ")
        if not settings:
            continue
        paths = np.stack([path_of(folder, setting) for setting in settings])
        index = np.unique((np.linspace(0, 1, POINTS) ** 2 * (paths.shape[1] - 1)).astype(int))
        low, middle, high = np.quantile(paths[:, index], (0, 0.5, 1), axis=0)
        share = (index + 1) / paths.shape[1]
        for layer, colour in enumerate(COLOURS):
            width = 2.2 if strength and layer == depth else 1.0
            ax.fill_between(share, low[:, layer], high[:, layer], color=colour, alpha=0.18, linewidth=0)
            ax.plot(share, middle[:, layer], color=colour, linewidth=width)
            if strength or not depth:
                drawn.append(
                    pd.DataFrame(
                        {
                            "strength": strength,
                            "depth": depth,
                            "layer": layer,
                            "share": share.round(4),
                            "median": middle[:, layer].round(4),
                            "low": low[:, layer].round(4),
                            "high": high[:, layer].round(4),
                        }
                    )
                )
    for ax in axes[-1]:
        ax.set_xlabel("share of training")
    handles = [Line2D([], [], color=colour, label=f"layer {i + 1}") for i, colour in enumerate(COLOURS)]
    handles.append(Line2D([], [], color="0.2", linewidth=2.2, label="layer of the break"))
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="polish starts"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure, pd.concat(drawn)


def _frame(ax: Axes) -> None:
    """Axes of a path: the first steps, in which most happens, get more room."""
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    ax.set_xticks([0, 0.05, 0.2, 0.5, 1], ["0", "0.05", "0.2", "0.5", "1"])
    ax.set(xlim=(0, 1), ylim=(-0.1, 1.02))
    ax.axvline(1 - POLISH, color="0.4", linestyle=":", linewidth=1)


def draw_shares(runs: pd.DataFrame) -> Figure:
    """When layers let go (top) and mean γ (bottom) against what the user chooses, symmetric and broken data."""
    labels = {
        "Training length": "training steps",
        "Batch size": "batch",
        "Training samples, at batch 512": "training samples (batch 512)",
        "Optimizer of the weights": "optimizer of the weights",
        "Unit of the loss": "loss times",
    }
    figure = Figure(figsize=(13, 5.6), layout="constrained", dpi=130)
    widths = {"width_ratios": [1.5, *[1] * (len(labels) - 1)]}  # the first has the longest ticks
    axes = figure.subplots(len(BY_LAYER), len(labels), sharex="col", sharey="row", squeeze=False, gridspec_kw=widths)
    tables = parts(runs)
    for column, (title, label) in enumerate(labels.items()):
        keys, rows = tables[title]
        name = keys[-2]  # before the strength
        rows = rows[rows["strength"].isin(TWO) & ((name != "scale") | (rows["primal"] == "adam, eps = 0"))]
        ticks = [value for value in rows[name].unique() if not pd.isna(value)]
        for row, quantity in enumerate(BY_LAYER):
            ax = axes[row, column]
            for strength, colour in zip(TWO, DATA_COLOURS, strict=True):
                for layer, marker in enumerate(MARKERS):
                    cells = rows[rows["strength"] == strength].groupby(name, observed=True)[f"{quantity}_{layer}"]
                    shift = (0.09 if strength else -0.09) + 0.05 * (layer - 1)
                    x = np.array([ticks.index(value) for value in cells.median().index]) + shift
                    spread = np.array([cells.median() - cells.min(), cells.max() - cells.median()])
                    ax.errorbar(
                        x,
                        cells.median(),
                        spread,
                        color=colour,
                        marker=marker,
                        markersize=4.5,
                        linewidth=0.9,
                        elinewidth=0.7,
                    )
        axes[0, column].axhline(1 - POLISH, color="0.4", linestyle=":", linewidth=1)
        axes[-1, column].set_xticks(range(len(ticks)), [_value(tick) for tick in ticks])
        axes[-1, column].set_xlabel(label)
    for row in axes:
        row[0].set_ylim(0, max(ax.dataLim.ymax for ax in row) * 1.06)
    axes[0, 0].set_ylabel("lets go at this share of the steps")
    axes[1, 0].set_ylabel("mean |γ| over training")
    handles = [
        Line2D([], [], color=c, label=t)
        for c, t in zip(DATA_COLOURS, ("symmetric data", "broken after layer 1 (0.3)"), strict=True)
    ]
    handles += [
        Line2D([], [], color="0.2", marker=marker, linestyle="", label=f"layer {i + 1}")
        for i, marker in enumerate(MARKERS)
    ]
    handles.append(Line2D([], [], color="0.4", linestyle=":", label="polish starts"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def report(folder: Path, out: Path) -> None:
    """Write rows, tables and figures of the finished runs.

    Args:
        folder: Folder of the runs.
        out: Where ``adaptivity*`` files go.
    """
    frame = runs_of(folder).sort_values(KEY)
    runs = with_strict(frame)
    (out / "adaptivity.csv").write_text(frame.to_csv(index=False, float_format="%.4g"))
    sections = [f"### {title}\n\n{table(*part)}" for title, part in parts(runs).items()]
    (out / "adaptivity.md").write_text("\n".join(sections))
    (out / "adaptivity_where.md").write_text(where(runs))
    (out / "adaptivity_units.md").write_text(units(folder, runs))
    with mpl.rc_context(STYLE):
        figure, drawn = draw_paths(folder, runs)
        figure.savefig(out / "adaptivity_paths.png")
        drawn.to_csv(out / "adaptivity_paths.csv", index=False)
        draw_shares(runs).savefig(out / "adaptivity_shares.png")


def main(arguments: list[str] | None = None) -> int:
    """Run the grid, or report on it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.adaptivity", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="do the runs that are not done yet")
    running.add_argument("folder", type=Path)
    running.add_argument("--jobs", type=int, default=1)
    reporting = commands.add_parser("report", help="write tables and figures")
    reporting.add_argument("folder", type=Path)
    reporting.add_argument("out", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        report(chosen.folder, chosen.out)
        return 0
    return 1 if run(chosen.folder, grid(), chosen.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
