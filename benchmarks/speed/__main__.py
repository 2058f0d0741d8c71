"""``python -m benchmarks.speed [model ...]``: measure training steps and write ``docs/results/cost.csv``.

Four copies of a model take turns, a few steps each, round after round, so that a machine that slows down slows all of
them: the plain one, a relaxed one with every term alive, one with every term retired, and a restored one. What counts
is the ratio to the plain one within a round. Models whose library is not installed are left out; their rows stay.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from rich.progress import track

import ace
from ace.calls import call, map_tensors
from ace.errors import ConstraintNotMet
from ace.history import replace_file
from ace.probing import default_dtype
from benchmarks.speed.models import SUBJECTS, Subject

FOLDER = Path(__file__).parents[2] / "docs" / "results"
LIBRARY = {"mace": "mace-torch", "nequip": "nequip", "schnet": "torch-geometric", "c4-cnn": "escnn"}


def variants(subject: Subject, relaxed: torch.nn.Module) -> dict[str, object]:
    """Return one function a variant that does a training step."""
    retired = copy.deepcopy(relaxed)
    for relaxation in ace.relaxations(retired).values():
        relaxation.retire()
    restored = copy.deepcopy(relaxed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        ace.restore(restored)
    return {
        "strict": _plain(subject.model, subject),
        "relaxed": _constrained(relaxed, subject),
        "retired": _constrained(retired, subject),
        "restored": _plain(restored, subject),
    }


def measure(subject: Subject, relaxed: torch.nn.Module, rounds: int, steps: int) -> pd.DataFrame:
    """Return the milliseconds of a step, one row a round and a column a variant."""
    functions = variants(subject, relaxed)
    for function in functions.values():
        function()
    rows = []
    for _ in track(range(rounds), description=type(subject.model).__name__):
        row = {}
        for name, function in functions.items():
            start = time.process_time()
            for _ in range(steps):
                function()
            row[name] = 1000 * (time.process_time() - start) / steps
        rows.append(row)
    return pd.DataFrame(rows)


def summarise(name: str, subject: Subject, relaxed: torch.nn.Module, times: pd.DataFrame) -> dict[str, object]:
    """Return one row of the table: median ratio to the plain model, with the quartiles over the rounds."""
    plain = sum(parameter.numel() for parameter in subject.model.parameters())
    row: dict[str, object] = {
        "model": name,
        "library": f"{LIBRARY[name]} {importlib.metadata.version(LIBRARY[name])}" if name in LIBRARY else "benchmarks",
        "batch": subject.size,
        "terms": len(ace.relaxations(relaxed)),
        "parameters": plain,
        "parameters of the terms": sum(parameter.numel() for parameter in relaxed.parameters()) - plain,
        "strict, ms": f"{times['strict'].median():.1f}",
    }
    for variant in ("relaxed", "retired", "restored"):
        ratio = times[variant] / times["strict"]
        low, middle, high = ratio.quantile([0.25, 0.5, 0.75])
        row[variant] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    return row | {"rounds": len(times), "torch": torch.__version__.split("+")[0]}


def _plain(model: torch.nn.Module, subject: Subject) -> object:
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        subject.loss(call(model, _fresh(subject.example))).backward()
        optimizer.step()

    return step


def _constrained(model: torch.nn.Module, subject: Subject) -> object:
    problem = ace.Problem(model, loss=lambda m, batch: subject.loss(call(m, batch)))
    # so many planned steps that no term is let go while it is being measured
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(model.parameters(), 1e-5), steps=10**7)
    return lambda: optimizer.roll(_fresh(subject.example))


def _fresh(example: object) -> object:
    """Copies of the tensors: models of forces mark their positions, and some write into their batch."""
    return map_tensors(lambda tensor: tensor.detach().clone(), example)


def main() -> None:
    """Measure, and merge the rows into the committed table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        try:
            with default_dtype():  # nequip asks for another
                subject = SUBJECTS[name]()
        except ImportError as problem:
            print(f"{name}: left out, {problem}")
            continue
        relaxed = ace.relax(copy.deepcopy(subject.model), example=subject.example)
        times = measure(subject, relaxed, options.rounds, options.steps)
        rows.append(summarise(name, subject, relaxed, times))
        print(pd.DataFrame(rows[-1:]).T.to_string(header=False))
    path = FOLDER / "cost.csv"
    table = pd.DataFrame(rows)
    if path.exists():
        table = pd.concat([pd.read_csv(path), table]).drop_duplicates("model", keep="last")
    table = table.sort_values("model", key=lambda column: column.map(list(SUBJECTS).index), ignore_index=True)
    replace_file(path, table.to_csv(index=False).encode())


if __name__ == "__main__":
    main()
