"""How far a model is from equivariant: over sampled group elements, and over the Lie algebra."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ace.calls import call, map_tensors, parts_of
from ace.errors import AceError, ShapeMismatch
from ace.groups import TYPES, Element, Generator, Group, Permutations, act, act_generator, finding, jvp
from ace.inputs import TYPE_OF_NAME, UNMOVED, Input, model_inputs, unused_names, with_inputs
from ace.probing import evaluating, same_randomness
from ace.terms import load_hosts

Types = str | Sequence[Any] | Mapping[str, Any] | None


@dataclass(frozen=True)
class ErrorReport:
    """Relative errors over group elements or generators; ``float(report)`` is their mean.

    Attributes:
        mean: Mean over the elements.
        max: Largest over the elements.
        elements: Number of elements (or generators).
        group: Name of the group.
        quantity: What was measured.
        samples: One error per element.

    Example:
        >>> print(ErrorReport(1e-7, 3e-7, 8, "SO(3)"))
        equivariance error: mean 1.0e-07, max 3.0e-07 (8 elements of SO(3))
    """

    mean: float
    max: float
    elements: int
    group: str
    quantity: str = "equivariance error"
    samples: tuple[float, ...] = ()

    def __float__(self) -> float:
        return self.mean

    def __str__(self) -> str:
        kind = "element" if self.quantity == "equivariance error" else "generator"
        plural = "" if self.elements == 1 else "s"
        return (
            f"{self.quantity}: mean {self.mean:.1e}, max {self.max:.1e} "
            f"({self.elements} {kind}{plural} of {self.group})"
        )


def equivariance_error(
    model: Callable[..., Any],
    batch: Any,
    group: Group,
    *,
    inputs: Mapping[int | str, str] | None = None,
    outputs: Types = None,
    elements: int = 8,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> ErrorReport:
    r"""Relative equivariance error of a model on a batch, over sampled group elements.

    .. math:: \frac{\lVert f(g\,x) - g\,f(x) \rVert}{\lVert f(x) \rVert}

    Norms are over the whole batch. With several outputs each has its own relative error, and the
    worst one counts. The model runs in eval mode with the random state fixed; its training flags and
    the random state are put back. Gradients stay enabled, since models of conservative forces
    differentiate inside their forward; wrap the call in ``torch.no_grad()`` to save memory.

    In float32 an equivariant model shows a rounding floor of 1e-7 to 1e-5; pass ``dtype=torch.float64``
    to tell rounding from a broken symmetry.

    Args:
        model: Module or function.
        batch: A tuple of positional arguments, a dict of keyword arguments, one tensor, or a PyG ``Data``.
        group: The group, e.g. ``SO3()``.
        inputs: Type by argument position, argument name or ``Data`` attribute; see `ace.groups`. Others
            go by name: pos, positions, coords, loc are positions; vel, velocity, velocities, force,
            forces vectors; edge_attr, edge_weight, ptr, y invariant; the rest is scalar.
        outputs: Type of the output, or types in a tuple (``None`` leaves one out) or a dict (keys that are
            not named are left out). Without it, dict outputs go by name, tensors whose last axis is
            too small for a vector are scalar, and other outputs are refused; under `Permutations` an
            output is scalar if it has the nodes on its node axis, else invariant.
        elements: Number of sampled elements.
        seed: Seed of the sampled elements.
        dtype: Run a copy of the model in this dtype.

    Returns:
        Mean and maximum over the elements.

    Raises:
        AceError: Types are missing, unknown or do not fit; every problem is listed.
        ShapeMismatch: The output's shape depends on the group element.

    Example:
        >>> from ace.groups import O3
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> norms = lambda x: x.norm(dim=-1, keepdim=True)
        >>> float(equivariance_error(norms, x, O3(), inputs={0: "vector"})) < 1e-6
        True
        >>> float(equivariance_error(torch.relu, x, O3(), inputs={0: "vector"}, outputs="vector")) > 0.1
        True
    """
    if elements < 1:
        raise AceError(f"elements must be at least 1; found {elements}")
    with _evaluating(model, batch, dtype) as (run, batch):
        arguments, problems = _arguments(model, batch, group, inputs)
        nodes = _nodes(arguments) if isinstance(group, Permutations) else None
        if isinstance(group, Permutations) and nodes is None:
            problems.append("no input has a node axis to permute")
            _refuse(model, group, problems)
        sample = group.sample(elements, seed, nodes=nodes)
        reference = run(with_inputs(batch, {}))
        leaves = typed_outputs(model, group, sample[0], arguments, reference, outputs, problems, nodes)

        samples = []
        for element in sample:
            moved = {argument.path: act(element, argument.value, argument.kind) for argument in arguments}
            output = run(with_inputs(batch, moved))
            errors = []
            for (label, before, kind), (_, after, _) in zip(leaves, output_leaves(output, outputs), strict=True):
                expected = act(element, before.detach(), kind)
                errors.append(_relative(label, after.detach(), expected, before.detach()))
            samples.append(torch.stack(errors).max())
    return _report(samples, str(group), "equivariance error")


def lie_derivative(
    model: Callable[..., Any],
    batch: Any,
    group: Group,
    *,
    inputs: Mapping[int | str, str] | None = None,
    outputs: Types = None,
    dtype: torch.dtype | None = None,
) -> ErrorReport:
    r"""Relative Lie derivative of a model on a batch, over the generators of a continuous group.

    .. math:: \frac{\lVert Df(x)[X x] - X f(x) \rVert}{\lVert f(x) \rVert}

    It is zero for every generator X exactly when f is equivariant to the connected part of the group
    near x (Gruver et al., "The Lie derivative for measuring learned equivariance", 2023). The
    derivative is taken in forward mode, without finite differences. Rotations are by radian,
    translations by unit of length. One number per generator, where the worst output counts.

    Args:
        model: As in `equivariance_error`.
        batch: As in `equivariance_error`.
        group: A group with generators: SO2, SO3, O3 or E3.
        inputs: As in `equivariance_error`.
        outputs: As in `equivariance_error`.
        dtype: Run a copy of the model in this dtype.

    Returns:
        Mean and maximum over the generators.

    Raises:
        AceError: The group is finite; or types are missing, unknown or do not fit.

    Example:
        >>> from ace.groups import SO3
        >>> x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
        >>> cross = lambda x: torch.linalg.cross(x, x.roll(1, dims=0))
        >>> float(lie_derivative(cross, x, SO3(), inputs={0: "vector"}, outputs="vector")) < 1e-6
        True
    """
    generators = group.generators()
    if not generators:
        raise AceError(f"{group} is finite and has no Lie derivative: use equivariance_error")
    with _evaluating(model, batch, dtype) as (run, batch):
        arguments, problems = _arguments(model, batch, group, inputs)
        reference = run(with_inputs(batch, {}))
        leaves = typed_outputs(model, group, generators[0], arguments, reference, outputs, problems, None)
        moving = [argument for argument in arguments if argument.kind not in UNMOVED]
        primals = tuple(argument.value for argument in moving)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            new = {argument.path: tensor for argument, tensor in zip(moving, tensors, strict=True)}
            output = run(with_inputs(batch, new))
            return tuple(tensor for _, tensor, _ in output_leaves(output, outputs))

        samples = []
        for generator in generators:
            tangents = tuple(act_generator(generator, argument.value, argument.kind) for argument in moving)
            slopes = jvp(function, primals, tangents)
            errors = [
                _relative(label, slope.detach(), act_generator(generator, value.detach(), kind), value.detach())
                for (label, value, kind), slope in zip(leaves, slopes, strict=True)
            ]
            samples.append(torch.stack(errors).max())
    return _report(samples, str(group), "Lie derivative")


@contextmanager
def _evaluating(
    model: Callable[..., Any], batch: Any, dtype: torch.dtype | None
) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Give a function that runs the model in eval mode with a fixed random state, and the batch in its dtype."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    load_hosts()  # a batch may be of a class that a library's rules know
    if dtype is not None and isinstance(model, torch.nn.Module):
        model = copy.deepcopy(model).to(dtype)

    def run(example: Any) -> Any:
        with same_randomness():  # a model that draws must draw the same for x and for g x
            return call(model, example)

    with evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext():
        yield run, map_tensors(cast, batch)


def _arguments(
    model: Callable[..., Any], batch: Any, group: Group, inputs: Mapping[int | str, str] | None
) -> tuple[list[Input], list[str]]:
    """The tensors in the batch with their types, and what is wrong with ``inputs``."""
    arguments = model_inputs(model, batch, inputs)
    found = ", ".join(f"{a.name} ({a.kind}, shape {tuple(a.value.shape)})" for a in arguments)
    problems = [f"inputs names {key!r}, but the inputs are: {found}" for key in unused_names(model, batch, inputs)]
    if not arguments:
        problems.append(
            f"no tensor found in a batch of type {type(batch).__name__}: pass a tuple, a dict, a tensor or a PyG Data"
        )
        _refuse(model, group, problems)
    still = ("invariant",) if isinstance(group, Permutations) else UNMOVED
    if all(argument.kind in still for argument in arguments):
        problems.append(
            f"{group} moves none of the inputs {found}: pass inputs= with their types, "
            f"e.g. inputs={{{arguments[0].name!r}: 'vector'}} (types: {', '.join(TYPES)}, e3nn irreps)"
        )
    return arguments, problems


def typed_outputs(
    model: Callable[..., Any],
    group: Group,
    motion: Element | Generator,
    arguments: list[Input],
    reference: Any,
    outputs: Types,
    problems: list[str],
    nodes: int | None,
) -> list[tuple[str, Tensor, str]]:
    """Output tensors with their types; refuse if any type of an input or output is missing or wrong."""
    found = [(argument.name, finding(motion, argument.value, argument.kind)) for argument in arguments]
    problems += [f"input {name}: {problem}" for name, problem in dict.fromkeys(found) if problem]
    leaves = []
    for label, tensor, kind in output_leaves(reference, outputs, problems):
        kind = kind or _inferred(motion, tensor, nodes)
        if kind is None:
            problems.append(
                f"{label} of shape {tuple(tensor.shape)} could be of several types: pass outputs=, "
                "e.g. 'scalar', 'vector', 'position' or e3nn irreps"
            )
        elif problem := finding(motion, tensor, kind):
            problems.append(f"{label}: {problem}")
        else:
            leaves.append((label, tensor, kind))
    if not leaves and not problems:
        problems.append("no output is left to compare")
    _refuse(model, group, problems)
    return leaves


def _refuse(model: Callable[..., Any], group: Group, problems: list[str]) -> None:
    if problems:
        name = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", "model")
        listing = "".join(f"\n  - {problem}" for problem in problems)
        raise AceError(f"cannot measure how {name} transforms under {group}:{listing}")


def _inferred(motion: Element | Generator, tensor: Tensor, nodes: int | None) -> str | None:
    """Type of an output that nobody named, if only one is possible."""
    if nodes is not None:
        per_node = tensor.ndim > 0 and tensor.shape[max(tensor.ndim - 2, 0)] == nodes
        return "scalar" if per_node else "invariant"
    smallest_vector = 3 if motion.plane is None else 2
    if tensor.ndim == 0 or (tensor.ndim > 1 and tensor.shape[-1] < smallest_vector):
        return "scalar"
    return None


def output_leaves(
    output: Any, outputs: Types, problems: list[str] | None = None, label: str = "the output"
) -> list[tuple[str, Tensor, Any]]:
    """Tensors of a nested output that are to be compared, each with its type (``None``: not given)."""
    problems = [] if problems is None else problems
    if isinstance(output, Tensor):
        if outputs is None or isinstance(outputs, str):
            return [(label, output, outputs)]
        problems.append(f"{label} is a tensor, but outputs= has a {type(outputs).__name__} of types for it")
        return []
    if parts_of(output) is not None and not isinstance(output, tuple | list):
        output = parts_of(output) or {}
        if isinstance(outputs, Mapping):
            missing = [key for key in outputs if key not in output]
            problems += [f"outputs names {key!r}, but {label} has the keys {list(output)}" for key in missing]
            pairs = [(key, outputs[key]) for key in outputs if key in output and outputs[key] is not None]
        elif outputs is None or isinstance(outputs, str):
            pairs = [(key, outputs or TYPE_OF_NAME.get(key)) for key in output if output[key] is not None]
        else:
            problems.append(f"{label} is a dict with the keys {list(output)}: pass outputs= as a dict too")
            return []
        return [leaf for key, kinds in pairs for leaf in output_leaves(output[key], kinds, problems, f"output {key!r}")]
    if isinstance(output, (tuple, list)):
        kinds = [outputs] * len(output) if outputs is None or isinstance(outputs, str) else outputs
        if isinstance(kinds, Mapping) or len(kinds) != len(output):
            problems.append(f"{label} has {len(output)} parts: pass outputs= as a tuple of as many types")
            return []
        return [
            leaf
            for number, (part, kind) in enumerate(zip(output, kinds, strict=True))
            if part is not None and (outputs is None or kind is not None)
            for leaf in output_leaves(part, kind, problems, f"output {number}")
        ]
    problems.append(f"{label} is a {type(output).__name__}: only tensors and containers of them can be compared")
    return []


def _nodes(arguments: list[Input]) -> int | None:
    """Number of nodes: the commonest size of the node axis."""
    sizes = [
        argument.value.shape[max(argument.value.ndim - 2, 0)]
        for argument in arguments
        if argument.kind not in ("invariant", "edge_index", "image", "vector_image") and argument.value.ndim > 0
    ]
    return Counter(sizes).most_common(1)[0][0] if sizes else None


def _relative(label: str, found: Tensor, expected: Tensor, reference: Tensor) -> Tensor:
    """‖found - expected‖ / ‖reference‖ in float64; 0/0 is 0."""
    if found.shape != expected.shape:
        raise ShapeMismatch(
            f"{label} has shape {tuple(found.shape)} on the transformed batch where {tuple(expected.shape)} "
            "is expected: its shape must not depend on the group element"
        )
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    norm = torch.linalg.vector_norm(reference.double())
    return torch.where(difference == 0, difference, difference / norm)


def _report(samples: list[Tensor], group: str, quantity: str) -> ErrorReport:
    errors = torch.stack(samples)
    return ErrorReport(
        mean=float(errors.mean()),
        max=float(errors.max()),
        elements=len(samples),
        group=group,
        quantity=quantity,
        samples=tuple(errors.tolist()),
    )
