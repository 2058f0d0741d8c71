"""``python -m benchmarks.speed [part] [model ...]``: measure, and write the tables in ``docs/results``.

The parts are ``machinery``, ``steps`` and ``segnn``; without one, all of them. ``check`` measures anew, in fewer
rounds, and compares with the committed tables: only ratios, since machines differ.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import pandas as pd
import torch

from ace.history import replace_file
from benchmarks.speed import machinery, steps
from benchmarks.speed.models import SUBJECTS
from benchmarks.speed.timing import median_of

FOLDER = Path(__file__).parents[2] / "docs" / "results"
TOLERANCE = 0.15
"""Relative change of a ratio that is more than the noise of a shared machine."""


def write(name: str, table: pd.DataFrame, suffix: str) -> None:
    """Merge rows into a table in ``docs/results``, by their first column; rows that were not measured stay."""
    path = FOLDER / f"{name}{suffix}.csv"
    key = table.columns[0] if len(table) else ""
    if path.exists() and key:
        kept = pd.read_csv(path, dtype=str)
        table = pd.concat([kept[~kept[key].isin(table[key])], table.astype(str)])
    if key == "model":
        table = table.sort_values(key, key=lambda column: column.map(list(SUBJECTS).index))
    if key:
        replace_file(path, table.to_csv(index=False).encode())


def check(rounds: int, names: list[str], folder: Path = FOLDER) -> list[str]:
    """Measure anew and return what moved, in words.

    Args:
        rounds: Number of rounds.
        names: The models to measure.
        folder: Where the tables are.

    Returns:
        A line for each ratio that moved by more than ``TOLERANCE``.
    """
    pairs = []
    before = pd.read_csv(folder / "cost.csv", index_col="model")
    now = steps.measure(names, rounds, steps=2)
    for _, row in now.iterrows():
        if row["model"] in before.index:
            pairs += [
                (f"{row['model']}, {ratio}", median_of(before.loc[row["model"], ratio]), median_of(row[ratio]))
                for ratio in steps.RATIOS
            ]
    from benchmarks.speed import segnn

    before = pd.read_csv(folder / "segnn.csv")
    now = segnn.measure(rounds)
    for column in (segnn.TIMES, segnn.COMPILED):
        pairs.append((f"segnn, {column}", *(median_of(table[column].iloc[0]) for table in (before, now))))
    return moved(pairs)


def moved(pairs: list[tuple[str, float, float]]) -> list[str]:
    """Say which ratios changed, from (name, before, now).

    Example:
        >>> moved([("egnn, relaxed", 1.2, 1.25), ("egnn, retired", 1.0, 1.3)])
        ['egnn, retired: 1.00 before, 1.30 now']
    """
    return [
        f"{name}: {before:.2f} before, {now:.2f} now"
        for name, before, now in pairs
        if abs(now - before) > TOLERANCE * before
    ]


def main() -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("part", nargs="?", default="all", choices=["all", "machinery", "steps", "segnn", "check"])
    parser.add_argument("models", nargs="*", help=f"for steps and check, of {', '.join(SUBJECTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="training steps of each variant in a round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    options = parser.parse_args()
    names = options.models or list(SUBJECTS)
    if unknown := sorted(set(names) - set(SUBJECTS)):
        parser.error(f"unknown models {', '.join(unknown)}: choose of {', '.join(SUBJECTS)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._logging.set_logs(dynamo=logging.ERROR)  # of the graph breaks; they are in the times
    if options.part == "check":
        lines = check(options.rounds, names)
        print("\n".join(lines) or f"no ratio moved by more than {TOLERANCE:.0%}")
        return 1 if lines else 0
    suffix = (options.device != "cpu") * f"-{options.device}" + options.compile * "-compiled"
    if options.part in ("all", "machinery"):
        write("machinery", machinery.measure(options.rounds)[0], suffix)
    if options.part in ("all", "segnn"):
        from benchmarks.speed import segnn  # e3nn: MACE has to be imported before it, and has its own version

        write("segnn", segnn.measure(options.rounds, options.steps, options.device), suffix)
    if options.part in ("all", "steps"):
        write("cost", steps.measure(names, options.rounds, options.steps, options.device, options.compile), suffix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
