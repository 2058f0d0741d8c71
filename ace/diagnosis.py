"""Where do the data break the symmetry? Layers that stay relaxed, transformations broken, what strict costs."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace import checkpoint
from ace.breaking import MARGIN, Finding, Rows, judge
from ace.calls import call
from ace.constraints import Resilient
from ace.errors import AceError, NonFiniteLoss
from ace.groups import (
    E3,
    O3,
    SO2,
    SO3,
    Dihedral,
    Generator,
    Group,
    Inversion,
    Octahedral,
    Translations,
    act_generator,
    jvp,
)
from ace.history import replace_file
from ace.inputs import UNMOVED, model_inputs, with_inputs
from ace.metrics import equivariance_error
from ace.probing import evaluating
from ace.problem import PrimalDual, Problem
from ace.relaxation import relax
from ace.symmetry import Samples

STANDS_OUT = 0.5
"""An axis is named if the squared Lie derivative about it is below this share of that about the next best."""
WIDE = 8
"""Samples of up to so many vectors are taken as a whole, each node's residual seeing all of them."""
SLOTS = 64
"""Largest number of nodes of which each may have a mean residual of its own."""
FAR = 3.0
"""Scale of translations, in units of the spread of the samples: far enough to forget where a sample was."""
LIE_BATCHES = 4
"""Validation batches on which Lie derivatives are measured."""
Split = Callable[[Any], tuple[Any, Tensor]]


