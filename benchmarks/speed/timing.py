"""What functions cost: time, taking turns so that a machine that slows down slows all of them, and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, steps: int, device: str = "cpu"
) -> pd.DataFrame:
    """Time functions by turns, each round beginning with the next of them.

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
    try:
        order = list(functions)
        for _ in range(rounds):
            row = {}
            gc.collect()
            gc.disable()  # as timeit does: whom a collection hits is chance
            for name in order:
                start = _now(device)
                for _ in range(steps):
                    functions[name]()
                row[name] = 1000 * (_now(device) - start) / steps
            gc.enable()
            rows.append(row)
            order.append(order.pop(0))  # what ran before leaves its traces in the caches
    finally:
        gc.enable()
    return pd.DataFrame(rows, columns=list(functions))


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """Return how many bytes of tensors a call held at most, beyond those that were there before.

    Args:
        function: What to call; once to warm up, once to measure.
        device: Where it works, ``cpu`` or ``cuda``.

    Example:
        >>> peak_memory(lambda: torch.zeros(1000).exp())
        8000
    """
    function()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # the public summaries add up what an operator allocated; a peak needs the order
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


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
