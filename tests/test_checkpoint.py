"""Checkpoints: atomic, refused when they do not fit, never unpickled."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import batches, regression, relaxed_network

import ace
from ace import checkpoint
from ace.errors import AceError, CheckpointMismatch, NotWritten

STATE = {
    "step": 3,
    "weight": torch.arange(400.0),
    "nested": {"list": [1, 2.5, None, "text"], "flag": torch.tensor([True])},
}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE, config={"seed": 1})
    torch.testing.assert_close(checkpoint.load(path)["weight"], STATE["weight"], rtol=0, atol=0)
    loaded = checkpoint.load(str(path), config={"seed": 1})
    assert loaded["nested"]["list"] == STATE["nested"]["list"]
    assert loaded["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]  # no temporary file stays


def test_state_of_a_training(tmp_path):
    def make():
        relaxed = relaxed_network()
        problem = ace.Problem(relaxed, regression, ace.Resilient())
        return ace.PrimalDual(problem, torch.optim.Adam(relaxed.parameters()), steps=100, preset="paper")

    first, second = make(), make()
    data = batches(10)
    for batch in data[:5]:
        first.roll(batch)
    checkpoint.save(tmp_path / "last.pt", first.state_dict(), config={"lr": 1e-3})
    second.load_state_dict(checkpoint.load(tmp_path / "last.pt", config={"lr": 1e-3}))
    for batch in data[5:]:
        one, other = first.roll(batch).cmp_state.misc, second.roll(batch).cmp_state.misc
        assert torch.equal(one["multiplier"], other["multiplier"])
        assert torch.equal(one["task_loss"], other["task_loss"])


def test_another_configuration_names_every_difference(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE, config={"seed": 0, "model": {"name": "egnn", "hidden": 64}, "old": True})
    with pytest.raises(CheckpointMismatch) as caught:
        checkpoint.load(path, config={"seed": 1, "model": {"name": "egnn", "hidden": 32}, "new": 2})
    message = str(caught.value)
    assert "seed is 1 now and was 0" in message
    assert "model.hidden is 32 now and was 64" in message
    assert "new is 2 now and was 'absent'" in message
    assert "old is 'absent' now and was True" in message
    assert "model.name" not in message
    checkpoint.save(path, STATE)
    with pytest.raises(CheckpointMismatch, match="seed is 1 now"):
        checkpoint.load(path, config={"seed": 1})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    checkpoint.save(path, STATE, config={"seed": 1})
    return path.read_bytes()


@given(st.floats(0, 1, exclude_max=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_at_any_byte(tmp_path, whole, share):
    path = tmp_path / "cut.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointMismatch, match="truncated"):
        checkpoint.load(path)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_altered_byte_is_noticed_or_harmless(tmp_path, whole, data):
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "altered.pt"
    path.write_bytes(content)
    try:
        state = checkpoint.load(path, config={"seed": 1})
    except CheckpointMismatch:
        return
    assert torch.equal(state["weight"], STATE["weight"])
    assert state["nested"]["list"] == STATE["nested"]["list"]


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_any_other_bytes(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointMismatch):
        checkpoint.load(path)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_not_executed(tmp_path):
    mark = tmp_path / "executed"
    for name, write in {
        "plain.pt": lambda path: path.write_bytes(pickle.dumps(Trap(mark))),
        "torch.pt": lambda path: torch.save({"state": Trap(mark), "config": None}, path),
        "model.pt": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    }.items():
        write(tmp_path / name)
        with pytest.raises(CheckpointMismatch):
            checkpoint.load(tmp_path / name)
    assert not mark.exists()


def test_a_file_of_something_else(tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointMismatch, match=r"not written by ace\.checkpoint\.save"):
        checkpoint.load(tmp_path / "weights.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointMismatch, match="not written by"):
        checkpoint.load(tmp_path / "tensor.pt")
    with pytest.raises(CheckpointMismatch, match="does not exist"):
        checkpoint.load(tmp_path / "absent.pt")


def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    """A limit on the size of files stops the write half-way, as a full disk does."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE, config={"seed": 1})
    before = path.read_bytes()
    script = f"""
        import resource, signal, torch
        from ace import checkpoint
        from ace.errors import NotWritten
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        for name in ("last.pt", "new.pt"):
            try:
                checkpoint.save({str(tmp_path)!r} + "/" + name, {{"weight": torch.zeros(100_000)}})
            except NotWritten as problem:
                print(problem)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    for name, problem in (("last.pt", first), ("new.pt", second)):
        assert f"{name}: could not be written (File too large) and is as it was" in problem
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_disk_full_at_the_last_moment(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritten, match=r"No space left on device.*is as it was") as caught:
        checkpoint.save(path, {"step": 4})
    assert isinstance(caught.value, AceError)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_interrupted_writes_leave_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "last.pt", STATE)
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder(tmp_path):
    with pytest.raises(NotWritten, match="No such file or directory"):
        checkpoint.save(tmp_path / "absent" / "last.pt", STATE)
