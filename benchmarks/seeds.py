"""Seeds from seeds."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Use(IntEnum):
    """What a derived seed is for: no two uses of a run's or a task's seed may come to the same numbers."""

    ORDER = 0
    """Order of the training samples in an epoch."""
    BATCH_ELEMENT = 1
    """Group element that moves the whole batch of a step, for the option ``augment``."""
    SAMPLE_ELEMENTS = 2
    """Group elements that move the samples of a step, for the method ``augmentation``."""
    TASK = 3
    """What the task itself does to the batch of a step, such as jitter."""
    TEACHER = 4
    """Network that makes the data of ``broken``; with the seed of the one in training, that one would start at it."""


def derived_seed(seed: int, use: Use, number: int = 0) -> int:
    """Derive a seed; another seed, use or number (of the epoch, of the step) gives an unrelated one.

    Example:
        >>> derived_seed(0, Use.ORDER, 1) == derived_seed(0, Use.ORDER, 1)
        True
        >>> derived_seed(0, Use.ORDER, 1) == derived_seed(0, Use.TASK, 1)
        False
    """
    return int(np.random.SeedSequence([seed, use, number]).generate_state(1)[0])
