"""Suites: have the missing runs of a grid run, and tell how far each has come.

Everything about a run is in files, so the same command resumes: runs with a summary are left alone, the
others go on from their last checkpoint. A worker that dies costs its own run only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ace import results
from ace.errors import ConfigError, DataError
from ace.history import replace_file
from benchmarks.executors import Ended, Executor, shell_command, write_config
from benchmarks.locks import NAME, holder, is_locked, locked

if TYPE_CHECKING:  # it imports the models, and a status need not wait for them
    from benchmarks.config import RunConfig, Suite

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
        seconds: What it took, from the start of its worker.
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
    from benchmarks.train import build_task, how_to_install

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
            package = str(MODELS[name].package)
            reasons[name] = f"its package {package} is not installed here. {how_to_install(package)}"
            needed |= any(run.hash not in suite.optional for run in suite.runs if run.model.name == name)
    if needed:
        raise DataError("\n".join(f"{name}: {reason}" for name, reason in reasons.items()))
    left = [run for run in suite.runs if not {run.task.name, run.model.name} & reasons.keys()]
    return left, [f"{name} left out: {reason}" for name, reason in reasons.items()]


def run_suite(
    runs: Iterable[RunConfig], out: Path, execute: Executor, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run what is not done, each run in a process of its own.

    Args:
        runs: The runs.
        out: Folder of the suite.
        execute: Where to: ``Processes`` or ``Ray``.
        report: Called with each outcome as it comes; runs done before are not reported.

    Returns:
        The outcomes of the runs that were not done.

    Raises:
        Locked: Another process runs a suite in the folder.
    """
    outcomes = []
    # closed also when interrupted: nothing goes on in the background
    with _missing(runs, out) as missing, closing(execute(missing, out)) as endings:
        for ended in endings:
            outcomes.append(_outcome(ended, out / ended.config.folder))
            report(outcomes[-1])
    return outcomes


def shell_commands(runs: Iterable[RunConfig], out: Path) -> list[str]:
    """Write the configurations of what is not done, and return one line for a shell for each of these runs.

    The lines can be executed in any order, several at a time, from any folder, on any machine with the same paths.

    Args:
        runs: The runs.
        out: Folder of the suite.

    Raises:
        Locked: A process runs a suite in the folder.
    """
    with _missing(runs, out) as missing:
        for run in missing:
            write_config(run, out / run.folder)
    return [shell_command(run, out / run.folder) for run in missing]


def status(out: Path) -> pd.DataFrame:
    """Tell how far each run of a suite has come.

    Args:
        out: Folder of the suite.

    Returns:
        One row per run: ``run`` (its folder), ``status`` (``done``, ``failed``, ``interrupted``, ``running``
        or ``pending``: never started) and ``detail``.

    Raises:
        DataError: There is no such folder.
    """
    started = results.status(out)
    rows = [(run, *_state(out / run, word, detail)) for run, word, detail in started.itertuples(index=False)]
    listed = (out / RUNS).read_text().splitlines() if (out / RUNS).exists() else []
    known = set(started["run"])
    rows += [(run, "pending", "") for run in listed if run not in known]
    return pd.DataFrame(rows, columns=started.columns)


@contextmanager
def _missing(runs: Iterable[RunConfig], out: Path) -> Iterator[list[RunConfig]]:
    """Lock the folder of a suite, list its runs there for a status, and hand over those that are not done."""
    runs = list(runs)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        replace_file(out / RUNS, "".join(f"{run.folder.as_posix()}\n" for run in runs).encode())
        yield [run for run in runs if not _is_done(out / run.folder)]


def _state(folder: Path, word: str, detail: str) -> tuple[str, str]:
    """Tell runs in progress, and those that nobody began, from the interrupted ones."""
    if word == "interrupted" and is_locked(folder):
        return "running", ""
    if word == "interrupted" and not (folder / NAME).exists() and not (folder / "checkpoint.pt").exists():
        return "pending", ""  # it has its configuration, and no worker had it
    return word, detail


def _is_done(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def _outcome(ended: Ended, folder: Path) -> Outcome:
    [row] = results.status(folder).to_dict("records")
    detail = row["detail"]
    if row["status"] == "interrupted":
        log = folder / "log.txt"
        if is_locked(folder):
            detail = f"another process is working on it ({holder(folder)})"
        else:
            detail = f"the worker ended {ended.how}{f', see {log}' if log.exists() else ''}"
    return Outcome(ended.config, folder, row["status"], detail, ended.seconds)


def _refuse_mixture(runs: list[RunConfig], out: Path) -> None:
    """Two configurations of one method and seed in one folder would be averaged by a table, or refused by it."""
    names = {run.folder.as_posix() for run in runs}
    starts = {name.rpartition("-")[0] for name in names}
    present = [path for parent in {run.folder.parent for run in runs} for path in (out / parent).glob("*-*")]
    folders = [(path, path.relative_to(out).as_posix()) for path in present]
    others = [path for path, name in folders if name not in names and name.rpartition("-")[0] in starts]
    if others:
        listed = "\n  ".join(map(str, sorted(set(others))))
        raise ConfigError(
            f"{out} holds runs of the same names under another configuration; give another --out or remove "
            f"them:\n  {listed}"
        )
