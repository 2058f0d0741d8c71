import errno
import gc
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from runs import METHODS, ROOT, TINY, cache, tiny  # noqa: F401

import ace
from ace import checkpoint
from ace.errors import CheckpointMismatch, ConfigError, DataError, NonFiniteLoss, NotWritten
from benchmarks.config import load_run
from benchmarks.locks import Locked, locked
from benchmarks.methods import METHODS as METHOD_CLASSES
from benchmarks.models import MODELS
from benchmarks.tasks.base import Dynamics, Task
from benchmarks.train import RunFailed, build_model, build_task, run, training_batches

pytestmark = pytest.mark.usefixtures("cache")

KILLER = """
import json, os, signal, sys
from pathlib import Path
from benchmarks.config import load_run
from benchmarks.train import run

def kill_at(last):
    return lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == last else None

for folder, words, steps in json.loads(sys.argv[1]):
    for step in steps:  # killed, resumed, killed again
        child = os.fork()
        if child == 0:
            run(load_run("nbody", words), Path(folder), kill_at(step))
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
KILLED = ("strict", "ace", "ace-resilient", "ace-tolerance", "cr")


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):  # noqa: F811
    """Run folders whose processes were killed at random steps, twice each."""
    folder = tmp_path_factory.mktemp("killed")
    draw = random.Random(20)
    cases = {
        name: (
            str(folder / name),
            [*TINY, f"method={name}", "augment=true", "average=0.9"],
            sorted(draw.sample(range(1, 21), 2)),
        )
        for name in KILLED
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, json.dumps(list(cases.values()))]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return {name: Path(path) for name, (path, _, _) in cases.items()}


def weights(folder, config):
    """Everything in the last checkpoint but the clock."""
    state = checkpoint.load(folder / "checkpoint.pt", config=config.identity())
    del state["seconds"]
    return state


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def outcome(summary):
    """The part of a summary that does not depend on the machine's clock and memory."""
    return {k: v for k, v in summary.items() if not re.search("seconds|memory|git", k)}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_run_resumes_to_the_uninterrupted_one_bitwise(killed, tmp_path, name):
    config = tiny(f"method={name}", "augment=true", "average=0.9")
    folder = killed[name]
    assert not (folder / "summary.json").exists()
    resumed = run(config, folder)
    straight = run(config, tmp_path)
    assert (folder / "history.csv").read_bytes() == (tmp_path / "history.csv").read_bytes()
    assert_same(weights(folder, config), weights(tmp_path, config))
    assert outcome(resumed) == outcome(straight)


def test_an_average_of_the_weights_is_evaluated_and_shipped(tmp_path):
    config = tiny("method=strict", "average=0.8", "eval_every=20")
    summary = run(config, tmp_path / "averaged")
    plain = run(tiny("method=strict", "eval_every=20"), tmp_path / "plain")
    task = build_task(config)
    method = METHOD_CLASSES["strict"](config, build_model(config, task), task)
    average, batches = {}, training_batches(config, task)
    for step in range(1, 21):
        method.step(next(batches)[1])
        decay = min(0.8, (1 + step) / (10 + step))
        for key, value in method.model.state_dict().items():
            average[key] = decay * average.get(key, value) + (1 - decay) * value
    method.model.load_state_dict(average)
    assert summary["valid_shipped"] == pytest.approx(task.evaluate(method.model, "valid")["mse"], rel=1e-5)
    assert summary["valid_shipped"] != plain["valid_shipped"]


def test_a_run_goes_on_from_its_checkpoint_and_not_from_the_start(tmp_path):
    class Killed(BaseException):
        pass

    def stop(step):
        if step == 13:
            raise Killed

    config = tiny()
    with pytest.raises(Killed):
        run(config, tmp_path, stop)
    taken = []
    run(config, tmp_path, taken.append)
    assert taken == list(range(9, 21))  # the last checkpoint was at step 8


