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
COMPILED = {None: "", "default": "-compiled", "reduce-overhead": "-graphs"}
"""What the name of a table says of how the models were compiled."""
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
        A line for each ratio that moved by more than ``TOLERANCE``, and for each model that has no row in the tables or
        cannot be measured here.
    """
    cost, now = pd.read_csv(folder / "cost.csv").set_index("model"), steps.measure(names, rounds, steps=2)
    now = now.set_index("model") if len(now) else now
    pairs = [
        (f"{name}, {ratio}", median_of(str(cost.loc[name, ratio])), median_of(str(now.loc[name, ratio])))
        for name in names
        if name in now.index and name in cost.index
        for ratio in (*steps.RATIOS, "relaxed, memory")
    ]
    lines = [f"{name}: not measured, its library is missing" for name in names if name not in now.index]
    lines += [f"{name}: no row in {folder / 'cost.csv'}" for name in names if name not in cost.index]
    from benchmarks.speed import segnn

    before, now = pd.read_csv(folder / "segnn.csv"), segnn.measure(rounds)
    pairs += [(f"segnn, {c}", median_of(before[c].iloc[0]), median_of(now[c].iloc[0])) for c in segnn.RATIOS]
    tables = pd.read_csv(folder / "machinery.csv"), machinery.measure(rounds, machinery.LAYERS[:1])
    pairs.append(("machinery, relative to Cooper's", *(machinery.relative(table) for table in tables)))
    return lines + moved(pairs)


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
    parser.add_argument("--rounds", type=int, help="default: 20, of check 8")
    parser.add_argument("--steps", type=int, default=3, help="training steps of each variant in a round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="for steps and segnn")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead"],
        help="for steps: run the models through torch.compile; reduce-overhead records CUDA graphs on a GPU",
    )
    options = parser.parse_args()
    names = options.models or list(SUBJECTS)
    if unknown := sorted(set(names) - set(SUBJECTS)):
        parser.error(f"unknown models {', '.join(unknown)}: choose of {', '.join(SUBJECTS)}")
    if options.models and options.part not in ("steps", "check"):
        parser.error(f"{options.part} measures no models that can be chosen: leave out {' '.join(options.models)}")
    if options.device != "cpu" and options.part not in ("steps", "segnn"):
        parser.error("only steps and segnn can be measured on a GPU: name one of them")
    if options.compile and options.part != "steps":
        parser.error("--compile is for steps")
    rounds = options.rounds or (8 if options.part == "check" else 20)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch._logging.set_logs(dynamo=logging.ERROR)  # of the graph breaks; they are in the times
    if options.part == "check":
        lines = check(rounds, names)
        print("\n".join(lines) or f"no ratio moved by more than {TOLERANCE:.0%}")
        return 1 if lines else 0
    suffix = (options.device != "cpu") * f"-{options.device}" + COMPILED[options.compile]
    if options.part in ("all", "machinery"):
        write("machinery", machinery.measure(rounds), suffix)
    if options.part in ("all", "segnn"):
        from benchmarks.speed import segnn  # e3nn: MACE has to be imported before it, and has its own version

        write("segnn", segnn.measure(rounds, options.steps, options.device), suffix)
    if options.part in ("all", "steps"):
        write("cost", steps.measure(names, rounds, options.steps, options.device, options.compile), suffix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
