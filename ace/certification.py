r"""Certify a model: measure its equivariance error on data, with intervals, and bound it where that is possible.

**Errors.** With one random element :math:`g_{sk}` for each sample s and each k = 1 … K,

.. math:: r_{sk} = \| f(g_{sk} x_s) - g_{sk} f(x_s) \| \,/\, c, \qquad c^2 = \tfrac1S \sum_s \| f(x_s) \|^2 ,

in units of the root mean square c of the output over the samples seen, as in ``ace.EquivarianceError``. Samples are
taken as independent, the elements of one sample as dependent on each other.

**Bound.** For relaxed layers l = 1 … L in the order in which they run, let :math:`F_l` be the model whose first l
layers are relaxed and whose others are strict: :math:`F_0` is the restored model, :math:`F_L` the relaxed one. On one
input, :math:`F_l` and :math:`F_{l-1}` differ by :math:`\gamma_l f_{\mathrm{neq},l}` at the output of layer l, where
both see the same features :math:`x_l` of the relaxed model; what follows is strict. With :math:`\Lambda_l` a Lipschitz
constant of that (`ace.lipschitz`), summing over l gives

.. math:: \| F_L(x) - F_0(x) \| \le p(x) = \sum_l \Lambda_l\, |\gamma_l|\, \| f_{\mathrm{neq},l}(x_l) \| ,

.. math:: \| F_L(g x) - g F_L(x) \| \le p(x) + p(g x) + \| F_0(g x) - g F_0(x) \| ,

the latter where g preserves distances of outputs. These have the form of Theorems 4.1 and 4.2 of the ACE paper, with
the constants of each layer and the measured size of each term in place of the worst ones. They hold for the inputs and
elements that were measured, in exact arithmetic; not for others, whose :math:`\| f_{\mathrm{neq},l}(x_l) \|` was not
measured.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import call, map_tensors
from ace.certificate import Bound, Certificate, Errors, GroupErrors, fingerprint
from ace.errors import AceError
from ace.groups import Group, Permutations, act
from ace.inputs import unused_names
from ace.intervals import quantile_interval, ratio_interval, share_above_max
from ace.lipschitz import TermSizes, Unbounded, bound_after, local_after
from ace.metrics import Types, output_leaves, typed_outputs
from ace.probing import evaluating, same_randomness
from ace.relaxation import relaxations, restore, restored
from ace.symmetry import Samples, Watch, by_sample, unwrapped
from ace.terms import load_hosts

SHARE = 0.95
"""Which percentile is certified."""


def certify(
    model: nn.Module,
    loader: Iterable[Any],
    group: Group | Mapping[str, Group],
    *,
    inputs: Mapping[int | str, str] | None = None,
    outputs: Types = None,
    elements: int = 8,
    confidence: float = 0.95,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
) -> Certificate:
    r"""Measure how equivariant a model is on data, bound it where that is possible, and sign it with its weights.

    What each number means is in the text of `ace.certification`. The model runs in eval mode with a fixed random state;
    nothing of it is changed. It is measured as it is, as a copy in float64, and, if it carries relaxation terms, with
    every γ at 0 in float64: 3 (K + 1) forward passes over the data. Gradients stay enabled, since models of
    conservative forces differentiate inside their forward; wrap the call in ``torch.no_grad()`` to save memory.

    Samples are told apart as in ``ace.EquivarianceError``: graphs of a batch by an input named ``batch``, dense
    inputs by their first axis if all inputs that move have at least three axes; otherwise a whole batch is one sample.

    Args:
        model: A model, relaxed or not, possibly wrapped (``DistributedDataParallel``, compiled).
        loader: Batches as the model is called with them: a tuple of positional arguments, a dict of keyword arguments,
            one tensor, or a PyG ``Data``. If yours yields (inputs, target), pass ``(x for x, _ in loader)``.
        group: A group, or several by name.
        inputs: Types of the inputs, as in ``ace.equivariance_error``.
        outputs: Types of the outputs, as in ``ace.equivariance_error``. Of several outputs the squares are summed,
            each divided by its mean over the batch.
        elements: Number of random elements K of each sample.
        confidence: Of the intervals, between 0 and 1.
        seed: Seed of the elements and of the bootstrap.
        path: If given, the certificate is written there as well.

    Returns:
        The certificate.

    Raises:
        AceError: An argument out of its range, no data, types that are missing or do not fit, an output that is not
            finite or is zero throughout, or a model that cannot run in float64.
        NotWritten: The file cannot be written.

    Example:
        >>> from ace.groups import SO3
        >>> class Stretch(nn.Module):
        ...     def forward(self, pos):
        ...         return pos * torch.tensor([1.0, 1.0, 1.1]).to(pos)
        >>> batches = torch.randn(4, 50, 6, 3, generator=torch.Generator().manual_seed(0))
        >>> certificate = certify(Stretch(), batches, {"rotations": SO3()}, outputs="position")
        >>> certificate.samples, round(certificate.groups["rotations"].errors.rms, 2)
        (200, 0.06)
    """
    groups = dict(group) if isinstance(group, Mapping) else {str(group): group}
    _check(groups, elements, confidence, path)
    load_hosts()
    plain = unwrapped(model)
    with evaluating(plain):
        measured = _Measurements(plain, groups, inputs, outputs, elements, seed)
        for number, batch in enumerate(loader):
            measured.add(number, batch)
    if not measured.sizes:
        raise AceError("certify was given no batch: the loader is empty, or a generator that has run already")
    certificate = measured.certificate(confidence)
    if path is not None:
        certificate.save(path)
    return certificate


def _check(groups: dict[str, Group], elements: int, confidence: float, path: str | os.PathLike[str] | None) -> None:
    problems = []
    if not groups:
        problems.append("group= names no group")
    if elements < 1:
        problems.append(f"elements={elements}: at least 1")
    if not 0 < confidence < 1:
        problems.append(f"confidence={confidence}: above 0, below 1")
    if path is not None and not Path(path).parent.is_dir():
        problems.append(f"path={os.fspath(path)}: there is no folder {Path(path).parent}")
    if problems:
        raise AceError("certify: " + "; ".join(problems))


class _Measurements:
    """What is gathered batch by batch; tensors have a row for each sample and a column for each element."""

    def __init__(
        self,
        model: nn.Module,
        groups: dict[str, Group],
        inputs: Mapping[int | str, str] | None,
        outputs: Types,
        elements: int,
        seed: int,
    ) -> None:
        self.model, self.groups, self.elements, self.seed = model, groups, elements, seed
        self.inputs, self.outputs = inputs, outputs
        self.exact = copy.deepcopy(model).to(torch.float64)
        self.relaxed = bool(relaxations(model))
        self.kinds: tuple[dict[str, str], dict[str, str]] = ({}, {})
        self.sizes: list[Tensor] = []  # ‖f(x)‖²
        self.squares: dict[tuple[str, str], list[Tensor]] = {}  # (what, group) -> ‖f(g x) - g f(x)‖²
        self.gaps: list[Tensor] = []  # ‖f_γ(x) - f_0(x)‖² and ‖f_0(x)‖² side by side
        self.bounds: dict[tuple[str, str], list[Tensor]] = {}  # (kind, group; "" for the gap) -> not squared
        self.missing = dict.fromkeys(("bound", "estimate"), "" if self.relaxed else "there are no relaxation terms")
        self.constants: Tensor | None = None  # Λ of each layer, in the order in which they run

    def add(self, number: int, batch: Any) -> None:
        """Measure one batch."""
        watch, output = self.run(self.model, batch)
        if number == 0:
            self.kinds = self.types(watch, batch, output)
        if not all(bool(value.isfinite().all()) for _, value, _ in output_leaves(output, self.outputs)):
            raise AceError(f"the output of the model is not finite in batch {number}, counted from 0")
        self.sizes.append(self.measure("errors", watch, number))
        try:
            self.add_exact(number, map_tensors(_to_float64, batch))
        except (RuntimeError, TypeError) as error:
            raise AceError(
                f"the model cannot be measured in float64 ({type(error).__name__}: {error}): tensors that it makes in "
                "its forward must have the dtype of its inputs or weights"
            ) from error

    def add_exact(self, number: int, batch: Any) -> None:
        """Measure the copy in float64, with its terms and without."""
        with TermSizes(self.exact) as terms:
            watch, output = self.run(self.exact, batch)
            samples = watch.read()[2]
            passes = [terms.take(samples)]  # at x, then at g x for each group and element
            self.measure("float64", watch, number, lambda: passes.append(terms.take(samples)))
        if self.relaxed:
            with restored(self.exact):
                watch, strict = self.run(self.exact, batch)
                self.measure("floor", watch, number)
            self.gaps.append(self.gap(output, strict, samples))
            self.add_bounds(number, batch, samples, terms, passes)

    def run(self, model: nn.Module, batch: Any) -> tuple[Watch, Any]:
        """Run a batch through the model, watched; return what measures that call, and its output."""
        watch = Watch(model, self.inputs, self.outputs, seed=self.seed)
        with same_randomness(), watch.watching():
            return watch, call(model, batch)

    def measure(self, what: str, watch: Watch, number: int, after: Callable[[], None] = lambda: None) -> Tensor:
        """Measure the watched call under every group and element; return ‖f(x)‖² of each sample."""
        for name, group in self.groups.items():
            columns = []
            for element in range(self.elements):
                difference, size = watch.squares(group, number * self.elements + element)
                columns.append(difference.detach().double().cpu())
                after()
            self.squares.setdefault((what, name), []).append(torch.stack(columns, 1))
        return size.detach().double().cpu()

    def types(self, watch: Watch, batch: Any, output: Any) -> tuple[dict[str, str], dict[str, str]]:
        """Return the types of inputs and outputs by name; refuse what no group moves, and names of nothing."""
        _, arguments, samples = watch.read()
        kinds: dict[str, str] = {entry.name: entry.kind for entry in arguments}
        unused = unused_names(self.model, batch, self.inputs)
        problems = [f"inputs= names {key!r}, but the inputs are {', '.join(kinds)}" for key in unused]
        leaves = []
        for name, group in self.groups.items():
            nodes = samples.nodes if isinstance(group, Permutations) else None
            elements = [samples.elements(group, (seed, 0))[0] for seed in range(8)]  # one could be the identity
            leaves = typed_outputs(self.model, group, elements[0], arguments, output, self.outputs, problems, nodes)
            moved = (
                torch.equal(act(element, entry.value, entry.kind), entry.value)
                for element in elements
                for entry in arguments
            )
            if all(moved):
                problems.append(f"{name} moves none of the inputs: pass inputs= with their types; found {kinds}")
        if problems:
            raise AceError("certify: " + "; ".join(problems))
        return kinds, {label: kind for label, _, kind in leaves}

    def gap(self, relaxed: Any, strict: Any, samples: Samples) -> Tensor:
        """Return the squares of what the terms change and of the output without them, shape (samples, 2)."""
        total = torch.zeros(samples.count, 2, dtype=torch.float64)
        leaves = output_leaves(strict, self.outputs)
        for (_, before, _), (_, after, _) in zip(leaves, output_leaves(relaxed, self.outputs), strict=True):
            scale = 1.0 if len(leaves) == 1 else before.detach().square().sum() / samples.count
            squares = [
                by_sample(x.detach().square(), samples.index(x), samples.count) / scale
                for x in (after - before, before)
            ]
            total += torch.stack(squares, 1).cpu()
        return total

    def add_bounds(
        self, number: int, batch: Any, samples: Samples, terms: TermSizes, passes: list[Tensor | None]
    ) -> None:
        """Bound the gap and the errors of a batch; estimate them for the first."""
        known = [sizes for sizes in passes if sizes is not None]
        if len(known) < len(passes):
            self.missing = dict.fromkeys(self.missing, terms.problem)
            return
        constants = {"bound": self.constants}
        if number == 0:
            self.constants = self.bound_constants(terms, batch)
            constants = {"bound": self.constants, "estimate": self.local_constants(terms, batch, samples)}
        for kind, constant in constants.items():
            if constant is None:
                continue
            reach = [(constant * sizes).sum(0)[:, None] for sizes in known]
            self.bounds.setdefault((kind, ""), []).append(reach[0])
            for place, name in enumerate(self.groups):
                moved = torch.cat(reach[1 + place * self.elements :][: self.elements], 1)
                floor = self.squares["floor", name][-1].sqrt()
                self.bounds.setdefault((kind, name), []).append(reach[0] + moved + floor)

    def bound_constants(self, terms: TermSizes, batch: Any) -> Tensor | None:
        """Return Λ of each layer, shape (layers, 1), where all are known."""
        kinds = self.kinds[1]
        if len(kinds) > 1 or any(kind.endswith("image") for kind in kinds.values()):
            self.missing["bound"] = "it is for one output, of a type whose distances the group preserves"
            return None
        strict = copy.deepcopy(self.exact)
        with torch.no_grad():
            for relaxation in relaxations(strict).values():
                relaxation.gamma.zero_()
        restore(strict)
        args = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
        found = []
        for path in terms.order:
            try:
                found.append(bound_after(strict, path, args, batch if isinstance(batch, dict) else {}))
            except Unbounded as reason:
                self.missing["bound"] = f"behind {path}: {reason}"
                return None
        return torch.tensor(found, dtype=torch.float64)[:, None]

    def local_constants(self, terms: TermSizes, batch: Any, samples: Samples) -> Tensor | None:
        """Return estimates of the local Λ of each layer, shape (layers, samples): what follows the layer is strict."""
        attached = relaxations(self.exact)
        before = {path: relaxation.gamma.detach().clone() for path, relaxation in attached.items()}

        def run() -> Tensor:
            with same_randomness():
                [(_, value, _)] = output_leaves(call(self.exact, batch), self.outputs)
            return value

        found = []
        try:
            for place, path in enumerate(terms.order):
                for later in terms.order[place + 1 :]:
                    attached[later].gamma.data.zero_()
                found.append(local_after(self.exact.get_submodule(path), run, samples))
                for later in terms.order[place + 1 :]:
                    attached[later].gamma.data.copy_(before[later])
        except (RuntimeError, ValueError) as error:  # an operation without the derivative, or several outputs
            self.missing["estimate"] = f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}"
            return None
        finally:
            for path, gamma in before.items():
                attached[path].gamma.data.copy_(gamma)
        return torch.stack(found).cpu()

    def certificate(self, confidence: float) -> Certificate:
        """Return what was found."""
        sizes = torch.cat(self.sizes)
        unit = float(sizes.mean().sqrt())
        if unit == 0:
            raise AceError("certify: the output is zero on all samples, so no error is relative to it")
        squares = {key: torch.cat(parts) for key, parts in self.squares.items()}
        bounds = {key: torch.cat(parts) for key, parts in self.bounds.items() if not self.missing[key[0]]}
        gaps = torch.cat(self.gaps).sum(0) if self.gaps else torch.zeros(2)
        size_strict = float((gaps[1] / len(sizes)).sqrt())
        gap = float((gaps[0] / gaps[1]).sqrt()) if gaps[0] else 0.0

        def errors(what: str, name: str) -> Errors:
            return _errors(squares[what, name], sizes, confidence, self.seed)

        def bound(kind: str, name: str, unit: float, measured: Tensor) -> Bound | None:
            values = bounds.get((kind, name))
            if values is None:
                return None
            rms = float(values.square().mean().sqrt()) / unit
            there = float(measured[: len(values)].mean().sqrt()) / unit
            return Bound(rms, float(values.max()) / unit, rms / there if there else None, len(values))

        groups = {
            name: GroupErrors(
                str(group),
                errors("errors", name),
                errors("float64", name),
                errors("floor" if self.relaxed else "float64", name),
                bound("bound", name, unit, squares["float64", name]),
                bound("estimate", name, unit, squares["float64", name]),
            )
            for name, group in self.groups.items()
        }
        digest, keys = fingerprint(self.model)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        return Certificate(
            model=type(self.model).__qualname__,
            digest=digest,
            keys=keys,
            dtype=str(dtype).removeprefix("torch."),
            inputs=self.kinds[0],
            outputs=self.kinds[1],
            samples=len(sizes),
            elements=self.elements,
            confidence=confidence,
            above_max=share_above_max(len(sizes), confidence),
            size=unit,
            gammas={path: relaxation.gamma.item() for path, relaxation in relaxations(self.model).items()},
            projection_gap=gap,
            gap_bound=bound("bound", "", size_strict, torch.cat(self.gaps)[:, 0]) if self.gaps else None,
            gap_estimate=bound("estimate", "", size_strict, torch.cat(self.gaps)[:, 0]) if self.gaps else None,
            no_bound=self.missing["bound"],
            no_estimate=self.missing["estimate"],
            groups=groups,
            seed=self.seed,
            versions={"ace": version("ace-equivariance"), "torch": str(torch.__version__)},
        )


def _errors(squares: Tensor, sizes: Tensor, confidence: float, seed: int) -> Errors:
    """Summarise the squares of the errors, shape (samples, elements)."""
    relative = squares.sqrt() / sizes.mean().sqrt()
    percentile, low, high = quantile_interval(relative, SHARE, confidence)
    rms = ratio_interval(squares.mean(1), sizes, confidence, seed)
    return Errors(
        mean=float(relative.mean()),
        mean_interval=ratio_interval(relative.mean(1), torch.ones_like(sizes), confidence, seed),
        percentile=percentile,
        percentile_interval=(low, high),
        rms=float(relative.square().mean().sqrt()),
        rms_interval=None if rms is None else (math.sqrt(rms[0]), math.sqrt(rms[1])),
        max=float(relative.max()),
    )


def _to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
