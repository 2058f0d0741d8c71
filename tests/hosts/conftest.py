"""Other people's libraries may warn about their own affairs; ace may not."""

from __future__ import annotations

import warnings

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Importing a library must not fail because it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (yield)


def pytest_collection_modifyitems(items):
    """Only what ace itself warns of is an error: the last mark is asked first."""
    for item in items:
        if "/hosts/" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings("error:::ace"))
