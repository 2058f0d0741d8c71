"""When does `ace` let go of its terms on the tasks of the suites? From the histories of runs that are done.

``python -m benchmarks.studies.letting_go OUT FOLDER...`` reads the folders of suites and writes ``letting_go.csv`` (a
row a run and layer), a table and a figure to OUT, such as ``docs/results``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ace.comparison import OPTION, check_seeds, written
from ace.errors import AceError
from ace.history import History, replace_file
from ace.results import load_results
from ace.tables import layout
from benchmarks.studies.adaptivity import POLISH, STYLE

CASE = ["case", "steps"]
COLUMNS = [*CASE, "seed", "layer", "share"]


def letting_go(folders: list[Path]) -> pd.DataFrame:
    """Read when each term was let go.

    Args:
        folders: Of suites; of their runs those of `ace` count, each once.

    Returns:
        Columns ``case`` (task, model, and the options of the task where they were swept), ``steps``, ``seed``,
        ``layer``, and ``share``, of the steps, after which its γ stays 0.

    Raises:
        AceError: There is no run of `ace`, or runs differ in other options than these.
    """
    found = [load_results(folder).assign(folder=str(folder)) for folder in folders]
    runs = pd.concat([runs[runs["method"] == "ace"] for runs in found], ignore_index=True)
    if runs.empty:
        raise AceError(f"no finished run of ace in {', '.join(map(str, folders))}")
    options = [column for column in runs if str(column).startswith(OPTION)]
    runs = runs.drop_duplicates(["task", "model", "seed", "steps", *options])
    options = [option for option in options if option.startswith(f"{OPTION}task.")]
    rows = []
    for (task, model), of_pair in runs.groupby(["task", "model"], sort=False):
        swept = [option for option in options if len({written(value) for value in of_pair[option]}) > 1]
        for run in of_pair.to_dict("records"):
            names = [f"{option.removeprefix(f'{OPTION}task.')}={written(run[option])}" for option in swept]
            frame = History.load(Path(run["folder"], run["run"], "history.csv")).frame()
            gammas = frame[frame["quantity"] == "gamma"]
            for layer, of_layer in gammas.groupby("layer", observed=True, sort=False):
                last = of_layer.loc[of_layer["value"] != 0, "step"].max()
                share = 0.0 if np.isnan(last) else round(last / run["steps"], 4)
                rows.append((", ".join([task, model, *names]), run["steps"], run["seed"], layer, share))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    check_seeds(frame, [*CASE, "seed", "layer"])
    return frame


def table(frame: pd.DataFrame) -> str:
    """A Markdown table: for each case the median over seeds by layer, and the least and largest of all."""
    lines = []
    for (case, steps), rows in ordered(frame):
        by_layer = rows.groupby("layer", sort=False)["share"].median()
        spread = f"{rows['share'].min():.2f} to {rows['share'].max():.2f}"
        lines.append(
            [
                case,
                f"{steps:,}",
                str(rows["seed"].nunique()),
                " · ".join(f"{share:.2f}" for share in by_layer),
                spread,
            ]
        )
    return layout(["task, model", "steps", "n", "lets go, by layer", "all layers and seeds"], lines)


def ordered(frame: pd.DataFrame) -> list[tuple[tuple[str, int], pd.DataFrame]]:
    """The rows of each case and training length, in order of their median."""
    groups = [(key, rows) for key, rows in frame.groupby(CASE, sort=True)]
    return sorted(groups, key=lambda group: group[1]["share"].median())


def draw(frame: pd.DataFrame) -> Figure:
    """Each layer of each run as a dot, a line a case, and its median."""
    groups = ordered(frame)
    figure = Figure(figsize=(8, 1.1 + 0.24 * len(groups)), layout="constrained", dpi=130)
    ax = figure.subplots()
    for height, (_, rows) in enumerate(groups):
        spread = np.linspace(-0.25, 0.25, len(rows)) if len(rows) > 1 else np.zeros(1)
        ax.scatter(rows["share"], height + spread, s=9, color="#0072B2", alpha=0.5, linewidth=0)
        ax.plot([rows["share"].median()] * 2, [height - 0.35, height + 0.35], color="#D55E00", linewidth=2)
    ax.axvline(1 - POLISH, color="0.4", linestyle=":", linewidth=1)
    ax.text(1 - POLISH, 1.01, "polish starts", transform=ax.get_xaxis_transform(), ha="center", fontsize=8, color="0.4")
    ax.set_yticks(range(len(groups)), [f"{case} ({steps:,} steps)" for (case, steps), _ in groups])
    ax.set(xlim=(0, 1), ylim=(-0.6, len(groups) - 0.4), xlabel="share of the training after which γ stays 0")
    return figure


def report(out: Path, folders: list[Path]) -> None:
    """Write ``letting_go.csv``, ``letting_go.md`` and ``letting_go.png``."""
    frame = letting_go(folders)
    replace_file(out / "letting_go.csv", frame.to_csv(index=False).encode())
    replace_file(out / "letting_go.md", table(frame).encode())
    with mpl.rc_context(STYLE):
        draw(frame).savefig(out / "letting_go.png")


if __name__ == "__main__":
    report(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
