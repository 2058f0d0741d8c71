"""Several gloo processes, wrapped or sharded, do what one process does on the whole batch."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from ranks import spawn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import batches, network, regression, relaxed_network

import ace
from ace import checkpoint
from ace.distributed import gather, place, total
from ace.errors import AceError
from ace.probing import default_dtype

STEPS = 12
SIZE = 16
CUTS = {1: (0, SIZE), 2: (0, 5, SIZE), 4: (0, 5, 8, 12, SIZE)}
"""First samples of the processes' shares, by the number of processes: no two shares are alike."""
MEASURES = ("strength", "norm", "relative", "spectral")
TYPES = {"inputs": {"pos": "vector"}, "outputs": {"forces": "vector", "energy": "invariant"}}


def tolerance(*groups, **options):
    eps = None if "rho" in options else 0.1
    return ace.EquivarianceError({str(group): group for group in groups}, eps, **TYPES, **options)


SCENARIOS = {
    **{f"exact-{measure}": (ace.Exact(measure=measure), {}) for measure in MEASURES},
    **{f"bounded-{measure}": (ace.Bounded(0.05, measure=measure), {}) for measure in MEASURES},
    **{f"resilient-{measure}": (ace.Resilient(0.5, measure=measure), {"steps": 500}) for measure in MEASURES},
    "augmented": (ace.Exact(), {"form": "augmented", "steps": 100}),
    "augmented-relative": (ace.Bounded(0.05, measure="relative"), {"form": "augmented"}),
    "augmented-spectral": (ace.Exact(measure="spectral"), {"form": "augmented"}),
    "paper": (ace.Resilient(0.5), {"preset": "paper", "dual_lr": 0.05}),
    "paper-norm": (ace.Exact(measure="norm"), {"preset": "paper", "dual_lr": 0.05}),
    "clipped": (ace.Exact(), {"clip": 0.05, "accumulate": 2}),
    "accumulated-relative": (ace.Exact(measure="relative"), {"accumulate": 2}),
    "tolerance": (tolerance(ace.O3()), {}),
    "tolerance-several": (tolerance(ace.SO3(), ace.Tilts(), ace.Permutations()), {"clip": 0.5}),
    "tolerance-quantile": (tolerance(ace.O3(), quantile=0.8), {}),
    "saliency": (ace.Exact(), {"steps": 100, "saliency": 0.02}),
    "price": (tolerance(ace.SO3(), ace.Tilts(), rho=3.0), {"accumulate": 2}),
}


