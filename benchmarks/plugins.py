"""Tasks, models and methods of your own: files in folders that the environment variable ``ACE_PLUGINS`` names.

A folder holds what ``benchmarks`` and ``configs`` hold: ``tasks/NAME.py`` with a dictionary ``TASKS``,
``models/NAME.py`` with ``MODELS``, ``methods/NAME.py`` with ``METHODS``, and YAML files in ``configs/tasks``,
``configs/methods`` and ``configs/suites``. Several folders are separated as in ``PATH``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn


def folders() -> list[Path]:
    """Return the folders, in order.

    Raises:
        ConfigError: One is not there.
    """
    found = [Path(word) for word in os.environ.get("ACE_PLUGINS", "").split(os.pathsep) if word]
    if absent := [str(folder) for folder in found if not folder.is_dir()]:
        _refuse(f"ACE_PLUGINS: no such folder: {', '.join(absent)}")
    return found


def load(kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Import the files of one kind, and gather their entries.

    Args:
        kind: ``tasks``, ``models`` or ``methods``; the dictionary has the same name in capitals.
        known: The entries that there are already.

    Returns:
        The entries of all files, by name.

    Raises:
        ConfigError: A file has no such dictionary, or an entry's name is taken.
    """
    found: dict[str, Any] = {}
    for path in (path for folder in folders() for path in sorted((folder / kind).glob("*.py"))):
        spec = spec_from_file_location(f"ace_plugins.{kind}.{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = module_from_spec(spec)
        spec.loader.exec_module(module)
        entries = getattr(module, kind.upper(), None)
        if not isinstance(entries, dict):
            _refuse(f"{path}: has no dictionary {kind.upper()} of what it adds")
        if taken := sorted(entries.keys() & (known.keys() | found.keys())):
            _refuse(f"{path}: there are {kind} called {', '.join(taken)} already")
        found |= entries
    return found


def _refuse(message: str) -> NoReturn:
    from ace.errors import ConfigError  # here, since the models load without ace

    raise ConfigError(message)