@pytest.mark.parametrize("name", METHODS)
def test_the_folder_and_the_summary_of_a_run(tmp_path, name):
    config = tiny(f"method={name}")
    summary = run(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "config.yaml",
        "history.csv",
        "checkpoint.pt",
        "summary.json",
    }
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert load_run(tmp_path / "config.yaml") == config
    ships_relaxed = name in {"unconstrained", "ace-resilient", "ace-tolerance"}
    assert summary["test_shipped"] == summary["test_relaxed" if ships_relaxed else "test_restored"]
    if ships_relaxed:
        assert (summary["equivariance_error"] > 1e-3) == (summary["max_gamma"] > 0)
    else:
        assert summary["equivariance_error_float64"] < 1e-11
        assert summary["equivariance_error"] < 1e-5
    assert summary["parameters_inference"] == _parameters(config) or ships_relaxed
    assert summary["parameters_train"] >= _parameters(config)
    assert (summary["parameters_train"] == _parameters(config)) == (name == "strict")
    assert summary["seconds"] > 0
    assert summary["seconds_per_step"] * config.steps <= summary["seconds"]
    assert summary["peak_memory_mb"] > 10
    assert "escnn" not in summary
    for package in ("torch", "e3nn", "numpy", "torch-geometric"):
        assert summary[package] == import_module(package.replace("-", "_")).__version__
    if name in {"ace", "cr", "strict"}:
        assert summary["final_max_gamma"] == summary["final_projection_gap"] == 0


def test_the_summary_has_the_version_of_the_package_of_the_model(tmp_path, monkeypatch):
    """Under the name that pip knows it by."""
    monkeypatch.setitem(MODELS, "egnn", replace(MODELS["egnn"], package="yaml"))
    summary = run(tiny("method=strict"), tmp_path)
    assert summary["PyYAML"] == yaml.__version__


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_memory_and_time_of_a_run_on_a_gpu(tmp_path):
    summary = run(tiny("method=strict", "device=cuda"), tmp_path)
    assert summary["peak_memory_mb"] == torch.cuda.max_memory_allocated() / 2**20
    assert 0 < summary["seconds_per_step"] * 20 < summary["seconds"]


def _parameters(config):
    return sum(p.numel() for p in build_model(config, build_task(config)).parameters())


def test_the_model_is_selected_on_validation_only(tmp_path, monkeypatch):
    config = tiny("method=ace-resilient")
    splits = []
    original = Task.evaluate

    def watched(task, model, split):
        splits.append(split)
        return original(task, model, split)

    monkeypatch.setattr(Task, "evaluate", watched)
    summary = run(config, tmp_path)
    assert set(splits[: splits.index("test")]) == {"valid"}
    assert set(splits[splits.index("test") :]) == {"test"}
    history = ace.History.load(tmp_path / "history.csv").frame()
    curve = history[history["quantity"] == "valid_relaxed"]
    best = curve.loc[curve["value"].idxmin()]
    assert (summary["selected_step"], summary["valid_shipped"]) == (best["step"], best["value"])


def test_the_summary_is_that_of_the_selected_weights(tmp_path):
    config = tiny("method=ace-resilient", "steps=20", "eval_every=2")
    summary = run(config, tmp_path)
    state = checkpoint.load(tmp_path / "checkpoint.pt", config=config.identity())
    task = build_task(config)
    relaxed = ace.relax(build_model(config, task), layers="^layers.[01]$", example=task.example())
    relaxed.load_state_dict(state["best"]["model"])
    assert task.evaluate(relaxed, "valid")["mse"] == summary["valid_shipped"]
    assert task.evaluate(relaxed, "test")["mse"] == summary["test_relaxed"]


def test_terms_retired_after_the_selected_step_act_again_in_the_summary(tmp_path, monkeypatch):
    values = iter([0.1, 0.1, *[1.0] * 100])
    original = Task.evaluate

    def first_is_best(task, model, split):
        return {"mse": next(values)} if split == "valid" else original(task, model, split)

    monkeypatch.setattr(Task, "evaluate", first_is_best)
    summary = run(tiny("method=ace", "eval_every=1"), tmp_path)
    assert summary["selected_step"] == 1
    assert summary["max_gamma"] > 0 == summary["final_max_gamma"]
    assert summary["projection_gap"] > 0
    assert summary["test_relaxed"] != summary["test_restored"] == summary["test_shipped"]


