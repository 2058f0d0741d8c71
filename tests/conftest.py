"""Shared by all tests: one thread, a fixed seed, reproducible properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from ace.probing import default_dtype

torch.set_num_threads(1)
settings.register_profile("ace", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("ace")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Build every tensor of the test in float64."""
    with default_dtype(torch.float64):
        yield
