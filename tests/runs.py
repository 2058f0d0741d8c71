"""Tiny runs, shared by the tests of the suite: seconds of training on a few generated samples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.config import RunConfig, load_run

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "task.train=40",
    "task.valid=10",
    "task.test=10",
    "model.hidden=8",
    "model.layers=2",
    "steps=20",
    "batch_size=16",
    "eval_every=5",
    "log_every=1",
    "checkpoint_every=8",
)
METHODS = ("strict", "unconstrained", "ace", "ace-resilient", "ace-tolerance", "ace-paper", "cr")  # of the smoke suite
METRICS = ("valid_shipped", "test_shipped", "test_relaxed", "test_restored", "equivariance_error", "max_gamma")
RIVALS = ("augmentation", "linear-decay", "cosine-decay", "cr-norm", "penalty", "rpp", "projection", "remul")
RIVALS += ("remul-gradnorm", "controlled")


def narrow(table: str) -> str:
    """A Markdown table without the spaces that align its columns."""
    return re.sub(" +", " ", table)


def tiny(*words: str) -> RunConfig:
    """A run of a second or so."""
    return load_run("nbody", (*TINY, *words))


def command(*words: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line as users do, in a process of its own."""
    code = "from ace.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *words],
        capture_output=True,
        text=True,
        env=environment,
        check=check,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keep generated data out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.getbasetemp() / "data"
        patch.setenv("ACE_CACHE", str(folder))
        yield folder
