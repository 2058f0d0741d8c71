import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from runs import ROOT, TINY, cache, tiny  # noqa: F401

from ace import results
from ace.errors import ConfigError, DataError
from benchmarks.config import load_run, load_suite
from benchmarks.locks import is_locked, locked
from benchmarks.models import MODELS
from benchmarks.suite import prepare, run_suite, status
from benchmarks.train import build_model, run

pytestmark = pytest.mark.usefixtures("cache")


def suite(folder, *grid, **settings):
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"grid": list(grid), **settings}))
    return load_suite(path)


def words(out):
    return dict(zip(*status(out)[["run", "status"]].T.to_numpy(), strict=True))


def test_a_model_whose_package_is_missing_is_refused_or_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "suite.yaml"
    sizes = "{task: {train: 4, valid: 4, test: 4}}"
    file.write_text(f"methods: [strict]\ngrid: [{{tasks: [nbody], models: [egnn, segnn], overrides: {sizes}}}]\n")
    monkeypatch.setitem(MODELS, "segnn", replace(MODELS["segnn"], package="no_such_package"))
    with pytest.raises(DataError, match="segnn: its package no_such_package is not installed"):
        prepare(load_suite(file), tmp_path / "out")
    file.write_text(file.read_text().replace("overrides", "optional: true, overrides"))
    runs, [reason] = prepare(load_suite(file), tmp_path / "out")
    assert [run.model.name for run in runs] == ["egnn"]
    assert reason.startswith("segnn left out")
    with pytest.raises(ConfigError, match="no_such_package, which is not installed"):
        build_model(load_run("nbody", ["model=segnn"]), None)


def test_a_suite_runs_what_is_missing_and_reports_each(tmp_path):
    runs = [tiny("method=strict"), tiny("method=ace"), tiny("method=ace", "seed=1")]
    run(runs[0], tmp_path / runs[0].folder)
    reported = []
    outcomes = run_suite(runs, tmp_path, jobs=2, report=reported.append)
    assert reported == outcomes
    assert {outcome.config for outcome in outcomes} == set(runs[1:])
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert words(tmp_path) == {run.folder.as_posix(): "done" for run in runs}
    assert len(results.load_results(tmp_path)) == 3
    assert run_suite(runs, tmp_path, jobs=2, report=lambda outcome: pytest.fail("run again")) == []

    run(runs[1], tmp_path / "here")  # a worker gives the result of this process
    worker = tmp_path / runs[1].folder
    assert (worker / "history.csv").read_bytes() == (tmp_path / "here" / "history.csv").read_bytes()


def test_a_dead_or_failing_worker_costs_its_own_run_only(tmp_path, monkeypatch):
    endless = tiny("steps=1000000", "checkpoint_every=20", "eval_every=500000")
    diverging = tiny("method=ace", "optimizer=sgd", "lr=1e20")
    done = tiny("method=strict")
    run(done, tmp_path / done.folder)
    started = []

    def start(*args, **kwargs):
        started.append(subprocess.Popen(*args, **kwargs))
        return started[-1]

    def kill_once_there_is_a_checkpoint():
        folder = tmp_path / endless.folder
        while not (folder / "checkpoint.pt").exists():
            time.sleep(0.05)
        seen.update(words(tmp_path))
        started[0].kill()

    seen = {}
    monkeypatch.setattr("benchmarks.suite.subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    killer = threading.Thread(target=kill_once_there_is_a_checkpoint)
    killer.start()
    outcomes = {o.config: o for o in run_suite([endless, diverging, done], tmp_path, 2, lambda outcome: None)}
    killer.join()
    assert seen[endless.folder.as_posix()] == "running"
    assert outcomes[endless].status == "interrupted"
    assert "signal 9" in outcomes[endless].detail
    assert outcomes[diverging].status == "failed"
    assert "NonFiniteLoss" in outcomes[diverging].detail
    assert (tmp_path / diverging.folder / "log.txt").read_text().startswith("Traceback")
    assert set(results.load_results(tmp_path)["method"]) == {"strict"}
    assert words(tmp_path) == {
        endless.folder.as_posix(): "interrupted",
        diverging.folder.as_posix(): "failed",
        done.folder.as_posix(): "done",
    }


def test_data_are_made_before_any_worker_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    over = yaml.safe_load("{task: {train: 4, valid: 2, test: 2}}")
    whole = suite(tmp_path, {"tasks": ["nbody"], "models": ["egnn"], "overrides": over}, methods=["strict", "ace"])
    runs, left_out = prepare(whole, tmp_path / "out")
    assert (runs, left_out) == (whole.runs, [])
    assert list((tmp_path / "cache").rglob("*.npz"))
    assert not (tmp_path / "out").exists()


def test_missing_data_stop_a_suite_unless_they_are_optional(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    block = {"tasks": ["mocap-run"], "models": ["egno"], "methods": ["strict"]}
    with pytest.raises(DataError, match="ace data mocap"):
        prepare(suite(tmp_path, block), tmp_path / "out")
    runs, [reason] = prepare(suite(tmp_path, {**block, "optional": True}), tmp_path / "out")
    assert runs == []
    assert reason.startswith("mocap-run left out")
    assert "ace data mocap" in reason


def test_a_folder_with_other_configurations_of_the_same_runs_is_refused(tmp_path):
    over = dict(word.split("=") for word in TINY if "." not in word)
    block = {"tasks": ["nbody"], "models": ["egnn"], "methods": ["strict"]}
    data = {"task": {"train": 40, "valid": 10, "test": 10}}
    first, second = (suite(tmp_path, block, overrides={**over, **data, "lr": lr}) for lr in (0.1, 0.2))
    (tmp_path / "out" / first.runs[0].folder).mkdir(parents=True)
    prepare(first, tmp_path / "out")
    with pytest.raises(ConfigError, match=first.runs[0].folder.name):
        prepare(second, tmp_path / "out")


def test_a_lock_is_released_however_its_process_ends(tmp_path):
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)
    code = (
        "import os, sys; from pathlib import Path; from benchmarks.locks import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not is_locked(tmp_path)
