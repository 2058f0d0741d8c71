"""Data files: checksums, atomic writes, and the reader of pickles."""

from __future__ import annotations

import errno
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ace.errors import DataError, NotWritten
from benchmarks import data
from benchmarks.data import checksum


@pytest.mark.parametrize(
    "harmful",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
    ],
)
def test_reader_admits_no_other_name(harmful):
    with pytest.raises(DataError, match="asks for"):
        data.read_pickled_arrays(harmful, "file.pkl")


def test_reader_knows_numpy_1_and_2():
    """The module of array reconstruction was renamed in NumPy 2."""
    content = pickle.dumps(np.arange(6.0).reshape(2, 3), 3)
    new, old = b"numpy._core.multiarray", b"numpy.core.multiarray"
    for text in (content.replace(new, old), content.replace(new, old).replace(old, new)):
        np.testing.assert_array_equal(data.read_pickled_arrays(text, "x"), np.arange(6.0).reshape(2, 3))


def test_saved_arrays_come_back(tmp_path):
    arrays = {"a": np.arange(4, dtype=np.int16), "b": np.ones((2, 0))}
    data.save_arrays(tmp_path / "new" / "x.npz", arrays)
    for name, array in data.load_arrays(tmp_path / "new" / "x.npz").items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["x.npz", "x.npz.sha256"]


def test_every_truncation_and_altered_number_is_noticed(tmp_path):
    path = tmp_path / "x.npz"
    data.save_arrays(path, {"a": np.arange(5.0)})
    intact = path.read_bytes()
    for length in range(0, len(intact), 7):
        path.write_bytes(intact[:length])
        with pytest.raises(DataError, match=r"x\.npz"):
            data.load_arrays(path)
    content = io.BytesIO()
    np.savez(content, a=np.arange(5.0) + 1e-12)  # a valid file with other numbers
    path.write_bytes(content.getvalue())
    with pytest.raises(DataError, match=r"truncated or altered.*Delete both files"):
        data.load_arrays(path)
    path.write_bytes(intact)
    (tmp_path / "x.npz.sha256").unlink()
    with pytest.raises(DataError, match=r"x\.npz\.sha256"):
        data.load_arrays(path)


def test_arrays_of_objects_are_not_read(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        data.load_arrays(tmp_path / "x.npz")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    data.save_arrays(path, {"a": np.zeros(3)})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(NotWritten, match="No space left"):
        data.save_arrays(path, {"a": np.ones(3)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "other",
    [{"a": np.arange(4)}, {"b": np.arange(3)}, {"a": np.arange(3.0)}, {"a": np.arange(3)[:, None]}, {}],
)
def test_checksum_sees_values_names_types_and_shapes(other):
    assert checksum({"a": np.arange(3)}) != checksum(other)
