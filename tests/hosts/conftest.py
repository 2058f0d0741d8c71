"""What the tests of host libraries share: whose warnings count, and which checks the default run leaves out."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Importing a library must not fail because it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (yield)


LONG = {"test_compile", "test_distributed"}
"""Checks that take longer than all others together: left to ``make hosts``, like the classes that are marked so."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Only what ace itself warns of is an error: the last mark is asked first."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::ace"))
            if item.name in LONG:
                item.add_marker(pytest.mark.hosts)
