"""The running motions: look-up, verification, and the download against a server on this machine."""

from __future__ import annotations

import os
import pickle
import socket
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from server import serving

from ace.errors import DataError
from benchmarks import data, motion
from benchmarks.motion import MOTION_ARRAYS, MOTION_FILES

pytest.importorskip("pooch", reason="downloads need the extra 'bench'")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder and no ACE_DATA."""
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made_up_motion() -> dict[str, np.ndarray]:
    """Arrays laid out like run09.npz: four trials of three joints."""
    generator = np.random.default_rng(0)
    return {
        "xyz": generator.standard_normal((30, 3, 3)).astype(np.float32),
        "trial_offset": np.array([0, 7, 15, 22, 30]),
        "edges": np.array([[1, 0], [2, 1]]),
        "train_trial": np.array([2, 0]),
        "train_start": np.array([[1, 0, 3], [2, 1, 0]]),
        "val_trial": np.array([3]),
        "val_start": np.array([[1, 2, 0]]),
        "test_trial": np.array([1]),
        "test_start": np.array([[0, 2, 1]]),
    }


def published(arrays: dict[str, np.ndarray], protocol: int) -> tuple[bytes, bytes]:
    """The two pickles that would hold these arrays."""
    offset = arrays["trial_offset"]
    trials = [arrays["xyz"][a:b].astype(np.float64) for a, b in pairwise(offset)]
    bones = [tuple(bone) for bone in arrays["edges"].tolist()]
    split = tuple(
        dict(zip(arrays[f"{part}_trial"].tolist(), arrays[f"{part}_start"], strict=True))
        for part in ("train", "val", "test")
    )
    return pickle.dumps((bones, trials), protocol), pickle.dumps(split, protocol)


@pytest.fixture
def serve(tmp_path):
    """Serve the two motion files with given contents; returns the address."""
    root = tmp_path / "server"
    with serving(root) as address:

        def publish(*contents: bytes) -> str:
            for name, content in zip(MOTION_FILES, contents, strict=False):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            return address

        yield publish


def expect(monkeypatch, arrays):
    monkeypatch.setitem(data.CHECKSUMS, "run09", data.checksum(arrays))


@pytest.mark.parametrize("protocol", [3, 4])
def test_download_converts_and_verifies(cache, serve, monkeypatch, protocol):
    arrays = made_up_motion()
    expect(monkeypatch, arrays)
    path = motion.download_run(serve(*published(arrays, protocol)))
    assert path == cache / "mocap" / "run09.npz"
    loaded = motion.load_motion("run09")
    assert set(loaded) == set(MOTION_ARRAYS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set: no run09.npz to publish")
def test_download_of_the_real_numbers(tmp_path, serve, monkeypatch):
    real = motion.load_motion("run09")
    monkeypatch.delenv("ACE_DATA")
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    motion.download_run(serve(*published(real, 4)))
    loaded = motion.load_motion("run09")
    for name in MOTION_ARRAYS:
        np.testing.assert_array_equal(loaded[name], real[name], strict=True)


def test_other_numbers_are_refused(cache, serve, monkeypatch):
    arrays = made_up_motion()
    expect(monkeypatch, arrays)
    arrays["xyz"][3, 1, 1] += 1e-3
    with pytest.raises(DataError, match=r"does not hold the published numbers of run09.* Try again") as caught:
        motion.download_run(serve(*published(arrays, 4)))
    assert f"into {cache / 'mocap'} or into the folder mocap of ACE_DATA" in str(caught.value)
    assert not list(cache.rglob("*"))


def test_another_layout_is_refused(cache, serve):
    _, split = published(made_up_motion(), 4)
    with pytest.raises(DataError, match="not laid out as published"):
        motion.download_run(serve(pickle.dumps([1, 2, 3]), split))
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_download_is_refused(cache, serve, share):
    motions, split = published(made_up_motion(), 4)
    with pytest.raises(DataError, match=r"motion_run\.pkl is damaged or not a pickle"):
        motion.download_run(serve(motions[: int(share * len(motions))], split))
    assert not list(cache.rglob("*"))


class _Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: ([], [np.array([evil], dtype=object)])])
def test_pickle_that_runs_code_is_refused_unopened(cache, serve, tmp_path, wrap):
    _, split = published(made_up_motion(), 4)
    with pytest.raises(DataError, match=r"motion_run\.pkl: the pickle asks for .*is not array data"):
        motion.download_run(serve(pickle.dumps(wrap(_Touch(tmp_path / "touched"))), split))
    assert not (tmp_path / "touched").exists()
    assert not list(cache.rglob("*"))


def test_offline_message_says_what_to_do(cache):
    with socket.socket() as closed:  # bound but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        origin = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(DataError) as caught:
            motion.download_run(origin)
    for part in (f"{origin}/{MOTION_FILES[0]}", "put run09.npz and run09.npz.sha256", str(cache / "mocap"), "ACE_DATA"):
        assert part in str(caught.value)


def test_file_not_on_the_server(cache, serve):
    origin = serve(published(made_up_motion(), 4)[0])  # the second file is missing
    with pytest.raises(DataError, match=r"split_run\.pkl could not be downloaded.*404"):
        motion.download_run(origin)
    assert not list(cache.rglob("*"))


def test_missing_data_say_where_they_were_looked_for(cache, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"ACE_DATA is not set.*ace data mocap") as caught:
        motion.load_motion("run09")
    assert str(cache / "mocap" / "run09.npz") in str(caught.value)
    monkeypatch.setenv("ACE_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="ace data mocap") as caught:
        motion.load_motion("walk35")
    assert str(tmp_path / "elsewhere" / "mocap" / "walk35.npz") in str(caught.value)


def test_ace_data_comes_before_the_cache(cache, tmp_path, monkeypatch):
    arrays = made_up_motion()
    data.save_arrays(cache / "mocap" / "run09.npz", arrays)
    assert data.find_file(motion.motion_file("run09")) == cache / "mocap" / "run09.npz"
    monkeypatch.setenv("ACE_DATA", str(tmp_path))
    assert data.find_file(motion.motion_file("run09")) == cache / "mocap" / "run09.npz"
    data.save_arrays(tmp_path / "mocap" / "run09.npz", arrays)
    assert data.find_file(motion.motion_file("run09")) == tmp_path / "mocap" / "run09.npz"


def test_damaged_motion_files_are_refused(cache, monkeypatch):
    arrays, path = made_up_motion(), cache / "mocap" / "run09.npz"
    expect(monkeypatch, arrays)
    data.save_arrays(path, arrays)
    intact = path.read_bytes()
    path.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        motion.load_motion("run09")
    data.save_arrays(path, {**arrays, "edges": arrays["edges"] + 1})
    with pytest.raises(DataError, match=r"does not hold the published numbers.* Delete it.*ace data mocap"):
        motion.load_motion("run09")
    del arrays["edges"]
    data.save_arrays(path, arrays)
    with pytest.raises(DataError, match="has no array edges"):
        motion.load_motion("run09")
