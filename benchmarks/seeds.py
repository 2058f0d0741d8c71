"""Seeds from seeds."""

from __future__ import annotations

import numpy as np


def derived_seed(*keys: int) -> int:
    """Derive a seed; different keys give unrelated ones."""
    return int(np.random.SeedSequence(keys).generate_state(1)[0])
