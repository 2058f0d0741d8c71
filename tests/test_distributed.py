"""Two gloo processes under DistributedDataParallel do what one process does on the whole batch."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel
from toys import batches, regression, relaxed_network

import ace

STEPS = 60
SCENARIOS = {
    "exact": (ace.Exact(), {}),
    "exact-relative": (ace.Exact(measure="relative"), {}),
    "bounded-norm": (ace.Bounded(0.05, measure="norm"), {}),
    "bounded-spectral": (ace.Bounded(0.05, measure="spectral"), {}),
    "resilient": (ace.Resilient(0.5), {"steps": 500}),
    "augmented": (ace.Exact(), {"form": "augmented"}),
    "paper": (ace.Resilient(0.5), {"preset": "paper", "dual_lr": 0.05}),
    "clipped": (ace.Exact(), {"clip": 0.05, "accumulate": 2}),
}


def loss(model, batch):
    x, y, bad = batch
    return regression(model, (x, y)) * (math.nan if bad else 1.0)


def train(name, rank=0, world=1):
    """Train on this process's share of each batch; batch 7 is bad on the last process."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    constraint, options = SCENARIOS[name]
    relaxed = relaxed_network()
    model = DistributedDataParallel(relaxed) if world > 1 else relaxed
    problem = ace.Problem(model, loss, constraint)
    primal = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ace.PrimalDual(problem, primal, **{"steps": STEPS // options.get("accumulate", 1), **options})
    reports = []
    for count, (x, y) in enumerate(batches(STEPS, size=16)):
        share = slice(rank * 16 // world, (rank + 1) * 16 // world)
        rollout = optimizer.roll((x[share], y[share], count == 7 and rank == world - 1))
        reports.append(rollout.cmp_state.misc)
    weights = {key: value.clone() for key, value in ace.base_state_dict(relaxed).items()}
    paths = {key: torch.stack([report[key] for report in reports]) for key in ("gamma", "multiplier", "violation")}
    return {**paths, **weights, "skipped": [report["skipped"] for report in reports], "count": optimizer.skipped}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save({name: train(name, rank, 2) for name in SCENARIOS}, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_are_one(name, ranks, float64):
    alone = train(name)
    zero, one = ranks[0][name], ranks[1][name]
    assert zero["skipped"] == one["skipped"] == alone["skipped"]
    assert zero["count"] == one["count"] == 1
    assert alone["skipped"][7]
    for key in alone.keys() - {"skipped", "count", "violation"}:
        torch.testing.assert_close(zero[key], one[key], rtol=0, atol=0)
        torch.testing.assert_close(zero[key], alone[key], rtol=0, atol=1e-10)
    good = [not skipped for skipped in alone["skipped"]]
    torch.testing.assert_close(zero["violation"][good], alone["violation"][good], rtol=0, atol=1e-10)
    assert alone["multiplier"].abs().max() > 1e-3
    assert alone["gamma"].std() > 0.05
    if name.startswith("exact"):
        assert torch.equal(zero["gamma"][-1], torch.zeros(3))
