"""Suites: run the missing runs of a grid in worker processes, and tell how far each has come.

Everything about a run is in files, so the same command resumes: runs with a summary are left alone, the
others go on from their last checkpoint. A worker that dies costs its own run only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ace import results
from ace.errors import ConfigError, DataError
from ace.history import replace_file
from benchmarks.locks import is_locked

if TYPE_CHECKING:  # it imports the models, and a status need not wait for them
    from benchmarks.config import RunConfig, Suite

ROOT = Path(__file__).resolve().parent.parent
RUNS = "runs.txt"
"""File of a suite's folder that lists the folders of its runs, so that a status knows those never started."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        config: The run.
        folder: Its folder.
        status: ``done``, ``failed`` or ``interrupted``.
        detail: The error, if there is one.
        seconds: Time that this process waited for it.
    """

    config: RunConfig
    folder: Path
    status: str
    detail: str
    seconds: float


def prepare(suite: Suite, out: Path) -> tuple[list[RunConfig], list[str]]:
    """Load or generate the data of all tasks, once, and check the folder, before any run starts.

    Args:
        suite: The suite.
        out: Its folder.

    Returns:
        The runs whose data and models are there, and for each task and model left out the reason.

    Raises:
        DataError: The data or the package of runs that are not optional are missing; all reasons are listed.
        ConfigError: The folder holds runs of the same names under another configuration.
    """
    from benchmarks.models import MODELS
    from benchmarks.train import build_task

    _refuse_mixture(suite.runs, out)
    reasons: dict[str, str] = {}
    needed = False
    for task in dict.fromkeys(run.task for run in suite.runs):
        users = [run for run in suite.runs if run.task == task]
        if all(_is_done(out / run.folder) for run in users):
            continue
        try:
            build_task(users[0])
        except DataError as error:
            reasons[task.name] = str(error)
            needed |= any(run.hash not in suite.optional for run in users)
    for name in dict.fromkeys(run.model.name for run in suite.runs):
        if not MODELS[name].installed:
            reasons[name] = f"its package {MODELS[name].package} is not installed"
            needed |= any(run.hash not in suite.optional for run in suite.runs if run.model.name == name)
    if needed:
        raise DataError("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
    left = [run for run in suite.runs if not {run.task.name, run.model.name} & reasons.keys()]
    return left, [f"{name} left out: {reason}" for name, reason in reasons.items()]


def run_suite(runs: Iterable[RunConfig], out: Path, jobs: int, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Run what is not done, each run in a process of its own.

    Args:
        runs: The runs.
        out: Folder of the suite.
        jobs: Number of processes at a time.
        report: Called with each outcome as it comes; runs done before are not reported.

    Returns:
        The outcomes of the runs that were not done.
    """
    runs = list(runs)
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / RUNS, "".join(f"{run.folder.as_posix()}\n" for run in runs).encode())
    waiting = [run for run in runs if not _is_done(out / run.folder)]
    working: list[tuple[RunConfig, subprocess.Popen[bytes], float]] = []
    outcomes = []
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                config = waiting.pop(0)
                working.append((config, _start(config, out / config.folder), time.monotonic()))
            time.sleep(0.05)
            for entry in [entry for entry in working if entry[1].poll() is not None]:
                working.remove(entry)
                config, process, start = entry
                outcome = _outcome(config, out / config.folder, process.returncode, time.monotonic() - start)
                outcomes.append(outcome)
                report(outcome)
    finally:  # also when interrupted: nothing goes on in the background
        for _, process, _ in working:
            process.terminate()
        for _, process, _ in working:
            process.wait()
    return outcomes


def status(out: Path) -> pd.DataFrame:
    """Tell how far each run of a suite has come.

    Args:
        out: Folder of the suite.

    Returns:
        One row per run: ``run`` (its folder), ``status`` (``done``, ``failed``, ``interrupted``, ``running``
        or ``pending``) and ``detail``.

    Raises:
        DataError: There is no such folder.
    """
    started = results.status(out)
    state = started["status"].astype(str)
    running = [word == "interrupted" and is_locked(out / run) for run, word in zip(started["run"], state, strict=True)]
    started["status"] = state.mask(running, "running")
    started.loc[running, "detail"] = ""
    listed = (out / RUNS).read_text().splitlines() if (out / RUNS).exists() else []
    pending = [(run, "pending", "") for run in listed if run not in set(started["run"])]
    return pd.concat([started, pd.DataFrame(pending, columns=started.columns)], ignore_index=True)


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _start(config: RunConfig, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "config.yaml", config.to_yaml().encode())
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(config.threads)}
    with (folder / "log.txt").open("ab") as log:
        command = [sys.executable, "-m", "benchmarks.train", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def _outcome(config: RunConfig, folder: Path, code: int, seconds: float) -> Outcome:
    [row] = results.status(folder).to_dict("records")
    detail = row["detail"]
    if row["status"] == "interrupted":
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        detail = f"the worker ended {how}, see {folder / 'log.txt'}"
    return Outcome(config, folder, row["status"], detail, seconds)


def _refuse_mixture(runs: list[RunConfig], out: Path) -> None:
    """Two configurations of one method and seed in one folder would be averaged by a table, or refused by it."""
    others = []
    for run in runs:
        name = run.folder.name.rpartition("-")[0]
        others += [path for path in (out / run.folder.parent).glob(f"{name}-*") if path.name != run.folder.name]
    if others:
        listed = "\n  ".join(map(str, sorted(set(others))))
        raise ConfigError(
            f"{out} holds runs of the same names under another configuration; give another --out or remove "
            f"them:\n  {listed}"
        )
