"""Results of a suite: run folders in, data frames out.

A run is a folder with a ``config.yaml``, wherever it lies under the folder given. Its ``summary.json``, a
flat object with at least ``task``, ``model``, ``method`` and ``seed``, is written last: its presence means
the run is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from ace.errors import DataError
from ace.history import History

_ROW = ("task", "model", "method")
IDENTITY = (*_ROW, "seed")
"""Columns that name a run, if its configuration does not matter."""


def load_results(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Gather the summaries of all finished runs.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        One row per finished run, in order of their paths: ``run`` (the path of its folder relative to
        ``folder``), ``task``, ``model``, ``method``, ``seed``, then whatever the summaries hold, missing
        where one does not. Unfinished and failed runs have no row: see :func:`status`.

    Raises:
        DataError: If there is no such folder, or summaries are damaged; all of them are named.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for seed in (0, 1):
        ...     run = folder / f"seed{seed}"
        ...     run.mkdir()
        ...     _ = (run / "config.yaml").write_text("")
        ...     summary = {"task": "nbody", "model": "egnn", "method": "ace", "seed": seed, "test": 0.5 + seed}
        ...     _ = (run / "summary.json").write_text(json.dumps(summary))
        >>> load_results(folder)
             run   task model method  seed  test
        0  seed0  nbody  egnn    ace     0   0.5
        1  seed1  nbody  egnn    ace     1   1.5
    """
    rows, damaged = [], []
    for run, files in _runs(folder):
        if "summary.json" not in files:
            continue
        path = Path(folder, run, "summary.json")
        try:
            summary = json.loads(path.read_bytes())
        except FileNotFoundError:  # removed since
            continue
        except ValueError as error:
            damaged.append(f"{path}: {error}")
            continue
        missing = [key for key in IDENTITY if key not in summary] if isinstance(summary, dict) else IDENTITY
        if missing:
            damaged.append(f"{path}: no {', '.join(missing)}")
        else:
            rows.append({"run": run} | {key: summary[key] for key in IDENTITY} | summary)
    if damaged:
        raise DataError("damaged summaries; remove them and run the suite again:\n  " + "\n  ".join(damaged))
    return pd.DataFrame(rows, columns=None if rows else ["run", *IDENTITY])


def load_histories(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Gather the histories of all finished runs: the frame that the functions of ``plotting`` take.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        Columns ``run``, ``task``, ``model``, ``method`` (categories), ``seed``, then those of
        ``History.frame()``. A finished run without a ``history.csv`` has no rows.

    Raises:
        DataError: If there is no such folder, or a summary or history is damaged.

    Example:
        >>> import tempfile
        >>> list(load_histories(tempfile.mkdtemp()).columns[:5])
        ['run', 'task', 'model', 'method', 'seed']
    """
    runs = load_results(folder)[["run", *IDENTITY]]
    paths = [Path(folder, run, "history.csv") for run in runs["run"]]
    runs = runs[np.array([path.is_file() for path in paths], dtype=bool)]
    frames = [History.load(path).frame() for path in paths if path.is_file()]
    of_row = np.repeat(np.arange(len(runs)), [len(frame) for frame in frames])
    frames = frames or [History().frame()]  # the columns, where there is no run
    for column in ("layer", "quantity"):
        names = dict.fromkeys(name for frame in frames for name in frame[column].cat.categories)
        for frame in frames:  # the same categories everywhere, or concatenation would give them up
            frame[column] = frame[column].cat.set_categories(list(names))
    identity = runs.iloc[of_row].reset_index(drop=True)
    for column in ("run", *_ROW):
        identity[column] = pd.Categorical(identity[column], categories=runs[column].unique())
    return pd.concat([identity, pd.concat(frames, ignore_index=True)], axis=1)


def status(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """Tell how far each run that was ever started has come.

    Args:
        folder: A suite's results, or any folder above or below.

    Returns:
        One row per run folder, in order of their paths: ``run``, ``status`` (a category) and ``detail``.
        A run is ``done`` if it has a summary, else ``failed`` if it has an ``error.txt``, whose last line
        is the detail, else ``interrupted``: it may also be running still. The detail then says whether
        there is a checkpoint to continue from. Runs never started have no folder, hence no row.

    Raises:
        DataError: If there is no such folder.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "config.yaml").write_text("")
        >>> _ = (folder / "error.txt").write_text("NonFiniteLoss: loss is nan at step 812")
        >>> status(folder)
          run  status                                  detail
        0   .  failed  NonFiniteLoss: loss is nan at step 812
    """
    rows = []
    for run, files in _runs(folder):
        if "summary.json" in files:
            state, detail = "done", ""
        elif "error.txt" in files:
            lines = Path(folder, run, "error.txt").read_text(encoding="utf-8", errors="replace").split("\n")
            state, detail = "failed", next((line for line in reversed(lines) if line.strip()), "")
        else:
            state, detail = "interrupted", "has a checkpoint" if "checkpoint.pt" in files else "no checkpoint yet"
        rows.append((run, state, detail))
    frame = pd.DataFrame(rows, columns=["run", "status", "detail"])
    return frame.assign(status=pd.Categorical(frame["status"], categories=["done", "failed", "interrupted"]))


def _runs(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
    """Run folders at or under a folder, in order of their paths: path relative to it, and the names of the files.

    Each folder is listed once, and nothing else is asked of the file system.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder; a suite's results lie in the folder it was given")
    top = str(Path(folder))
    for name, below, files in os.walk(top):
        below.sort()
        if "config.yaml" in files:
            below.clear()
            yield Path(name[len(top) :].lstrip(os.sep)).as_posix(), files
