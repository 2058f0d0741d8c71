"""Functions that take turns, round after round, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import pandas as pd
import torch


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, steps: int, device: str = "cpu"
) -> pd.DataFrame:
    """Time functions by turns.

    On the CPU it is processor time, which other programs on the machine change little; on a GPU it is wall time, with
    the device idle at both ends.

    Args:
        functions: What to time, by name. Each is called once before, to warm up.
        rounds: Number of rounds.
        steps: Calls of each function in a round.
        device: Where they work, ``cpu`` or ``cuda``.

    Returns:
        Milliseconds of a call: a row for each round, a column for each function.
    """
    for function in functions.values():
        function()
    rows = []
    for _ in range(rounds):
        row = {}
        for name, function in functions.items():
            start = _now(device)
            for _ in range(steps):
                function()
            row[name] = 1000 * (_now(device) - start) / steps
        rows.append(row)
    return pd.DataFrame(rows)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: pd.Series, digits: int = 2) -> str:
    """Median, quartiles in brackets.

    Example:
        >>> spread(pd.Series([1.0, 2.0, 3.0, 4.0, 5.0]), 1)
        '3.0 (2.0 to 4.0)'
    """
    low, middle, high = (f"{value:.{digits}f}" for value in values.quantile([0.25, 0.5, 0.75]))
    return f"{middle} ({low} to {high})"


def median_of(text: str) -> float:
    """The median in what ``spread`` wrote.

    Example:
        >>> median_of("3.0 (2.0 to 4.0)")
        3.0
    """
    return float(text.split()[0])
