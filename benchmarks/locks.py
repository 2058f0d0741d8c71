"""A lock on a folder, so that two processes never work on one run, nor two on one suite.

The system keeps it (``flock``): it ends with the process that holds it, however that ends. On a network file system
it holds among machines only where that passes such locks on.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from ace.errors import AceError

NAME = ".lock"


class Locked(AceError):
    """Another process is working in the folder."""


@contextmanager
def locked(folder: Path, patience: float = 0.5) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it when the process ends, however it ends.

    Args:
        folder: Folder of a run or of a suite, which exists.
        patience: Seconds to wait for a process that holds it.

    Yields:
        Nothing.

    Raises:
        Locked: Another process holds it.
        AceError: The file system has no locks.

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
        if not _try(file.fileno(), folder, patience):
            who = holder(folder) or "it has not said which"
            raise Locked(f"{folder}: another process is working here ({who}); wait for it, or stop it")
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC")
        file.flush()
        yield


def holder(folder: Path) -> str:
    """Who holds the lock of a folder, or held it last: process, machine and time; empty where nobody ever did.

    Example:
        >>> holder(Path("no/such/folder"))
        ''
    """
    try:
        return (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not there, or not for us
        return ""


def is_locked(folder: Path) -> bool:
    """Whether a process is working on a run or suite.

    Args:
        folder: Its folder; one that was never locked is not.

    Example:
        >>> is_locked(Path("no/such/folder"))
        False
    """
    if not (folder / NAME).exists():
        return False
    with (folder / NAME).open("a") as file:
        return not _try(file.fileno(), folder, patience=0.0)


def _try(file: int, folder: Path, patience: float) -> bool:
    """Take a lock within some seconds: `is_locked` holds it for an instant as well."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError as error:
            raise AceError(
                f"{folder}: its file system does not lock files ({error.strerror}); have it mounted with locks "
                "(docs/scale.md), or give another folder"
            ) from error
        else:
            return True
