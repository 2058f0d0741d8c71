"""TensorBoard has what the history has."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import batches, regression, relaxed_network

import ace

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "trackers.py"


def train(history):
    relaxed = relaxed_network()
    problem = ace.Problem(relaxed, regression)
    optimizer = ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), 0.05), steps=30)
    for batch in batches(30):
        history.append(optimizer.roll(batch))
    history.log(30, valid_restored=0.125)
    return history.frame()


def test_tensorboard_has_the_history(tmp_path):
    frame = runpy.run_path(str(EXAMPLE))["with_tensorboard"](train, tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    found = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    expected = {
        (f"{row.quantity}/{row.layer}" if row.layer else row.quantity, row.step): row.value
        for row in frame.itertuples()
    }
    assert len(expected) == len(frame) == 30 * 10 + 1
    assert found == pytest.approx(expected, rel=1e-6)  # events are float32