@pytest.mark.slow  # compiling takes half a minute each
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
@pytest.mark.parametrize("method", ["strict", "ace", "ace-resilient", "ace-tolerance", "cr", "remul"])
def test_a_compiled_run_is_the_plain_one_to_rounding(tmp_path, method):
    frames = {}
    for compiled in (False, True):
        config = tiny(f"method={method}", f"compile={compiled}".lower(), "steps=100", "eval_every=50")
        summary = run(config, tmp_path / str(compiled))
        assert summary.get("config.compile", False) is compiled
        frames[compiled] = ace.History.load(tmp_path / str(compiled) / "history.csv").frame()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    first = frames[False]["step"] <= 10  # before a rounding can decide when γ is 0
    plain, compiled = (torch.tensor(frame.loc[first, "value"].to_numpy()) for frame in frames.values())
    torch.testing.assert_close(plain, compiled, rtol=2e-3, atol=1e-5)


def test_what_cannot_be_compiled_runs_as_it_is(tmp_path):
    """Neither forward nor backward: there is no compiler. A process of its own, since graphs and failures are kept."""
    sizes = ("task.train=40", "task.valid=10", "task.test=10", "model.layers=1", "model.width=4")
    words = (*sizes, "steps=4", "eval_every=2", "batch_size=16", "log_every=1", "method=ace")
    plain = run(load_run("broken", words), tmp_path / "plain")
    folder = tmp_path / "compiled"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_run("broken", (*words, "compile=true")).to_yaml())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CXX": "false"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "benchmarks.train", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No working C++ compiler" in done.stderr  # it was tried
    compiled = json.loads((folder / "summary.json").read_text())
    assert compiled["config.compile"]
    for key in ("valid_shipped", "test_shipped", "final_max_gamma"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-5)
    before, after = (ace.History.load(tmp_path / name / "history.csv").frame() for name in ("plain", "compiled"))
    pd.testing.assert_frame_equal(before, after, rtol=1e-5, atol=1e-7)


def test_the_history_holds_no_clock_and_every_evaluation(tmp_path):
    run(tiny("method=ace", "log_every=4"), tmp_path)
    frame = ace.History.load(tmp_path / "history.csv").frame()
    assert set(frame["quantity"]) == {
        "loss",
        "gamma",
        "violation",
        "multiplier",
        "valid_relaxed",
        "valid_restored",
        "equivariance_error",
        "admitted",
    }
    assert sorted(set(frame.loc[frame["quantity"] == "loss", "step"])) == [1, 4, 8, 12, 16, 20]
    assert sorted(set(frame.loc[frame["quantity"] == "valid_restored", "step"])) == [5, 10, 15, 20]
    assert set(frame["epoch"]) == set(range(math.ceil(20 / math.ceil(40 / 16))))


