"""Checkpoints: atomic, read without pickle, refused for another configuration."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ace.errors import CheckpointMismatch
from ace.history import replace_file


def save(path: str | os.PathLike[str], state: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint; the file at ``path`` is the old one or the new one, never half of one.

    Args:
        path: Where to.
        state: Tensors, numbers, strings, lists and dicts, such as ``PrimalDual.state_dict()``.
        config: What the training was configured with; ``load`` compares it.

    Raises:
        NotWritten: The file cannot be written (full disk, no permission); an older checkpoint there is unharmed.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/last.pt", {"step": 3, "weight": torch.ones(2)}, config={"seed": 0})
        ...     load(f"{folder}/last.pt", config={"seed": 0})["step"]
        3
    """
    content = io.BytesIO()
    torch.save({"state": dict(state), "config": None if config is None else dict(config)}, content)
    replace_file(Path(path), content.getvalue())


def load(path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``.

    Args:
        path: A file that ``save`` wrote.
        config: The present configuration; a checkpoint of another one is refused.

    Returns:
        The state.

    Raises:
        CheckpointMismatch: The file is missing or damaged, is no checkpoint, or was written under another
            configuration (all differing fields are named).
    """
    if not Path(path).exists():
        raise CheckpointMismatch(f"{path} does not exist: there is no checkpoint to load")
    try:
        _verify_checksums(Path(path))
        content = torch.load(Path(path), weights_only=True, map_location="cpu")
    except Exception as problem:  # whatever damaged bytes lead the readers to
        raise CheckpointMismatch(
            f"{path} cannot be read as a checkpoint ({type(problem).__name__}): it is truncated, altered, or something "
            "else; delete it to start over"
        ) from problem
    if not isinstance(content, dict) or set(content) != {"state", "config"}:
        raise CheckpointMismatch(f"{path} was not written by ace.checkpoint.save")
    if config is not None:
        differing = _differences(dict(config), content["config"] or {})
        if differing:
            raise CheckpointMismatch(f"{path} belongs to another configuration: {'; '.join(differing)}")
    state: dict[str, Any] = content["state"]
    return state


def _verify_checksums(path: Path) -> None:
    """Raise ``BadZipFile`` unless every part of the archive has its checksum: torch compares none."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _differences(now: Mapping[str, Any], saved: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the fields in which two nested configurations differ."""
    found = []
    for key in sorted({*now, *saved}):
        mine, other = now.get(key, "absent"), saved.get(key, "absent")
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += _differences(mine, other, f"{prefix}{key}.")
        elif mine != other:
            found.append(f"{prefix}{key} is {mine!r} now and was {other!r}")
    return found
