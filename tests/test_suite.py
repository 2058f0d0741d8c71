import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from runs import ROOT, TINY, cache, command, tiny  # noqa: F401

from ace import results
from ace.errors import AceError, ConfigError, DataError
from benchmarks import executors
from benchmarks.config import load_run, load_suite
from benchmarks.executors import Processes
from benchmarks.locks import NAME, Locked, holder, is_locked, locked
from benchmarks.models import MODELS
from benchmarks.suite import prepare, run_suite, shell_commands, status
from benchmarks.tasks import TASKS
from benchmarks.train import build_model, how_to_install, run

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
    with pytest.raises(ConfigError, match=r"no_such_package, which is not installed here\. Install it"):
        build_model(load_run("nbody", ["model=segnn"]), None)


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if not entry.installed])
def test_a_model_with_an_environment_of_its_own_is_pointed_there(tmp_path, name):
    """One that exists, or can be made."""
    pair = {"tasks": [next(task for task, entry in TASKS.items() if name in entry.models)], "models": [name]}
    with pytest.raises(DataError, match=f"{name}: its package .*make test-hosts") as caught:
        prepare(suite(tmp_path, {**pair, "methods": ["strict"]}), tmp_path / "out")
    [environment] = re.findall(r"\.venvs/([a-z]+)/bin/ace", str(caught.value))
    assert (ROOT / "tests" / "hosts" / "environments" / f"{environment}.txt").is_file()
    assert f"`.venvs/{environment}`" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f".venvs/{environment}/bin/ace" in how_to_install(MODELS[name].package)


def test_a_suite_runs_what_is_missing_and_reports_each(tmp_path):
    runs = [tiny("method=strict"), tiny("method=ace"), tiny("method=ace", "seed=1")]
    run(runs[0], tmp_path / runs[0].folder)
    reported = []
    outcomes = run_suite(runs, tmp_path, Processes(2), report=reported.append)
    assert reported == outcomes
    assert {outcome.config for outcome in outcomes} == set(runs[1:])
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert words(tmp_path) == {run.folder.as_posix(): "done" for run in runs}
    assert len(results.load_results(tmp_path)) == 3
    assert run_suite(runs, tmp_path, Processes(2), report=lambda outcome: pytest.fail("run again")) == []

    run(runs[1], tmp_path / "here")  # a worker gives the result of this process
    worker = tmp_path / runs[1].folder
    assert (worker / "history.csv").read_bytes() == (tmp_path / "here" / "history.csv").read_bytes()


def test_a_dead_or_failing_worker_costs_its_own_run_only(tmp_path):
    endless = tiny("steps=1000000", "checkpoint_every=20", "eval_every=500000")
    diverging = tiny("method=ace", "optimizer=sgd", "lr=1e20")
    done = tiny("method=strict")
    run(done, tmp_path / done.folder)

    def kill_once_there_is_a_checkpoint():
        folder = tmp_path / endless.folder
        while not (folder / "checkpoint.pt").exists():
            time.sleep(0.05)
        seen.update(words(tmp_path))
        os.kill(int(holder(folder).split()[1]), signal.SIGKILL)

    seen = {}
    killer = threading.Thread(target=kill_once_there_is_a_checkpoint)
    killer.start()
    outcomes = {
        o.config: o for o in run_suite([endless, diverging, done], tmp_path, Processes(2), lambda outcome: None)
    }
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
    swept = suite(tmp_path, {**block, "sweep": {"lr": [0.1, 0.2]}}, overrides={**over, **data})
    assert [run.hash for run in swept.runs] == [first.runs[0].hash, second.runs[0].hash]
    assert prepare(swept, tmp_path / "out") == (swept.runs, [])  # it resumes, with runs of its own in the folder


def wait_for_three(folder, variables):
    (folder / "seen").write_text(variables["CUDA_VISIBLE_DEVICES"] + " " + variables["OMP_NUM_THREADS"])
    while len(list(folder.parent.glob("*/seen"))) < 3:
        time.sleep(0.01)


def test_workers_share_the_gpus_and_have_the_threads_of_their_runs(tmp_path, monkeypatch):
    """Three workers that wait for one another, and two GPUs."""
    monkeypatch.setattr(executors, "_work_here", wait_for_three)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    runs = [tiny("threads=3", f"seed={seed}") for seed in range(3)]
    assert {ended.how for ended in Processes(3)(runs, tmp_path)} == {"with exit code 0"}
    seen = [(tmp_path / run.folder / "seen").read_text() for run in runs]
    assert seen == ["2 3", "GPU-5 3", "2 3"]


def look_afterwards(folder, variables):
    try:
        executors._work_here(folder, variables)
    finally:
        seen = {name: os.environ[name] for name in ("ACE_CACHE", "CUDA_VISIBLE_DEVICES")}
        (folder / "seen").write_text(json.dumps({**seen, "threads": torch.get_num_threads()}))


