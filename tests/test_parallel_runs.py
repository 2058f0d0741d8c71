"""A benchmark run on several processes is the run on one, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from ranks import spawn
from runs import ROOT, TINY, cache, tiny  # noqa: F401

import ace
from ace import checkpoint
from benchmarks.config import load_run
from benchmarks.processes import share
from benchmarks.tasks import TASKS
from benchmarks.tasks.base import Task
from benchmarks.train import RunFailed, build_task, run

pytestmark = pytest.mark.usefixtures("cache")
QUICK = ("strict", "ace", "ace-tolerance")
SLOW = ("unconstrained", "ace-resilient", "ace-paper", "augmentation", "linear-decay", "controlled", "cr", "cr-norm")
SLOW += ("penalty", "rpp", "projection", "remul", "remul-gradnorm")
METHODS = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
WORDS = (
    "task.train=31",
    "batch_size=15",
    "steps=7",
    "eval_every=3",
    "checkpoint_every=4",
    "augment=true",
    "average=0.9",
)
"""Batches of 15, 15 and 1: shares of different sizes, and a batch that two processes cannot divide."""


def case(name):
    return tiny(*WORDS, f"method={name}")


class Killed(BaseException):
    """What no training catches."""


def kill(step):
    if step == 6:
        raise Killed


def own(rank, folder):
    """The folder of the first process; others, who write nothing, need none."""
    return folder if rank == 0 else folder / "nowhere"


def two(rank, folder, names):
    """Train each method; resume a run of one process; meet an error of the second process alone."""
    for name in names:
        run(case(name), own(rank, folder / name))
    run(case("ace"), folder / "of-one-process")
    original = Task.loss

    def failing(task, model, batch):
        if rank == 1 and model.training and len(batch) == 8:
            raise ValueError("a bad graph")
        return original(task, model, batch)

    Task.loss = failing
    try:
        run(case("strict"), own(rank, folder / "failed"))
    except RunFailed as error:
        return str(error)


def four(rank, folder):
    """Train until the first process is killed."""
    try:
        run(case("ace"), own(rank, folder), kill)
    except (Killed, RunFailed) as error:
        return type(error).__name__


def names(request):
    return [name for name in (*QUICK, *SLOW) if any(f"[{name}]" in item.name for item in request.session.items)]


@pytest.fixture(scope="module")
def runs(cache, request, tmp_path_factory):  # noqa: F811
    """Folder of the runs of two processes, and how their last one ended."""
    folder = tmp_path_factory.mktemp("two")
    build_task(case("strict"))
    with pytest.raises(Killed):
        run(case("ace"), folder / "of-one-process", kill)
    return folder, spawn(two, 2, tmp_path_factory.mktemp("ranks"), folder, names(request), dtype=torch.float32)


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):  # noqa: F811
    """Train with one process."""
    folder = tmp_path_factory.mktemp("one")

    def train(name):
        run(case(name), folder / name)
        return folder / name

    return train


def weights(folder, config):
    return checkpoint.load(folder / "checkpoint.pt", config=config.identity())["method"]["model"]


def assert_same_run(folder, other, config):
    """All that a run leaves is the same, to the rounding of float32 in a few steps."""
    one, two = (ace.History.load(path / "history.csv").frame() for path in (folder, other))
    assert one.drop(columns="value").equals(two.drop(columns="value"))
    torch.testing.assert_close(torch.tensor(two["value"]), torch.tensor(one["value"]), rtol=1e-3, atol=1e-6)
    one, two = weights(folder, config), weights(other, config)
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-6)
    one, two = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    for key in ("config_hash", "parameters_train", "parameters_inference", "selected_step"):
        assert one[key] == two[key]
    assert two["test_shipped"] == pytest.approx(one["test_shipped"], rel=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(name, runs, alone):
    folder = runs[0] / name
    assert_same_run(alone(name), folder, case(name))
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "history.csv",
        "checkpoint.pt",
        "summary.json",
    }
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2


def test_two_processes_resume_what_one_began(runs, alone):
    assert_same_run(alone("ace"), runs[0] / "of-one-process", case("ace"))


def test_an_error_in_one_process_ends_all(runs):
    folder, (first, second) = runs
    assert "a bad graph" in second
    assert "in process 1" in second
    assert str(folder / "failed" / "error.txt") in first
    assert not (folder / "failed" / "summary.json").exists()


@pytest.mark.slow
def test_one_process_resumes_what_four_began(cache, alone, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("four")
    ended = spawn(four, 4, tmp_path_factory.mktemp("ranks"), folder, dtype=torch.float32)
    assert ended == ["Killed", "RunFailed", "RunFailed", "RunFailed"]
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 4
    run(case("ace"), folder)
    assert_same_run(alone("ace"), folder, case("ace"))


def torchrun(*words):
    """Start two processes as users do."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ace.cli"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, timeout=250)


@pytest.mark.slow
def test_torchrun_trains_one_run(alone, tmp_path):
    done = torchrun("run", "nbody", *TINY, *WORDS, "method=ace", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_shipped") == done.stdout.count(str(tmp_path)) == 1
    assert_same_run(alone("ace"), tmp_path / case("ace").folder, case("ace"))


@pytest.mark.slow
def test_torchrun_ends_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    done = torchrun("run", "mocap-run", "steps=1", "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "ace data mocap" in done.stderr
    assert "ace data mocap" in next((tmp_path / "out").rglob("error.txt")).read_text()


GENERATED = ["nbody", "broken"]
READ = ["qm9", "md", "mocap-run", "rotmnist"]
PARAMETERS = [*GENERATED, pytest.param("nbody-gravity", marks=pytest.mark.slow)]
PARAMETERS += [pytest.param(name, marks=pytest.mark.data) for name in READ]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_part_of_a_batch_is_the_batch_of_its_samples(name):
    words = [] if name in READ else ["task.train=20", "task.valid=4", "task.test=4"]
    config = load_run(name, words)
    available, how = TASKS[config.task.name].available()
    if not available and name in READ:
        pytest.skip(how)
    task = build_task(config)
    chosen = torch.randperm(task.size("train"))[:9]
    whole = task.collate("train", chosen)
    for first, last in ((0, 9), (0, 4), (3, 8), (8, 9)):
        part, expected = whole.part(first, last), task.collate("train", chosen[first:last])
        assert len(part) == last - first
        for found, wanted in ((part.inputs, expected.inputs), (_named(part.target), _named(expected.target))):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert torch.equal(found[key], value), key


def _named(target):
    return target if isinstance(target, dict) else {"": target}


def test_the_parts_make_the_batch_and_their_weights_its_mean(monkeypatch):
    task = build_task(case("strict"))
    for count in (2, 7, 15):
        whole = next(task.batches("train", count))
        for world in (1, 2, 3, 5):
            monkeypatch.setattr("benchmarks.processes.world_size", lambda world=world: world)
            parts = []
            for rank in range(world):
                monkeypatch.setattr("benchmarks.processes.rank", lambda rank=rank: rank)
                parts.append(share(whole))
            mean = sum(weight * part.target.mean() for part, weight in parts) / world
            torch.testing.assert_close(mean, whole.target.mean())
            assert [len(part) for part, _ in parts] == [count] * world or sum(len(p) for p, _ in parts) == count