def test_the_order_of_the_data_depends_on_seed_and_epoch_only():
    config = tiny("augment=true")
    task = build_task(config)
    straight = training_batches(config, task)
    batches = [next(straight) for _ in range(8)]
    for start in range(8):
        epoch, batch = next(training_batches(config, task, start))
        assert epoch == batches[start][0]
        assert torch.equal(batch.target, batches[start][1].target)
    assert [len(batch.target) // 5 for _, batch in batches[:3]] == [16, 16, 8]  # an epoch, all samples
    other = next(training_batches(tiny("augment=true", "seed=1"), task))[1]
    assert not torch.equal(other.target, batches[0][1].target)
    plain = next(training_batches(tiny(), task))[1]
    assert torch.equal(plain.inputs["h"], batches[0][1].inputs["h"])  # the same samples, moved
    assert not torch.allclose(plain.target, batches[0][1].target)


def test_two_runs_are_equal(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    one, other = (run(tiny("method=ace"), folder) for folder in folders)
    assert outcome(one) == outcome(other)
    assert folders[0].joinpath("history.csv").read_bytes() == folders[1].joinpath("history.csv").read_bytes()


def test_a_done_run_is_not_repeated(tmp_path):
    first = run(tiny(), tmp_path)
    assert run(tiny(), tmp_path, lambda step: pytest.fail("trained again")) == first


def test_a_failed_run_is_never_done_and_a_rerun_retries_it(tmp_path, monkeypatch):
    original = Task.loss

    def diverging(task, model, batch):
        return original(task, model, batch) * (math.nan if model.training else 1)

    with monkeypatch.context() as patch:
        patch.setattr(Task, "loss", diverging)
        with pytest.raises(RunFailed, match="nan") as caught:
            run(tiny("method=ace"), tmp_path)
    assert isinstance(caught.value.__cause__, NonFiniteLoss)
    assert not (tmp_path / "summary.json").exists()
    error = (tmp_path / "error.txt").read_text()
    assert error.startswith("Traceback")
    assert "NonFiniteLoss" in error.splitlines()[-1]
    assert run(tiny("method=ace"), tmp_path)["status"] == "done"
    assert not (tmp_path / "error.txt").exists()


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    run(tiny(), tmp_path)
    (tmp_path / "summary.json").unlink()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(RunFailed, match=r"lr is 0\.5 now and was 0\.001") as caught:
        run(tiny("lr=0.5"), tmp_path)
    assert isinstance(caught.value.__cause__, CheckpointMismatch)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_truncated_checkpoint_is_refused(tmp_path):
    run(tiny(), tmp_path)
    (tmp_path / "summary.json").unlink()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunFailed, match="truncated"):
        run(tiny(), tmp_path)


def test_another_checkpoint_interval_is_no_other_run(tmp_path):
    class Killed(BaseException):
        pass

    def stop(step):
        if step == 13:
            raise Killed

    with pytest.raises(Killed):
        run(tiny(), tmp_path / "a", stop)
    resumed = run(tiny("checkpoint_every=3"), tmp_path / "a")
    assert outcome(resumed) == outcome(run(tiny(), tmp_path / "b"))


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the history's last attempt
def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    def fill(step):
        if step == 10:
            monkeypatch.setattr(torch, "save", full_disk)
            monkeypatch.setattr("ace.history._write", full_disk)

    with pytest.raises(RunFailed, match="No space left") as caught:
        run(tiny("method=ace"), tmp_path, fill)
    del caught
    gc.collect()
    monkeypatch.undo()
    assert not (tmp_path / "summary.json").exists()
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 8
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*.tmp"))
    resumed = run(tiny("method=ace"), tmp_path)
    assert outcome(resumed) == outcome(run(tiny("method=ace"), tmp_path / "straight"))


def test_a_summary_that_cannot_be_written_is_not_done(tmp_path, monkeypatch):
    original = ace.history.replace_file

    def write(path, content):
        if path.name in {"summary.json", "error.txt"}:
            raise NotWritten(f"{path}: disk full")
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.train.replace_file", write)
        with pytest.raises(RunFailed, match="disk full"):
            run(tiny(), tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert run(tiny(), tmp_path, lambda step: pytest.fail("trained again"))["status"] == "done"


def test_missing_data_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="ace data mocap"):
        run(load_run("mocap-run", ["steps=1"]), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "ace data mocap" in (tmp_path / "run" / "error.txt").read_text()


def test_an_option_that_follows_from_the_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Dynamics, "model_options", lambda task, name: {"node_features": 1, "edge_features": 1, "layers": 3}
    )
    with pytest.raises(ConfigError, match=r"model\.layers is 2"):
        run(tiny(), tmp_path)


def test_a_run_is_locked(tmp_path):
    with locked(tmp_path), pytest.raises(Locked, match="another process"):
        run(tiny(), tmp_path)
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")
@pytest.mark.parametrize("model", ["egno", "egnn"])
def test_motion_capture_runs(tmp_path, model):
    config = load_run("mocap-run", [f"model={model}", "model.hidden=8", "model.layers=2", "steps=2", "method=cr"])
    summary = run(config, tmp_path)
    assert pd.notna(summary["test_shipped"])
    assert summary["equivariance_error_float64"] < 1e-9
