"""Where data files are, whether they are intact, and how to get them.

Data are looked up in the folder ``$ACE_DATA`` and then in the cache folder, ``$ACE_CACHE`` or else
``~/.cache/ace``. Only arrays are read; what is published as a pickle is converted by a reader that
admits NumPy arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ace.errors import DataError
from ace.history import replace_file

CHECKSUMS = {
    "run09": "0846b20df07843d5679f88b6d832c349b4cbc9e0d8661d92cd436a83cf36d880",
    "walk35": "385a4ad835b95349041c00834c20565a5d989cfa19149ba09729d081765c3688",
    "modelnet10_points": "12624c3ccca538dc76ddc41e8dedacd3fac8bbb797591505c0ba5b9b7c0811c3",
    "qm9_full": "30eecabccecc13efde57bf327e6da54e5906bef050ed6a7394cca5c14e2d187a",
    "qm9_30k": "ad5c2565b846bb08a86d8cea2246b340618e421c579a2f789d8be49466d888eb",
    "rmd17_ethanol_botnet": "7a40602252ae8ec10b2f4c764259d6533621740291930a0733ae782ab86d8038",
    "acac": "0daef60d2ae827ddad3441518e0af6922280063a8f481757ab020a02273b775a",
    "3bpa_train": "426ce5509e45cc6dea87c711eeaed6f188f179ffda51c6c9f1185ba78242d14c",
    "mnist10k_rot": "602e176df05c2e59168cc52336808c2e535a3b7d42d7eb098d36453ea20bc075",
    "smoke_rotation_phiflow": "a6d006a9ecad35fb82dc2c053792cb6429a3c723ac2eebbff9d6e4cbb976a807",
}
"""`checksum` of the arrays that are read of each published file, by its stem."""


def cache_folder() -> Path:
    """Folder for what is generated or downloaded: ``$ACE_CACHE``, or else ``~/.cache/ace``."""
    return Path(os.environ.get("ACE_CACHE") or Path.home() / ".cache" / "ace")


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes of arrays, whatever file they came from.

    Args:
        arrays: Name -> array of numbers.

    Returns:
        64 hexadecimal digits; the order of the names does not matter.

    Example:
        >>> a, b = np.arange(2), np.ones(3)
        >>> checksum({"a": a, "b": b}) == checksum({"b": b, "a": a})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz`` file and its `checksum` (in ``<name>.sha256`` beside it), both atomically.

    Args:
        path: The file; folders are made as needed.
        arrays: Name -> array of numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    # The checksum first: a file whose checksum is missing is refused, a lone checksum is not.
    replace_file(checksum_file(path), checksum(arrays).encode())
    replace_file(path, content.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file written by `save_arrays` and verify it.

    Args:
        path: The file.

    Returns:
        Name -> array.

    Raises:
        DataError: The file or its checksum is missing, or they do not fit each other.
    """
    try:
        expected = checksum_file(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        expected = ""
    arrays = _read(path)
    if checksum(arrays) != expected:
        raise DataError(
            f"{path} does not have the checksum in {checksum_file(path).name}: it was truncated or altered. "
            f"Delete both files; the next run makes them again, or `ace data` where they were downloaded."
        )
    return arrays


def checksum_file(path: Path) -> Path:
    """Where `save_arrays` puts the checksum of a file."""
    return path.with_name(path.name + ".sha256")


def find_file(relative: str) -> Path | None:
    """Path of a data file, such as ``mocap/run09.npz``, in ``$ACE_DATA`` or else in the cache folder, or ``None``."""
    return next((path for path in _paths(relative) if path.is_file()), None)


def explain_file(relative: str, how: str) -> str:
    """What to do when `find_file` finds nothing: where it looked, and how to get the file."""
    looked = " and ".join(str(path) for path in _paths(relative))
    hint = "" if os.environ.get("ACE_DATA") else " (ACE_DATA is not set)"
    return f"{Path(relative).name} was looked for at {looked}{hint} and is not there. {how}"


def load_file(relative: str, names: Iterable[str], how: str) -> dict[str, np.ndarray]:
    """Read the arrays that are needed of a data file and verify them against `CHECKSUMS`.

    Args:
        relative: The file, as in `find_file`; its checksum is that of its stem.
        names: The arrays.
        how: How to get the file, for the message.

    Returns:
        Name -> array.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    path = find_file(relative)
    if path is None:
        raise DataError(explain_file(relative, how))
    stored = _read(path)
    missing = [name for name in names if name not in stored]
    if missing:
        raise DataError(f"{path} has no array {', '.join(missing)}: it is not the file expected. Replace it.")
    arrays = {name: stored[name] for name in names}
    verify(Path(relative).stem, arrays, str(path), f"Delete it, or replace it by an unaltered copy. {how}")
    return arrays


def verify(stem: str, arrays: dict[str, np.ndarray], source: str, remedy: str) -> None:
    """Compare arrays with the published ones.

    Args:
        stem: Name in `CHECKSUMS`.
        arrays: Name -> array.
        source: Where they came from, for the message.
        remedy: What to do, for the message.

    Raises:
        DataError: They are not the published numbers.
    """
    if checksum(arrays) != CHECKSUMS[stem]:
        raise DataError(
            f"{source} does not hold the published numbers of {stem}: checksum {checksum(arrays)}, "
            f"expected {CHECKSUMS[stem]}. {remedy}"
        )


def retrieve(url: str, folder: str, relative: str, command: str) -> Path:
    """Download a file that a data file is made of.

    Args:
        url: Its address.
        folder: Where to.
        relative: The data file, as in `find_file`, for the message.
        command: Name of the data for ``ace data``, for the message.

    Returns:
        The path.

    Raises:
        DataError: No connection, or no such file there.
    """
    import pooch  # needed for downloads only

    pooch.get_logger().setLevel("WARNING")
    try:
        bar = sys.stderr.isatty()
        return Path(pooch.retrieve(url, known_hash=None, path=folder, fname=Path(url).name, progressbar=bar))
    except OSError as error:  # also every error of requests
        raise DataError(f"{url} could not be downloaded ({error}). {retry(relative, command)}") from error


def retry(relative: str, command: str) -> str:
    """What to do when a data file could not be made: for the messages of its download, as in `retrieve`."""
    path = cache_folder() / relative
    return (
        f"Try again. Without a connection, or if the source has changed, put {path.name} and {path.name}.sha256, made "
        f"on another machine by `ace data {command}`, into {path.parent} or into the folder {Path(relative).parent} of "
        "ACE_DATA."
    )


def read_pickled_arrays(content: bytes, source: str) -> Any:
    """Read a pickle of plain containers, numbers and NumPy arrays, without running anything else.

    Args:
        content: The pickle.
        source: Where it came from, for the message.

    Returns:
        The object.

    Raises:
        DataError: Truncated, not a pickle, or one that asks for any other class or function.

    Example:
        >>> read_pickled_arrays(pickle.dumps({"a": np.arange(2)}), "here")
        {'a': array([0, 1])}
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content)).load()
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except Exception as error:  # pickles fail in every way there is
        raise DataError(f"{source} is damaged or not a pickle ({error!r}). Download it again.") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the three names that pickled arrays use, by their NumPy 1 and NumPy 2 paths."""

    _reconstruct = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return self._reconstruct
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise DataError(f"the pickle asks for {module}.{name}, which is not array data. It was not opened.")


def _paths(relative: str) -> list[Path]:
    folders = [Path(os.environ["ACE_DATA"])] if os.environ.get("ACE_DATA") else []
    return [folder / relative for folder in (*folders, cache_folder())]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error!r}): it was truncated or altered. Replace it.") from error
