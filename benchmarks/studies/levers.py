"""What makes relaxed training better on N-body, one lever at a time? From the runs of ``levers.yaml``.

``python -m benchmarks.studies.levers docs/results`` reads ``levers.csv``, which ``python -m benchmarks.report levers``
writes, and writes ``levers.md``: for each setting, the test error of `ace` relative to strict training in that setting,
to strict training in the usual one, and to `ace` in the usual one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from ace.comparison import OPTION, check_seeds, holm, written
from ace.history import replace_file
from ace.tables import layout

SAME, STRICT, ACE = "strict, same setting", "strict as it is", "ace as it is"
"""What the test error of `ace` in a setting is compared with."""
NONE = "none"


def levers(runs: pd.DataFrame) -> pd.DataFrame:
    """Compare runs of `ace`, each setting with strict training and with the usual setting, by seed.

    Args:
        runs: One row per run of strict training and of `ace`, of one task and model: ``method``, ``seed``, the options
            and ``test_shipped``. The usual value of an option is that of most runs of `ace`.

    Returns:
        One row per setting of `ace`, the usual one first: ``lever``, the options that are not the usual ones, and
        for each comparison the mean of the ratio (its name), the standard error (with ``" ±"``), and the two-sided p of
        a paired t-test on logarithms (with ``" p"``), adjusted for the number of settings by Holm's rule; missing where
        there are no such runs, or all seeds have the same ratio.

    Example:
        >>> runs = pd.DataFrame(
        ...     [("strict", 0.0, 2.0), ("ace", 0.0, 1.0), ("ace", 0.9, 0.5)],
        ...     columns=["method", "config.average", "test_shipped"])
        >>> runs = pd.concat([runs.assign(seed=s, test_shipped=runs["test_shipped"] + s) for s in (0, 1)])
        >>> levers(runs)[["lever", STRICT, ACE]].round(2).values.tolist()
        [['none', 0.58, 1.0], ['average=0.9', 0.38, 0.62]]
    """
    options = [name for name in runs if str(name).startswith(OPTION)]
    usual = runs.loc[runs["method"] == "ace", options].mode(dropna=False).iloc[0]

    def lever(row: pd.Series[str]) -> str:
        own = [name for name in options if row["method"] == "ace" or not name.startswith(f"{OPTION}method.")]
        apart = [name for name in own if row[name] != usual[name] and not (pd.isna(row[name]) and pd.isna(usual[name]))]
        return ", ".join(f"{name.removeprefix(OPTION)}={written(row[name])}" for name in apart) or NONE

    runs = runs.assign(lever=runs.apply(lever, axis=1))
    check_seeds(runs, ["method", "lever", "seed"])
    errors = runs.pivot_table("test_shipped", "seed", ["method", "lever"])
    rows = []
    for name in sorted(errors["ace"], key=lambda name: (name != NONE, name)):
        row = {"lever": name}
        for what, (method, setting) in {
            SAME: ("strict", name),
            STRICT: ("strict", "none"),
            ACE: ("ace", "none"),
        }.items():
            if (method, setting) not in errors or (method, setting) == ("ace", name):
                continue
            ratio = (errors["ace", name] / errors[method, setting]).dropna()
            logarithms = np.log(ratio)
            alike = np.ptp(logarithms) < 1e-9  # one seed, or a lever that changes nothing: no spread to compare with
            p = np.nan if alike else ttest_1samp(logarithms, 0).pvalue
            row |= {what: ratio.mean(), f"{what} ±": ratio.sem(), f"{what} p": p}
        rows.append(row)
    table = pd.DataFrame(rows).reindex(
        columns=["lever", *(f"{c}{x}" for c in (SAME, STRICT, ACE) for x in ("", " ±", " p"))]
    )
    table.loc[table["lever"] == NONE, ACE] = 1.0
    for what in (SAME, STRICT, ACE):
        found = table[f"{what} p"].dropna()
        table[f"{what} p"] = table.index.map(holm(found.to_dict()))
    return table


def report(out: Path) -> None:
    """Write ``levers.md`` beside ``levers.csv``."""
    parts = []
    for (task, model), runs in pd.read_csv(out / "levers.csv").groupby(["task", "model"], sort=False):
        rows = [
            [row["lever"], *(_cell(*(row[f"{what}{x}"] for x in ("", " ±", " p"))) for what in (SAME, STRICT, ACE))]
            for row in levers(runs).to_dict("records")
        ]
        parts += [f"### {task}, {model}\n", layout(["lever", *(f"ace / {what}" for what in (SAME, STRICT, ACE))], rows)]
    replace_file(out / "levers.md", "\n".join(parts).encode())


def _cell(mean: float, error: float, p: float) -> str:
    if np.isnan(mean):
        return ""
    return f"{mean:.3f}" if np.isnan(p) else f"{mean:.3f} ± {error:.3f} (p = {p:.2g})"


if __name__ == "__main__":
    report(Path(sys.argv[1]))