@dataclass(frozen=True)
class Diagnosis:
    """What ``ace.diagnose`` found; ``print`` it, ``plot`` it, ``save`` it.

    Attributes:
        group: Name of the whole group.
        samples: Number of validation samples.
        layers: Size of γ of each relaxed layer at the end of resilient training, one number a seed.
        multipliers: λ/ρ of each relaxed layer, which the size of γ settles at, one number a seed.
        strict: Validation loss of the strict model, one number a seed.
        resilient: Validation loss of the resilient model, one number a seed.
        error: Measured relative equivariance error of the resilient model, one number a seed.
        rotations: M with aᵀMa the squared relative Lie derivative of the resilient model about the unit axis a through
            the sample's centre, per radian; mean over seeds, 3 × 3.
        translations: The same for translations along a, per unit of length; None if the group has none.
        axis: The axis about which the resilient model is best equivariant, if one stands out.
        spread: Mean angle between this axis and those of the single seeds, in degrees.
        findings: Which groups the data keep; the whole group first.
    """

    group: str
    samples: int
    layers: dict[str, list[float]]
    multipliers: dict[str, list[float]]
    strict: list[float]
    resilient: list[float]
    error: list[float]
    rotations: list[list[float]]
    translations: list[list[float]] | None
    axis: tuple[float, float, float] | None
    spread: float | None
    findings: list[Finding]

    @property
    def symmetric(self) -> bool:
        """Whether the data show no break of any transformation of the group."""
        return self.findings[0].verdict != "broken"

    def named(self, verdict: str) -> list[str]:
        """Names of the groups with this verdict: ``"broken"``, ``"kept"`` or ``"undecided"``."""
        return [finding.name for finding in self.findings if finding.verdict == verdict]

    @property
    def cost(self) -> float:
        """By which share the strict model's validation loss exceeds the resilient one's, mean over seeds."""
        return sum(self.strict) / sum(self.resilient) - 1

    def __str__(self) -> str:
        whole, seeds = self.findings[0], len(self.strict)
        of = f"(p {_p(whole.p)}, n = {self.samples} samples, {seeds} seed{'s' * (seeds > 1)})"
        lines = [f"{'symmetric: the data show no break of' if self.symmetric else 'the data break'} {self.group} {of}"]
        if not self.symmetric:
            lines += [f"{v}: {'; '.join(self.named(v))}" for v in ("broken", "kept", "undecided") if self.named(v)]
        if not whole.even:
            lines.append(f"inputs are uneven: of what they do not vary in, only a cost above {MARGIN:.0%} is seen")
        head = ("transformations", "verdict", "p", "best fit", "excess", "inputs")
        lines += ["", *_columns(head, [_row(finding) for finding in self.findings]), ""]
        losses = f"strict {_mean(self.strict)}, resilient {_mean(self.resilient)}"
        lines.append(f"validation loss: {losses}; strict costs {self.cost:+.0%}")
        lines.append(f"equivariance error of the resilient model: {_mean(self.error)}")
        if self.axis is not None:
            lines.append(f"it is best equivariant about {_vector(self.axis)}; seeds differ by {self.spread:.0f}°")
        layers = [(name, _mean(sizes), _mean(self.multipliers[name])) for name, sizes in self.layers.items()]
        return "\n".join([*lines, "", *_columns(("layer", "|γ|", "λ/ρ"), layers)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all numbers as JSON.

        Raises:
            NotWritten: The file cannot be written.
        """
        content = {"symmetric": self.symmetric, "cost": self.cost, **asdict(self)}
        replace_file(Path(path), json.dumps(content, indent=1).encode())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw layers, Lie derivatives by axis and findings; see ``ace.plotting.plot_diagnosis``."""
        from ace.plotting import plot_diagnosis  # matplotlib only when it is needed

        plot_diagnosis(asdict(self), path)


def diagnose(
    build: Callable[[int], nn.Module],
    loss: Callable[[nn.Module, Any], Tensor],
    train: Iterable[Any],
    valid: Iterable[Any],
    group: Group,
    *,
    steps: int,
    outputs: str,
    inputs: Mapping[int | str, str] | None = None,
    split: Split | None = None,
    seeds: int = 3,
    lr: float = 1e-3,
    clip: float | None = None,
    rho: float = 1.0,
    relaxing: Mapping[str, Any] | None = None,
    subgroups: Mapping[str, Group] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Diagnosis:
    r"""Say which layers the data relax, which transformations they break, and what strict equivariance costs.

    For each seed a strict model is trained, and one with ``ace.Resilient(rho)``. Layers that stay relaxed, the
    validation loss of both and the resilient model's equivariance error and Lie derivative by axis are measured. Which
    transformations the *data* break is tested on the residuals of the strict models, averaged over seeds, on the
    validation samples: see ``ace.breaking``. On data that keep the group, with inputs that look the same from all
    sides, it is said in 5 % of the cases that they do not.

    Args:
        build: Returns a new equivariant model; called inside a random state seeded with its argument.
        loss: ``loss(model, batch)`` returns the training loss, a tensor without axes, a mean over samples.
        train: Training batches; iterated over as often as needed.
        valid: Validation batches, in the same order each time.
        group: ``SO3()``, ``O3()`` or ``E3()``; the model is equivariant under it.
        steps: Updates of each training.
        outputs: Type of the model's output, one tensor with a row for each node.
        inputs: Types of its inputs, as in ``ace.equivariance_error``.
        split: Returns, for a batch, what the model is called with and the target. Default: a pair is just that, and
            of anything else ``batch.y`` is the target of ``batch``.
        seeds: Number of trainings of each kind.
        lr: Learning rate of Adam.
        clip: Largest norm of the gradient.
        rho: Price of the relaxation, in units of the loss.
        relaxing: Further arguments of ``ace.relax``.
        subgroups: What to test, by name. Default: rotations, about x, y, z and the axis found, inversion, a mirror that
            contains the axis, the symmetries of the cube, translations along x, y, z; as far as the group has them.
        folder: Keep what was measured of each seed there, and go on from it.
        progress: Called with the number of updates done, of 2 · seeds · steps.

    Returns:
        The diagnosis.

    Raises:
        AceError: Arguments that do not fit, all of them listed; or too few samples.
        NonFiniteLoss: A loss was not finite.
        CheckpointMismatch: The folder holds seeds that were measured with other arguments.

    Example:
        >>> import torch, ace
        >>> random = torch.Generator().manual_seed(0)
        >>> x, noise = torch.randn(2, 400, 2, 3, generator=random)
        >>> y = 2 * x + 0.1 * noise + torch.tensor([0.0, 0.0, 0.5])  # a wind blows along z
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = torch.nn.Parameter(torch.ones(1))
        ...     def forward(self, x):
        ...         return self.factor * x
        >>> found = ace.diagnose(
        ...     lambda seed: torch.nn.Sequential(Scale()), lambda m, b: (m(b[0]) - b[1]).square().mean(),
        ...     train=[(x[:100], y[:100])], valid=[(x[100:], y[100:])], group=ace.O3(), steps=100, seeds=1, lr=0.1,
        ...     inputs={0: "vector"}, outputs="vector", relaxing={"layers": Scale},
        ...     subgroups={"rotations": ace.SO3(), "rotations about z": ace.SO2()})
        >>> found.symmetric, found.named("kept")
        (False, ['rotations about z'])
    """
    first, batches = next(iter(train), None), list(valid)
    _check(first, batches, group, steps, seeds, split)
    pairs = [_split(batch, split) for batch in batches]
    run = _Run(build, loss, train, batches, pairs, group, steps, inputs, outputs, lr, clip, rho, relaxing or {})
    config = {"steps": steps, "lr": lr, "clip": clip, "rho": rho, "group": str(group), "batches": len(pairs)}
    measured: list[dict[str, Any]] = []
    for seed in range(seeds):

        def tick(done: int, before: int = 2 * steps * seed) -> None:
            if progress is not None:
                progress(before + done)

        path = None if folder is None else Path(folder) / f"seed{seed}.pt"
        if path is not None and path.exists():
            measured.append(checkpoint.load(path, config))
        else:
            measured.append(run.measure(seed, tick))
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.save(path, measured[-1], config)
        tick(2 * steps)

    rotations = torch.stack([one["rotations"] for one in measured])
    axis, spread = _axis(rotations)
    prediction = torch.stack([one["prediction"] for one in measured]).mean(0)
    with _seeded(0):
        model = build(0)
    rows = _rows(model, pairs, prediction, inputs, outputs)
    if isinstance(group, E3) and rows.origin is not None:
        group = E3(translation=FAR * float(rows.origin.std(0).norm()) or 1.0)
    tested = _chain(group, axis) if subgroups is None else subgroups
    names = measured[0]["layers"]
    return Diagnosis(
        group=str(group),
        samples=rows.samples,
        layers={name: [float(one["gamma"][i].abs()) for one in measured] for i, name in enumerate(names)},
        multipliers={name: [float(one["multiplier"][i]) / rho for one in measured] for i, name in enumerate(names)},
        strict=[one["strict"] for one in measured],
        resilient=[one["resilient"] for one in measured],
        error=[one["error"] for one in measured],
        rotations=rotations.mean(0).tolist(),
        translations=torch.stack([one["translations"] for one in measured]).mean(0).tolist()
        if isinstance(group, E3)
        else None,
        axis=axis,
        spread=spread,
        findings=judge(rows, group, tested),
    )


@dataclass(frozen=True)
class _Run:
    """The trainings of one seed, and what is measured of them."""

    build: Callable[[int], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    train: Iterable[Any]
    batches: list[Any]
    pairs: list[tuple[Any, Tensor]]
    group: Group
    steps: int
    inputs: Mapping[int | str, str] | None
    outputs: str
    lr: float
    clip: float | None
    rho: float
    relaxing: Mapping[str, Any]

    def measure(self, seed: int, tick: Callable[[int], None]) -> dict[str, Any]:
        """Train both models and measure them."""
        with _seeded(seed):
            model = self.build(seed)
            optimizer = torch.optim.Adam(model.parameters(), self.lr)
            for done, batch in enumerate(self.stream(), 1):
                value = self.loss(model, batch)
                if not torch.isfinite(value):
                    raise NonFiniteLoss(
                        f"the loss was {value.item()} at step {done} of strict training: lower lr, set clip"
                    )
                optimizer.zero_grad()
                value.backward()
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
                tick(done)
            strict, prediction = self.value(model), self.predict(model)

            torch.manual_seed(seed)
            relaxed = relax(self.build(seed), example=self.pairs[0][0], **{"inputs": self.inputs, **self.relaxing})
            problem = Problem(relaxed, self.loss, Resilient(self.rho))
            resilient = PrimalDual(
                problem, torch.optim.Adam(relaxed.parameters(), self.lr), steps=self.steps, clip=self.clip
            )
            for done, batch in enumerate(self.stream(), 1):
                resilient.roll(batch)
                tick(self.steps + done)
            return {
                "strict": strict,
                "prediction": prediction,
                "resilient": self.value(relaxed),
                "layers": list(problem.relaxations),
                "gamma": torch.cat([gamma.detach() for gamma in problem.gammas]),
                "multiplier": problem.multiplier.detach().clone(),
                "error": float(
                    equivariance_error(relaxed, self.pairs[0][0], self.group, inputs=self.inputs, outputs=self.outputs)
                ),
                "rotations": self.gram(relaxed, E3().generators()[:3]),
                "translations": self.gram(relaxed, E3().generators()[3:]) if isinstance(self.group, E3) else None,
            }

    def stream(self) -> Iterator[Any]:
        """Yield as many training batches as there are steps."""
        return itertools.islice(itertools.chain.from_iterable(itertools.repeat(self.train)), self.steps)

    def value(self, model: nn.Module) -> float:
        """Return the validation loss."""
        with evaluating(model):
            values = [
                self.loss(model, batch).item() * len(target)
                for batch, (_, target) in zip(self.batches, self.pairs, strict=True)
            ]
        return sum(values) / sum(len(target) for _, target in self.pairs)

    def predict(self, model: nn.Module) -> Tensor:
        """Return the predictions on the validation samples."""
        with evaluating(model):
            predictions = [call(model, example) for example, _ in self.pairs]
        for prediction, (_, target) in zip(predictions, self.pairs, strict=True):
            if not isinstance(prediction, Tensor) or prediction.shape != target.shape:
                found = tuple(prediction.shape) if isinstance(prediction, Tensor) else f"a {type(prediction).__name__}"
                raise AceError(
                    f"the model returns {found} for targets {tuple(target.shape)}: pass split=, which returns, "
                    "for a batch, what the model is called with and a target like the model's output"
                )
        return torch.cat([prediction.detach() for prediction in predictions])

    def gram(self, model: nn.Module, basis: list[Generator]) -> Tensor:
        r"""Return M with aᵀMa the squared relative Lie derivative along a; rotations are about the sample's centre."""
        total = torch.zeros(3, 3, dtype=torch.float64)
        for example, _ in self.pairs[:LIE_BATCHES]:
            entries = model_inputs(model, example, self.inputs)
            samples = Samples(entries, 1.0)
            moving = [entry for entry in entries if entry.kind not in UNMOVED]
            place = next((entry.value for entry in moving if entry.kind == "position"), None)

            def moved(
                direction: Generator, tensor: Tensor, kind: str, place: Any = place, samples: Any = samples
            ) -> Tensor:
                if kind == "position" and place is not None:
                    tensor = tensor - _means(place, samples.index(place)).view(
                        len(tensor), *[1] * (tensor.dim() - 2), -1
                    )
                return act_generator(direction, tensor, kind)

            def function(*tensors: Tensor, example: Any = example, moving: Any = moving) -> Tensor:
                new = {entry.path: tensor for entry, tensor in zip(moving, tensors, strict=True)}
                result: Tensor = call(model, with_inputs(example, new))
                return result

            primals = tuple(entry.value for entry in moving)
            with evaluating(model):
                output = function(*primals).detach()
                slopes = []
                for direction in basis:
                    tangents = tuple(moved(direction, entry.value, entry.kind) for entry in moving)
                    slope = jvp(function, primals, tangents).detach() - moved(direction, output, self.outputs)
                    slopes.append(slope.double().flatten())
            total += (
                torch.stack([torch.stack([a @ b for b in slopes]) for a in slopes]) / output.double().square().sum()
            )
        return total / len(self.pairs[:LIE_BATCHES])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the random state for a while."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _axis(grams: Tensor) -> tuple[tuple[float, float, float] | None, float | None]:
    """Axis of the smallest eigenvalue, if it stands out, and how far the seeds' axes are from it, in degrees."""
    values, vectors = torch.linalg.eigh(grams.mean(0))
    if values[0] > STANDS_OUT * values[1] or values[1] <= 0:
        return None, None
    axis = vectors[:, 0] * vectors[:, 0][vectors[:, 0].abs().argmax()].sign()
    single = torch.linalg.eigh(grams)[1][:, :, 0]
    angles = torch.rad2deg(torch.acos((single @ axis).abs().clamp(max=1.0)))
    x, y, z = (round(float(part), 4) for part in axis)
    return (x, y, z), float(angles.mean())


def _chain(group: Group, axis: tuple[float, float, float] | None) -> dict[str, Group]:
    """The subgroups that are tested."""
    mirrors = isinstance(group, O3 | E3)
    chain: dict[str, Group] = {} if isinstance(group, SO3) else {"rotations": SO3()}
    for name, unit in zip("xyz", torch.eye(3).tolist(), strict=True):
        chain[f"rotations about {name}"] = SO2(tuple(unit))
    if axis is not None:
        chain[f"rotations about {_vector(axis)}"] = SO2(axis)
        if mirrors:
            chain[f"a mirror containing {_vector(axis)}"] = Dihedral(1, axis)
    if mirrors:
        chain |= {"inversion": Inversion(), "symmetries of the cube": Octahedral()}
    if isinstance(group, E3):
        chain |= {f"translations along {name}": Translations(group.translation, (i,)) for i, name in enumerate("xyz")}
    return chain


def _split(batch: Any, split: Split | None) -> tuple[Any, Tensor]:
    if split is not None:
        return split(batch)
    return batch if isinstance(batch, tuple) else (batch, batch.y)


def _check(first: Any, batches: list[Any], group: Group, steps: int, seeds: int, split: Split | None) -> None:
    problems = [f"{name}={value}: at least 1" for name, value in (("steps", steps), ("seeds", seeds)) if value < 1]
    problems += ["train has no batches, or can be iterated over only once"] if first is None else []
    problems += [] if batches else ["valid has no batches"]
    if not isinstance(group, SO3 | O3 | E3):
        problems.append(f"group is {group}: there are tests for SO3(), O3() and E3()")
    if batches and split is None:
        pair = isinstance(batches[0], tuple) and len(batches[0]) == 2
        if not pair and not hasattr(batches[0], "y"):
            problems.append(
                f"a batch is a {type(batches[0]).__name__}, neither a pair (what the model is called with, target) nor "
                "an object with .y: pass split=, which returns such a pair for a batch"
            )
    if problems:
        raise AceError("cannot diagnose: " + "; ".join(problems))


def _rows(
    model: nn.Module,
    pairs: list[tuple[Any, Tensor]],
    prediction: Tensor,
    inputs: Mapping[int | str, str] | None,
    kind: str,
) -> Rows:
    """Collect the residuals, and for each row the vectors they may depend on."""
    parts: list[tuple[Tensor, ...]] = []
    count = 0
    for (example, target), found in zip(pairs, prediction.split([len(target) for _, target in pairs]), strict=True):
        entries = model_inputs(model, example, inputs)
        moving = [e for e in entries if e.kind in ("vector", "position") and e.value.shape[-1] == 3]
        samples = Samples(entries, 1.0)
        index = samples.index(found)
        index = torch.zeros(len(found), dtype=torch.long) if index is None else index
        rows = 1
        if found.dim() > 2 and len(found) == samples.count > 1:  # dense: samples, nodes, ...
            rows = found.shape[1]
            moving = [replace(e, value=e.value.flatten(0, 1)) for e in moving if e.value.shape[1] == rows]
            index, found, target = index.repeat_interleave(rows), found.flatten(0, 1), target.flatten(0, 1)
        aligned = [e for e in moving if len(e.value) == len(found)]
        if not aligned:
            shapes = ", ".join(f"{e.name} {tuple(e.value.shape)}" for e in moving) or "none"
            raise AceError(
                f"no input gives a vector or position of each row of the output, of shape {tuple(found.shape)} (found: "
                f"{shapes}): pass inputs=, the types of the inputs. Outputs for a whole graph cannot be diagnosed"
            )
        vectors, own, origin = _channels(aligned, found.detach(), kind, index)
        near = _near(aligned, found.detach(), kind, index)
        parts.append((vectors, own, origin, near, (target - found).detach(), index + count))
        count += samples.count
    vectors, own, origin, near, residual, index = (torch.cat(part) for part in zip(*parts, strict=True))
    sizes = torch.bincount(index)
    kind = "vector" if kind == "position" else kind
    located = any(e.kind == "position" for e in aligned)
    alike = bool((sizes == sizes[0]).all()) and bool((index.diff() >= 0).all())
    nodes = int(sizes[0])
    if alike and nodes * own.shape[1] <= WIDE:  # a sample fits into one row: then each node sees the others
        own, residual = own.view(count, -1, 3), residual.view(count, nodes, *residual.shape[1:])
        origin = origin.view(count, nodes, 3)[:, 0]
        return Rows(own, origin if located else None, residual, kind, torch.arange(count))
    slot = torch.arange(nodes).repeat(count) if alike and nodes <= SLOTS else None
    return Rows(vectors, origin if located else None, residual, kind, index, slot, near if near.shape[1] else None)


def _channels(entries: list[Any], found: Tensor, kind: str, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors of each row with and without the means over its sample, and where its sample is."""
    places, vectors, last = _values(entries, found, kind)
    vectors += [x - places[0][:, :1] if kind == "position" and places else x for x in last]
    origin = _means(places[0][:, 0], index) if places else found.new_zeros(len(found), 3)
    own = torch.cat([*(place - origin[:, None] for place in places), *vectors], 1)
    means = [_means(vector, index) for vector in vectors]
    return torch.cat([own, *means], 1), own, origin


def _near(entries: list[Any], found: Tensor, kind: str, index: Tensor) -> Tensor:
    """Differences to the nearest row of the sample: of positions, vectors and predictions; none without positions."""
    count = torch.bincount(index)
    places, vectors, last = _values(entries, found, kind)
    if not places or int(count.min()) < 2:
        return found.new_zeros(len(found), 0, 3)
    place = places[0][:, 0]
    nearest = torch.empty_like(index)
    for rows in index.argsort(stable=True).split(count.tolist()):
        distance = torch.cdist(place[rows], place[rows]).fill_diagonal_(math.inf)
        nearest[rows] = rows[distance.argmin(1)]
    stacked = torch.cat([*places, *vectors, *last], 1)
    return stacked[nearest] - stacked


def _values(entries: list[Any], found: Tensor, kind: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Positions, vectors, and what is predicted last if that is a vector or position; each of shape (rows, ..., 3)."""
    places, vectors = (
        [e.value.detach().reshape(len(found), -1, 3) for e in entries if e.kind == wanted]
        for wanted in ("position", "vector")
    )
    predicted = kind in ("vector", "position") and found.shape[-1] == 3
    return places, vectors, [found.reshape(len(found), -1, 3)[:, -1:]] if predicted else []


def _means(x: Tensor, index: Tensor | None) -> Tensor:
    """Mean over the rows of a sample, for each row."""
    if index is None:
        return x.mean(0, keepdim=True).expand_as(x)
    count = torch.bincount(index).to(x)
    sums = x.new_zeros(len(count), *x.shape[1:]).index_add(0, index, x)
    return (sums / count.view(-1, *[1] * (x.dim() - 1)))[index]


def _p(p: float) -> str:
    return "< 1e-4" if p < 1e-4 else f"= {p:.2g}"


def _vector(axis: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{part:.2f}' for part in axis)})"


def _mean(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.3g}" + (f" ± {x.std():.1g}" if len(values) > 1 else "")


def _row(finding: Finding) -> tuple[str, ...]:
    p = _p(finding.p).removeprefix("= ")
    inputs = "even" if finding.even else "uneven"
    return finding.name, finding.verdict, p, f"{finding.error:.3f}", f"{finding.excess:+.1%}", inputs


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