class Forces(nn.Module):
    """Forces on the nodes of graphs of four, and the energies of the graphs; breaks rotations and permutations."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.offset = nn.Parameter(torch.tensor([0.0, 0.1, 0.3]))

    def forward(self, pos, batch):
        weight = 1 + 0.2 * (torch.arange(len(pos)) % 4)
        forces = self.second(self.first(pos)) * weight[:, None] + self.offset
        energy = forces.new_zeros(int(batch[-1]) + 1).index_add(0, batch, forces.square().sum(1))
        return {"forces": forces, "energy": energy}


def loss(model, batch):
    x, y, weight = batch
    return weight * regression(model, (x, y))


def loss_of_graphs(model, batch):
    pos, target, weight = batch
    found = model(pos=pos.flatten(0, 1), batch=torch.arange(len(pos)).repeat_interleave(4))
    return weight * ((found["forces"] - target.flatten(0, 1)).square().mean() + found["energy"].mean())


def data(constraint):
    if not isinstance(constraint, ace.EquivarianceError):
        return batches(STEPS, size=SIZE)
    pos = torch.randn(STEPS, SIZE, 4, 3, generator=torch.Generator().manual_seed(1))
    pos = pos * torch.linspace(0.2, 2, SIZE)[:, None, None]  # no two graphs alike
    return [(x, x + 0.3) for x in pos]


def posed(name, wrapping):
    """The model before and after it is wrapped, its optimizer, and the pieces that a process trains on."""
    torch.manual_seed(0)
    constraint, options = SCENARIOS[name]
    if isinstance(constraint, ace.EquivarianceError):
        example = {"pos": torch.randn(8, 3), "batch": torch.arange(2).repeat_interleave(4)}
        relaxed = ace.relax(Forces(), layers=nn.Linear, example=example, inputs={"pos": "vector"})
    else:
        relaxed = relaxed_network()
    model = wrapping(relaxed)
    evaluate = loss_of_graphs if isinstance(constraint, ace.EquivarianceError) else loss
    problem = ace.Problem(model, evaluate, constraint)
    primal = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    options = {"steps": STEPS // options.get("accumulate", 1), **options}
    optimizer = ace.PrimalDual(problem, primal, **options)
    optimizer._saliency.interval = 2  # or these few steps would see no measurement
    return relaxed, problem, optimizer


def alone(relaxed):
    return relaxed


def sharded(relaxed):
    """Layers in groups of their own, and the rest in one; γ is left out."""
    options = {
        "mesh": init_device_mesh("cpu", (torch.distributed.get_world_size(),)),
        "ignored_params": {relaxation.gamma for relaxation in ace.relaxations(relaxed).values()},
    }
    for layer in list(relaxed.children())[:2]:
        fully_shard(layer, **options)
    return fully_shard(relaxed, **options)


def full(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def train(name, wrapping=alone, rank=0, world=1, folder=None):
    """Train on this process's part of each batch; batch 7 is bad on the last process. Resume in the middle."""
    relaxed, problem, optimizer = posed(name, wrapping)
    first, last = CUTS[world][rank : rank + 2]
    weight = world * (last - first) / SIZE
    reports = []
    for count, (x, y) in enumerate(data(problem.constraint)):
        if folder is not None and count == STEPS // 2:
            checkpoint.save(folder / f"{name}-{rank}.pt", optimizer.state_dict())
            relaxed, problem, optimizer = posed(name, wrapping)
            optimizer.load_state_dict(checkpoint.load(folder / f"{name}-{rank}.pt"))
        bad = math.nan if count == 7 and rank == world - 1 else 1.0
        rollout = optimizer.roll((x[first:last], y[first:last], weight * bad))
        reports.append({**rollout.cmp_state.misc, "loss": rollout.loss})
    paths = {
        key: torch.stack([report[key] for report in reports]) for key in ("gamma", "multiplier", "violation", "loss")
    }
    skipped = torch.tensor([report["skipped"] for report in reports])
    shape = {key: len(value) for key, value in optimizer.state_dict()["model"].items()}
    with torch.no_grad():
        for gamma in problem.gammas:
            gamma.zero_()
    salient = optimizer._saliency.mean.nan_to_num()
    return {**paths, "skipped": skipped, "shape": shape, "salient": salient, **full(ace.restore(relaxed))}


def refuse_what_is_wrapped(world):
    """What is wrapped or sharded cannot be relaxed any more, and no γ can be sharded."""
    mesh = init_device_mesh("cpu", (world,))
    for wrapped in (DistributedDataParallel(network()), fully_shard(network(), mesh=mesh)):
        with pytest.raises(AceError, match=r"call ace\.relax first"):
            ace.relax(wrapped, layers=nn.Linear)
    with pytest.raises(AceError, match="ignored_params="):
        ace.Problem(fully_shard(relaxed_network(), mesh=mesh), loss)


def process(rank, world, folder):
    refuse_what_is_wrapped(world)
    found = {name: train(name, DistributedDataParallel, rank, world, folder) for name in SCENARIOS}
    if world == 2:
        found["sharded"] = {name: train(name, sharded, rank, world, folder) for name in SCENARIOS}
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What so many processes find, each in turn."""
    folder = tmp_path_factory.mktemp("ranks")
    return functools.cache(lambda world: spawn(process, world, folder, world, folder))


@pytest.fixture(scope="module")
def one():
    """What one process finds, by scenario."""
    with default_dtype(torch.float64):
        return {name: train(name) for name in SCENARIOS}


def assert_one(found, expected):
    """What the processes have is bitwise the same, and to rounding what one process has that sees the whole batch."""
    for key in expected.keys() - {"shape"}:
        for other in found[1:]:
            torch.testing.assert_close(other[key], found[0][key], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(found[0][key], expected[key], rtol=1e-9, atol=1e-9, equal_nan=True)
    assert expected["skipped"].nonzero().tolist() == [[7]]
    assert expected["multiplier"].abs().max() > 1e-4
    assert expected["gamma"].std() > 1e-3


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCENARIOS)
def test_wrapped_processes_are_one(name, world, ranks, one):
    found = [found[name] for found in ranks(world)]
    assert_one(found, one[name])
    assert found[0]["shape"] == one[name]["shape"]  # a checkpoint does not depend on the number of processes


@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_processes_are_one(name, ranks, one):
    assert_one([found["sharded"][name] for found in ranks(2)], one[name])


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_one_process_is_told_what_it_knows(shape):
    value = torch.randn(shape, requires_grad=True)
    assert total(value) is value
    assert place(3, torch.device("cpu")) == (0, 3)
    columns = torch.randn(2, 3)
    assert gather(columns) is columns
