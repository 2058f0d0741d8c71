"""``python -m benchmarks.speed machinery``: what a step costs beside forward pass, backward pass and weights.

The loss reads every γ and one weight, and no layer runs: the machinery does not depend on what the layers compute,
and a forward pass through a thousand of them would bury it. From the time of a step is taken, within each round, the
time of the same loss, its backward pass and the step of the same optimizer in plain PyTorch: on the weight alone, so
that what ours does to γ counts as machinery, and in rows of their own on the weight and γ. All optimizers of many small
parameters are in the foreach form, the fastest that torch has for them on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import cooper
import pandas as pd
import torch
from cooper.optim import RollOut
from torch import Tensor, nn

import ace
from benchmarks.speed.timing import interleaved, median_of, spread

LAYERS = (16, 64, 256, 1024)
STEPS = 10**7  # planned: no term is let go while it is being measured
EVERY = 10  # as the suite records
PLAIN, RETIRED, TRAINED = "plain", "plain, without γ", "plain, γ trained"


class Bare(nn.Module):
    """Layers to relax, and one weight.

    Args:
        layers: Number of layers.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1, 1) for _ in range(layers)))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Run every layer."""
        return self.weight * self.layers(x)


def variants(layers: int, folder: Path) -> dict[str, Callable[[], object]]:
    """Return one function a variant that does a step; the plain ones are what is taken off the others."""
    functions: dict[str, Callable[[], object]] = {
        PLAIN: plain(layers),
        RETIRED: plain(layers, retired=True),
        TRAINED: plain(layers, trained=True),
    }
    step, history = constrained(layers), ace.History(folder / f"{layers}.csv")
    thinned = ace.History(folder / f"{layers}-thinned.csv", every=EVERY)
    functions["ace"] = step
    functions["ace, recorded"] = lambda: history.append(step())
    functions[f"ace, every {EVERY}th recorded"] = lambda: thinned.append(step())
    silent, zeros = constrained(layers, retired=True), ace.History(folder / f"{layers}-retired.csv")
    functions["ace, all terms retired"] = silent
    functions["ace, all terms retired, recorded"] = lambda: zeros.append(silent())
    functions["Cooper, one vector"] = vector(layers)
    functions["list of scalars"] = scalars(layers)
    return functions


def parts(layers: int, retired: bool = False) -> tuple[nn.Module, list[nn.Parameter], Callable[[], Tensor]]:
    """Return a relaxed model in which γ and one weight are trained, its γ, and a loss that reads them all.

    Where the terms are retired it reads the weight only.
    """
    model = ace.relax(Bare(layers), layers=nn.Linear, example=torch.ones(1, 1))
    gammas = [relaxation.gamma for relaxation in ace.relaxations(model).values()]
    weight = model.get_parameter("weight")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is weight or any(parameter is gamma for gamma in gammas))
    model(torch.ones(1, 1))  # every layer has run
    pull = torch.linspace(-1e-3, 1e-3, layers)

    def loss() -> Tensor:
        return weight.square() if retired else torch.dot(torch.cat(gammas), pull) + weight.square()

    return model, gammas, loss


def plain(layers: int, retired: bool = False, trained: bool = False) -> Callable[[], object]:
    """The loss, its gradients, and an optimizer of the weight; γ is left where it is, unless it is ``trained`` too."""
    model, gammas, loss = parts(layers, retired)
    weight = model.get_parameter("weight")
    optimizer = torch.optim.Adam([weight, *gammas], 1e-3, foreach=True) if trained else torch.optim.Adam([weight], 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        for gamma in gammas:
            gamma.grad = None
        loss().backward()
        optimizer.step()

    return step


def constrained(layers: int, retired: bool = False) -> Callable[[], RollOut]:
    """``PrimalDual.roll`` as ``ace.relax`` and the defaults give it."""
    model, _, loss = parts(layers, retired)
    if retired:
        for relaxation in ace.relaxations(model).values():
            relaxation.retire()
    problem = ace.Problem(model, loss=lambda model, batch: loss())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(trained, 1e-3), steps=STEPS)
    return lambda: optimizer.roll(None)


def vector(layers: int) -> Callable[[], object]:
    """A bare problem of Cooper: γ = 0 with one vector multiplier, both updates at once, γ on SGD."""
    model, gammas, loss = parts(layers)

    class Vanishing(cooper.ConstrainedMinimizationProblem):
        def __init__(self) -> None:
            super().__init__()
            multiplier = cooper.multipliers.DenseMultiplier(num_constraints=layers)
            self.vanishing = cooper.Constraint(cooper.ConstraintType.EQUALITY, multiplier=multiplier)

        def compute_cmp_state(self) -> cooper.CMPState:
            observed = {self.vanishing: cooper.ConstraintState(torch.cat(gammas))}
            return cooper.CMPState(loss(), observed)

    problem = Vanishing()
    primal = [torch.optim.Adam([model.get_parameter("weight")], 1e-3), torch.optim.SGD(gammas, 1e-6, foreach=True)]
    dual = torch.optim.SGD(problem.dual_parameters(), 1e-6, maximize=True)
    return cooper.optim.SimultaneousOptimizer(problem, primal, dual).roll


def scalars(layers: int) -> Callable[[], object]:
    """A Python list of scalar multipliers, γ beside the weights in Adam, another Adam on the list."""
    model, gammas, loss = parts(layers)
    multipliers = [nn.Parameter(torch.zeros(1)) for _ in gammas]
    primal = torch.optim.Adam([model.get_parameter("weight"), *gammas], 1e-6, foreach=True)
    dual = torch.optim.Adam(multipliers, 1e-6, foreach=True)

    def step() -> None:
        primal.zero_grad()
        dual.zero_grad()
        penalty = sum((m.detach() * g for m, g in zip(multipliers, gammas, strict=True)), torch.zeros(1))
        (loss() + penalty.sum()).backward()
        primal.step()
        for multiplier, gamma in zip(multipliers, gammas, strict=True):
            multiplier.grad = -gamma.detach()
        dual.step()

    return step


def measure(rounds: int, layers: tuple[int, ...] = LAYERS) -> pd.DataFrame:
    """Return the microseconds of a step: a row for each variant, a column for each number of layers.

    Args:
        rounds: Number of rounds.
        layers: Numbers of layers, ascending.

    Returns:
        The table as text, its last column the growth per layer between the first and the last number of layers.
    """
    over: dict[int, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in layers:
            times = interleaved(variants(count, Path(folder)), rounds, max(16, 800 // count))
            over[count] = 1000 * pd.DataFrame(
                {name: times[name] - times[RETIRED if "retired" in name else PLAIN] for name in times.columns[3:]}
            )
            for place, name in enumerate(("ace", "ace, recorded")):  # each below its own row
                over[count].insert(2 * place + 1, f"{name}, less Adam on γ", 1000 * (times[name] - times[TRAINED]))
    first, last = layers[0], layers[-1]
    growth = (over[last] - over[first]) / max(last - first, 1)
    table = pd.DataFrame({f"{count} layers, µs": [spread(over[count][n], 0) for n in over[count]] for count in layers})
    table["a further layer, µs"] = [spread(growth[name]) for name in growth]
    table.insert(0, "a step", list(growth))
    return table


def relative(table: pd.DataFrame) -> float:
    """Return our machinery at the first number of layers, as a share of Cooper's."""
    first = table.set_index("a step").iloc[:, 0]
    return median_of(str(first["ace"])) / median_of(str(first["Cooper, one vector"]))
