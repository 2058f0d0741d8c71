"""A lock on the folder of a run, so that two processes never work on one run."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ace.errors import AceError

NAME = ".lock"


class Locked(AceError):
    """Another process is working on the run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run; the system releases it when the process ends, however it ends.

    Args:
        folder: Folder of the run, which exists.

    Yields:
        Nothing.

    Raises:
        Locked: Another process holds it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with locked(folder):
        ...     is_locked(folder)
        True
        >>> is_locked(folder)
        False
    """
    with (folder / NAME).open("a") as file:
        if not _try(file.fileno(), patience=0.5):
            raise Locked(f"{folder}: another process is working on this run; wait for it, or stop it")
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process is working on a run.

    Args:
        folder: Folder of the run; one that was never locked is not.

    Example:
        >>> is_locked(Path("no/such/folder"))
        False
    """
    if not (folder / NAME).exists():
        return False
    with (folder / NAME).open("a") as file:
        return not _try(file.fileno(), patience=0.0)


def _try(file: int, patience: float) -> bool:
    """Take a lock within some seconds: `is_locked` holds it for an instant as well."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        else:
            return True