def test_a_worker_has_the_variables_and_the_threads_of_its_own(tmp_path, monkeypatch):
    """They fork from a server that may have been there before: that of the test before this one."""
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(executors, "_work_here", look_afterwards)
    config = tiny("threads=2")
    [ended] = Processes()([config], tmp_path)
    assert ended.how == "with exit code 0"
    seen = json.loads((tmp_path / config.folder / "seen").read_text())
    assert seen == {"ACE_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "7", "threads": 2}
    assert list((tmp_path / "cache").rglob("*.npz"))
    assert '"config.threads": 2' in (tmp_path / config.folder / "log.txt").read_text()


def test_runs_that_need_a_gpu_are_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch sees no GPU here; device=cpu"):
        run_suite([tiny("device=cuda")], tmp_path / "out", Processes(), print)
    with pytest.raises(ConfigError, match="1 GPUs are needed here, torch sees 0; device=cpu does without"):
        run(tiny("device=cuda"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_suites_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path):
        for start in (lambda: run_suite([tiny()], tmp_path, Processes(), print), lambda: shell_commands([], tmp_path)):
            with pytest.raises(Locked, match=rf"another process is working here \(pid {os.getpid()} on .+ since 2"):
                start()
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert run_suite([], tmp_path, Processes(), print) == []


def test_a_second_command_on_the_folder_is_refused_and_the_first_goes_on(tmp_path):
    """The first is held up, so that it is at work for sure, while the second is tried."""
    over = {"task": {"train": 40, "valid": 10, "test": 10}, "model": {"hidden": 8, "layers": 2}, "steps": 20}
    whole = suite(tmp_path, {"tasks": ["nbody"], "models": ["egnn"], "overrides": over}, methods=["strict", "ace"])
    out = tmp_path / "out"
    line = ("suite", str(tmp_path / "suite.yaml"), "--out", str(out))
    first = subprocess.Popen(
        [sys.executable, "-c", "from ace.cli import main; main()", *line],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not holder(out).endswith("UTC"):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = command(*line)
    finally:
        first.send_signal(signal.SIGCONT)
        output, errors = first.communicate()
    assert second.returncode == 2
    assert f"another process is working here (pid {first.pid} on " in second.stderr
    assert "Traceback" not in second.stderr
    assert (first.returncode, errors) == (0, "")
    assert "0 of them done already" in output
    assert words(out) == {run.folder.as_posix(): "done" for run in whole.runs}
    shown = command("table", str(out), "--metrics", "test_shipped")
    assert shown.returncode == 0, shown.stderr
    rows = [row.split("|")[-4:-2] for row in shown.stdout.splitlines() if "nbody" in row]
    assert sorted((method.strip(), count.strip()) for method, count in rows) == [("ace", "1"), ("strict", "1")]


def test_a_run_that_another_process_works_on_is_left_to_it(tmp_path):
    config = tiny()
    (tmp_path / config.folder).mkdir(parents=True)
    with locked(tmp_path / config.folder):
        [outcome] = run_suite([config], tmp_path, Processes(), lambda outcome: None)
    assert outcome.status == "interrupted"
    assert f"another process is working on it (pid {os.getpid()} on" in outcome.detail


def test_printed_commands_do_the_runs_wherever_they_are_executed(tmp_path, monkeypatch):
    """As in a job array: in another folder, without the variables of this process, two at a time."""
    runs = [tiny("seed=0"), tiny("seed=1", "threads=2")]
    (tmp_path / "a suite's").mkdir()
    monkeypatch.chdir(tmp_path / "a suite's")
    monkeypatch.setenv("ACE_CACHE", os.path.relpath(os.environ["ACE_CACHE"]))
    lines = shell_commands(runs, Path("out"))
    out = tmp_path / "a suite's" / "out"
    assert words(out) == {run.folder.as_posix(): "pending" for run in runs}
    (tmp_path / "commands.txt").write_text("".join(f"{line}\n" for line in lines))
    [snippet] = re.findall(r"--wrap '(.*)'", (ROOT / "docs" / "scale.md").read_text(encoding="utf-8"))
    tasks = [
        subprocess.Popen(
            ["bash", "-c", snippet],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": number},
            stdout=subprocess.PIPE,
        )
        for number in ("1", "2")
    ]
    summaries = [json.loads(task.communicate()[0]) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert [summary["config_hash"] for summary in summaries] == [run.hash for run in runs]
    assert words(out) == {run.folder.as_posix(): "done" for run in runs}
    assert shell_commands(runs, out) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(AceError, match=f"{tmp_path}: its file system does not lock files \\(No locks available"):
        run_suite([tiny()], tmp_path, Processes(), print)


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
