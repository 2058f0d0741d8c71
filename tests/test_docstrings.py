"""The examples in the docstrings of the library run and say the truth."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch

import ace

MODULES = sorted({"ace", *(module.name for module in pkgutil.walk_packages(ace.__path__, "ace."))} - {"ace.cli"})


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for examples that forget their own)
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_public_names_are_documented():
    public = [value for name, value in vars(ace).items() if not name.startswith("_") and not inspect.ismodule(value)]
    assert len(public) > 10
    assert [value.__name__ for value in public if not (inspect.getdoc(value) or "").strip()] == []
