"""Training steps of relaxed models against those of the plain ones.

Four copies of a model take turns, a few steps each, round after round: the plain one, a relaxed one with every term
alive, one with every term retired, and a restored one; then forward passes of the plain one and of the relaxed one, as
they are shipped with a tolerance. What counts is the ratio to the plain one within a round.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import pandas as pd
import torch

import ace
from ace.calls import call, map_tensors
from ace.errors import ConstraintNotMet
from ace.probing import default_dtype
from benchmarks.compiling import compile_in_place
from benchmarks.speed.models import SUBJECTS, Subject
from benchmarks.speed.timing import interleaved, peak_memory, spread

LIBRARY = {"mace": "mace-torch", "nequip": "nequip", "schnet": "torch-geometric", "c4-cnn": "escnn"}
RATIOS = ("relaxed", "retired", "restored")


def measure(
    names: Iterable[str], rounds: int, steps: int, device: str = "cpu", mode: str | None = None
) -> pd.DataFrame:
    """Return a row of the table for each model.

    Args:
        names: Keys of ``SUBJECTS``. Models whose library is not installed are left out.
        rounds: Number of rounds.
        steps: Steps of each variant in a round.
        device: ``cpu`` or ``cuda``.
        mode: Mode of ``torch.compile``, None for models that run as they are.

    Returns:
        The table.
    """
    rows = []
    for name in names:
        torch.manual_seed(0)
        try:
            with default_dtype():  # nequip asks for another
                subject = SUBJECTS[name]()
        except ImportError as problem:
            print(f"{name}: left out, {problem}")
            continue
        example = map_tensors(lambda tensor: tensor.to(device), subject.example)
        subject = replace(subject, model=subject.model.to(device), example=example)
        relaxed = ace.relax(copy.deepcopy(subject.model), subject.layers, subject.example)
        functions = variants(subject, relaxed, mode)
        times = interleaved(functions, rounds, steps, device)
        passes = {name: _forward(model, subject) for name, model in (("strict", subject.model), ("relaxed", relaxed))}
        used = interleaved(passes, rounds, steps, device)
        memory = {variant: peak_memory(functions[variant], device) for variant in ("strict", "relaxed")}
        rows.append(summarise(name, subject, relaxed, times, used, memory))
        if device != "cpu":
            rows[-1]["device"] = torch.cuda.get_device_name(device)
        print(pd.DataFrame(rows[-1:]).T.to_string(header=False))
    return pd.DataFrame(rows)


def variants(subject: Subject, relaxed: torch.nn.Module, mode: str | None = None) -> dict[str, Callable[[], object]]:
    """Return one function a variant that does a training step."""
    retired = copy.deepcopy(relaxed)
    for relaxation in ace.relaxations(retired).values():
        relaxation.retire()
    restored = copy.deepcopy(relaxed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        ace.restore(restored)
    if mode is not None:
        for model in (subject.model, relaxed, retired, restored):
            compile_in_place(model, mode)
    return {
        "strict": _plain(subject.model, subject),
        "relaxed": _constrained(relaxed, subject),
        "retired": _constrained(retired, subject),
        "restored": _plain(restored, subject),
    }


def summarise(
    name: str,
    subject: Subject,
    relaxed: torch.nn.Module,
    times: pd.DataFrame,
    used: pd.DataFrame,
    memory: dict[str, int],
) -> dict[str, object]:
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
    for variant in RATIOS:
        row[variant] = spread(times[variant] / times["strict"])
    row["strict, forward, ms"] = f"{used['strict'].median():.1f}"
    row["relaxed, forward"] = spread(used["relaxed"] / used["strict"])
    row["strict, MB"] = f"{memory['strict'] / 1e6:.1f}"
    row["relaxed, memory"] = f"{memory['relaxed'] / memory['strict']:.2f}"
    return row | {"rounds": len(times), "torch": torch.__version__.split("+")[0]}


def _plain(model: torch.nn.Module, subject: Subject) -> Callable[[], object]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def step() -> None:
        optimizer.zero_grad()
        subject.loss(call(model, _fresh(subject.example))).backward()
        optimizer.step()

    return step


def _constrained(model: torch.nn.Module, subject: Subject) -> Callable[[], object]:
    problem = ace.Problem(model, loss=lambda m, batch: subject.loss(call(m, batch)))
    # so many planned steps that no term is let go while it is being measured
    optimizer = ace.PrimalDual(problem, torch.optim.Adam(model.parameters(), 1e-5), steps=10**7)
    return lambda: optimizer.roll(_fresh(subject.example))


def _forward(model: torch.nn.Module, subject: Subject) -> Callable[[], object]:
    model = copy.deepcopy(model).eval()

    def use() -> None:
        with torch.set_grad_enabled(subject.differentiates):
            call(model, _fresh(subject.example))

    return use


def _fresh(example: object) -> object:
    """Copies of the tensors: models of forces mark their positions, and some write into their batch."""
    return map_tensors(lambda tensor: tensor.detach().clone(), example)
