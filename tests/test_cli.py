import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from types import SimpleNamespace

import pytest
from runs import METHODS, ROOT, TINY, cache, command, tiny  # noqa: F401

from ace.cli import DOWNLOADS, main
from benchmarks.locks import is_locked, locked
from benchmarks.models import MODELS

pytestmark = pytest.mark.usefixtures("cache")
COMMANDS = ("tasks", "run", "suite", "status", "table", "plot", "ranks", "data", "certify", "diagnose")


@pytest.fixture(scope="module")
def smoke(cache, tmp_path_factory):  # noqa: F811
    """The smoke suite, one seed, run from the command line."""
    out = tmp_path_factory.mktemp("smoke") / "out"
    done = command("suite", "configs/suites/smoke.yaml", "seed=0", "--jobs", "2", "--out", str(out))
    return done, out


def test_the_smoke_suite_runs_every_method(smoke):
    done, _ = smoke
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(METHODS)  # one line a run, and no bar where there is no terminal
    pattern = rf"\[\d/{len(METHODS)}\] nbody-egnn/([a-z-]+)/seed0 +done +test [\d.]+  \d+ s"
    assert {re.fullmatch(pattern, line)[1] for line in lines[1:]} == set(METHODS)


def inside(*words):
    """Run the command line in this process; return exit code, output and errors."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["ace", *words])
        patch.setenv("COLUMNS", "200")
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    signal.signal(signal.SIGTERM, handler)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_the_same_command_has_nothing_left_to_do(smoke):
    _, out = smoke
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    done = inside("suite", "smoke", "seed=0", "--out", str(out))
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{len(METHODS)} runs in {out}, {len(METHODS)} of them done already"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")} == before


def test_a_folder_that_another_suite_works_in_is_refused(smoke):
    _, out = smoke
    with locked(out):
        done = inside("suite", "smoke", "seed=0", "--out", str(out))
    assert done.returncode == 2
    assert f"pid {os.getpid()}" in done.stderr


def test_commands_are_printed_and_nothing_else(tmp_path):
    done = inside("suite", "smoke", "seed=0", "--print-commands", "--out", str(tmp_path))
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == len(METHODS)
    assert all(line.startswith("env ") and str(tmp_path) in line for line in lines)
    assert inside("status", str(tmp_path)).stdout.splitlines()[-1] == f"pending {len(METHODS)}"


def test_without_ray_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it raises ModuleNotFoundError
    done = inside("suite", "smoke", "--ray", "auto", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "[ray]" in done.stderr
    assert not (tmp_path / "out").exists()


def test_status_counts(smoke):
    done = inside("status", str(smoke[1]))
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"done {len(METHODS)}"


@pytest.mark.parametrize("form", ["markdown", "latex", "csv"])
def test_table_has_a_row_for_every_method(smoke, form):
    done = inside("table", str(smoke[1]), "--format", form, "--metrics", "test_shipped,equivariance_error")
    assert done.returncode == 0
    rows = [line for line in done.stdout.splitlines() if "nbody" in line]
    assert len(rows) == len(METHODS)
    if form == "markdown":
        tested, symmetric = ([row.split("|")[column] for row in rows] for column in (-3, -2))
        assert any("**" in cell for cell in tested)
        assert not any("*" in cell for cell in symmetric)


def test_table_names_a_column_that_is_not_there(smoke):
    done = inside("table", str(smoke[1]), "--metrics", "tset")
    assert (done.returncode, done.stdout) == (2, "")
    assert "tset" in done.stderr
    assert "Traceback" not in done.stderr


def test_plots_are_images_with_something_on_them(smoke, tmp_path):
    done = inside("plot", str(smoke[1]), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    paths = sorted(tmp_path.glob("*.png"))
    assert sorted(done.stdout.split()) == [str(path) for path in paths]
    of_pair = {f"nbody-egnn-{name}" for name in (*METHODS, "learning-curves", "equivariance-error")}
    assert {path.stem for path in paths} == of_pair | {"comparison"}
    assert all(colours(path) > 20 for path in paths)


def test_ranks_are_printed_and_drawn(tmp_path):
    for task, error in (("nbody", 1.0), ("broken", 3.0)):
        for method, factor in (("strict", 2.0), ("ace", 1.0)):
            run = tmp_path / task / method
            run.mkdir(parents=True)
            (run / "config.yaml").write_text("")
            row = {"task": task, "model": "egnn", "method": method, "seed": 0, "test_shipped": error * factor}
            (run / "summary.json").write_text(json.dumps({**row, "equivariance_rms": 0.0}))
    done = inside("ranks", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2:4] == ["| ace | 1.00 |", "| strict | 2.00 |"]
    assert "not told apart: ace, strict" in done.stdout
    assert colours(tmp_path / "figures" / "ranks.png") > 20
    done = inside("ranks", str(tmp_path / "nbody"))
    assert done.returncode == 2
    assert "1 pairs" in done.stderr
    done = inside("plot", str(tmp_path), "--suffix", "svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(tmp_path / "figures" / "ranks.svg") in done.stdout.split()


def colours(path):
    """Number of different values in the pixel data of a PNG file."""
    content, data, place = path.read_bytes(), b"", 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        if content[place + 4 : place + 8] == b"IDAT":
            data += content[place + 8 : place + 8 + length]
        place += 12 + length
    return len(set(zlib.decompress(data)))


def test_tasks_lists_tasks_and_explains_missing_data(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_DATA", str(tmp_path))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    done = inside("tasks")
    assert done.returncode == 0
    assert re.search(r"nbody-iso +egnn, segnn +ready", done.stdout)
    assert re.search(r"mocap-run +egno, egnn +missing", done.stdout)
    assert "ace data mocap" in done.stdout
    for name, entry in MODELS.items():
        assert (f"{name} ({entry.package})" in done.stdout) == (not entry.installed)
    assert ("make test-hosts" in done.stdout) == any(not entry.installed for entry in MODELS.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mocap-run", "ace data mocap`"),
        ("mocap-walk", "ace data mocap`"),
        ("smoke2d", "python -m pip install phiflow"),
        ("nowhere", "there is: mocap, modelnet10, modelnet40, qm9, md, rotmnist, smoke2d"),
    ],
)
def test_data_that_cannot_be_had_are_explained(tmp_path, monkeypatch, name, message):
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "phi", None)
    done = inside("data", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def fail(url, **options):
        raise OSError("no route to host")

    pooch = pytest.importorskip("pooch", reason="downloads need the extra 'bench'")
    monkeypatch.setattr(pooch, "retrieve", fail)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    running = inside("data", "mocap")
    monkeypatch.setattr("benchmarks.motion.download_run", lambda: tmp_path / "run09.npz")
    walking = inside("data", "mocap")
    for done, file in ((running, "run09.npz"), (walking, "walk35.npz")):
        assert (done.returncode, done.stdout) == (2, "")
        assert "could not be downloaded (no route to host). Try again." in done.stderr
        assert f"put {file} and {file}.sha256" in done.stderr
        assert "Traceback" not in done.stderr
    assert f"The running motions are there: {tmp_path / 'run09.npz'}" in walking.stderr
    assert not list(tmp_path.iterdir())


def test_every_download_is_there_and_every_task_has_an_answer():
    for module, function in DOWNLOADS.values():
        assert callable(getattr(import_module(f"benchmarks.{module}"), function))
    done = inside("data", "nbody")
    assert (done.returncode, done.stderr) == (0, "")
    assert "generated by its first run" in done.stdout


def test_run_trains_shows_and_does_not_train_again(tmp_path):
    words = ("run", "nbody", *TINY, "method=cr", "--out", str(tmp_path))
    done = inside(*words)
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads((tmp_path / tiny("method=cr").folder / "summary.json").read_text())
    assert f"{summary['test_shipped']:.5g}" in done.stdout
    assert inside(*words).stdout == done.stdout


def test_a_failed_run_has_exit_code_1_and_no_traceback(tmp_path):
    done = inside("run", "nbody", *TINY, "method=ace", "optimizer=sgd", "lr=1e20", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("failed: NonFiniteLoss")
    assert "Traceback" not in done.stderr
    assert inside("status", str(tmp_path)).returncode == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "nbody", "stepz=3"), "did you mean 'steps'"),
        (("run", "nbdy"), "did you mean 'nbody'"),
        (("suite", "smok"), "did you mean 'smoke'"),
        (("suite", "smoke", "--jobs", "2", "--ray", "auto"), "give one of --jobs"),
        (("suite", "smoke", "--gpus", "1"), "--gpus is for --ray"),
        (("status", "no/such/folder"), "no/such/folder"),
        (("table", "no/such/folder"), "no/such/folder"),
        (("plot", "."), "nothing to plot"),
        (("data", "qm8"), "mocap"),
        (("run",), "Missing argument"),
        (("table", ".", "--format", "html"), "html"),
        (("sweet",), "sweet"),
    ],
)
def test_a_wrong_command_has_exit_code_2_and_one_message(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = inside(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_missing_data_are_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("ACE_DATA", str(tmp_path))
    monkeypatch.setenv("ACE_CACHE", str(tmp_path))
    done = inside("run", "mocap-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "ace data mocap" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_suite_has_exit_code_130_and_leaves_nothing_running(tmp_path, name):
    words = ("suite", "smoke", "steps=1000000", "seed=0", "--out", str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-m", "ace.cli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs in background
    )
    with process:
        try:
            while not any(map(is_locked, tmp_path.glob("*/*/*"))):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(name)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.terminate()  # which ends its workers too
    assert process.returncode == 130
    assert stderr == "interrupted; the same command resumes\n"
    assert not any(map(is_locked, tmp_path.glob("*/*/*")))
    assert inside("status", str(tmp_path)).stdout.splitlines()[-1] == f"pending {len(METHODS) - 1} · interrupted 1"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_with_an_example(name):
    done = inside(name, "--help")
    assert done.returncode == 0
    assert f"ace {name}" in done.stdout.split("Usage:")[1].split("\n", 1)[1]
    assert all(other in inside("--help").stdout for other in COMMANDS)


@pytest.mark.parametrize(("hidden", "message"), [("benchmarks", "in a checkout"), ("yaml", "[bench]")])
def test_without_the_benchmarks_the_message_says_what_to_do(monkeypatch, hidden, message):
    for name in [name for name in sys.modules if name.split(".")[0] in {"benchmarks", hidden}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)  # importing it raises ModuleNotFoundError
    done = inside("tasks")
    assert done.returncode == 2
    assert message in done.stderr
