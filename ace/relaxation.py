"""Attach relaxation terms to the layers of a model, look at them, and take them off again.

A relaxed layer computes f = f_eq + γ·f_neq. The term f_neq and its strength γ live in one child module of the
layer, ``layer.relaxation``; a forward hook adds them to the layer's output. Nothing of the model is replaced:
classes, state-dict keys and object identities stay.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ace.calls import Path, call, merge, tensors_in
from ace.errors import (
    AceError,
    AlreadyRelaxed,
    CheckpointMismatch,
    ConstraintNotMet,
    LayerNotCalled,
    NotRelaxed,
    ShapeMismatch,
)
from ace.groups import Group
from ace.planning import NAME, Layers, not_called, plan
from ace.probing import evaluating
from ace.terms import MAPS, Make, Positions, Select, low_rank

logger = logging.getLogger("ace")

Model = TypeVar("Model", bound=nn.Module)
POSITIONS = "relaxation_positions"
"""Name of the child module that the whole model gets where terms read the positions."""
SMALLEST_RATIO = 1e-6
"""Least ‖f_neq‖/‖f_eq‖ of a row that ``normalize`` still scales up fully."""


class Relaxation(nn.Module):
    r"""The relaxation of one layer: γ and f_neq in :math:`f = f_\mathrm{eq} + \gamma f_\mathrm{neq}`.

    Attributes:
        gamma: Relaxation strength γ, parameter of shape (1,), 1 at the start.
        term: The relaxation term f_neq, called with the layer's arguments.
        path: Path of the layer in the model.
        normalize: Whether each row of f_neq is scaled to the root mean square of f_eq's row, so that γ *is*
            the relative norm of the relaxation.
        retired: Whether the term has been taken out of the forward pass for good (γ = 0).
        in_graph: Whether it is computed all the same, at γ = 0, where gradients are wanted.
        called: Whether the layer ran since the term was attached.
        dual: The vector of multipliers that a problem posed on the model keeps, and this layer's place in it.
        strict: Layers of the model that were left strict, by path: class name and reason. Shared by all relaxations.
    """

    def __init__(self, path: str, term: nn.Module, gamma: Tensor, normalize: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma)
        self.term = term
        self.path = path
        self.normalize = normalize
        self.axes: Mapping[Path, tuple[int, ...]] = getattr(term, "feature_axes", {})
        self.retired = False
        self.in_graph = False
        self.called = False
        self.sizes: list[tuple[Tensor, Tensor, int]] | None = None
        self.dual: tuple[Tensor, int] | None = None
        self.strict: Mapping[str, tuple[str, str]] = {}

    def forward(self, stage: Any) -> Any:
        """Do nothing: a ``Sequential`` runs every child, so a child must be the identity."""
        return stage

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the layer: return f_eq + γ·f_neq."""
        del layer
        self.called = True
        # a compiled graph keeps retired terms, at γ = 0: to look at the switch would be to compile anew
        if not torch.compiler.is_compiling() and self.retired and not (self.in_graph and torch.is_grad_enabled()):
            return None
        return merge(output, self.term(*args, **kwargs), self._add)

    def _add(self, place: Path, output: Tensor, change: Tensor) -> Tensor:
        if change.shape != output.shape:
            raise ShapeMismatch(
                f"{self.path}: the term returns shape {tuple(change.shape)} for an output of shape "
                f"{tuple(output.shape)}"
            )
        if self.normalize:
            axes = self.axes.get(place, (-1,))
            norm = torch.linalg.vector_norm(change, dim=axes, keepdim=True)
            size = torch.linalg.vector_norm(output.detach(), dim=axes, keepdim=True)
            # a row of zeros has no direction: there the factor stays finite
            change = change * (size / torch.maximum(norm, SMALLEST_RATIO * size + torch.finfo(norm.dtype).tiny))
        if self.sizes is not None:
            # ‖f_neq‖² without γ, so that the derivative with respect to γ is known even at γ = 0
            exact = torch.promote_types(output.dtype, torch.float32)
            self.sizes.append(
                (change.to(exact).square().sum(), output.detach().to(exact).square().sum(), output.numel())
            )
        if output.dtype == change.dtype == self.gamma.dtype:
            return torch.addcmul(output, self.gamma, change)  # the line below in one pass over memory
        return output + (self.gamma * change).to(output.dtype)

    def retire(self, in_graph: bool = False) -> None:
        """Set γ to 0 and take the term out of the forward pass: from now on the layer costs what f_eq costs.

        Args:
            in_graph: Leave it in where gradients are wanted, for a wrapper that waits for those of every parameter.
        """
        with torch.no_grad():
            self.gamma.zero_()
        self.retired = True
        self.in_graph = in_graph

    def extra_repr(self) -> str:
        """Show γ in ``print(model)``."""
        return f"gamma={self.gamma.item():.3g}{', retired' if self.retired else ''}"


def relax(
    model: Model,
    layers: Layers | None = None,
    example: Any = None,
    *,
    exclude: Layers | None = None,
    term: str | Make = "linear",
    rank: int | None = None,
    normalize: bool = False,
    positions: Select | None = None,
    inputs: Mapping[int | str, str] | None = None,
    group: Group | None = None,
) -> Model:
    r"""Add a relaxation term to each chosen layer: f = f_eq + γ·f_neq, with γ = 1 at the start.

    The model stays the same object with the same state-dict keys; it gains parameters named
    ``<path>.relaxation.gamma`` and ``<path>.relaxation.term...``. Attach before ``torch.compile`` and before
    building the optimizer.

    With an example, ace runs the model on it and on a transformed copy. A term beside a layer that sees only
    invariant features would break no symmetry: it gets the positions as a second input, if the layer's rows are
    those of the positions. If they are not, or if no output of the model depends on the layer, the layer stays
    strict; ``ace.summary`` names such layers with the reason.

    Args:
        model: Any equivariant model.
        layers: Which layers: a type, a tuple of types, a regular expression searched in the module path, or a
            predicate ``(path, module) -> bool``. Default: the outermost layers of registered types; in a model
            that has none, the outermost layers that a dense term fits, found by running the example.
        example: What the model is called with: a tuple of positional arguments, a dict of keyword arguments,
            or one object. Needed where a term's sizes are read off the layer's input and output.
        exclude: Layers to leave strict, chosen in the same ways.
        term: The map inside a term: ``"linear"``, ``"mlp"``, ``"spectral"`` (linear, operator norm 1), or a
            function (features in, features out) -> module.
        rank: Largest rank of a linear term: two thin layers instead of one full matrix. Default: full, but 32 where
            a full matrix had more than 2¹⁷ weights.
        normalize: Scale each row of f_neq to the size of f_eq's row, so that γ is the relative norm of the
            relaxation and a tolerance on it means something. (A row of f_neq below 1e-6 of f_eq's stays smaller.)
        positions: Positions as a second input of all terms: an argument index or keyword of the model, an
            attribute of its input, or a function of its inputs that returns a tensor of shape (rows, d). Needs
            ``example``. Default: found by name or shape, and read only beside invariant layers.
        inputs: Types of the model's inputs by argument position, argument name, key or attribute, as in
            ``ace.equivariance_error``, where their names and shapes do not tell.
        group: Symmetry of the model, an element of which transforms the example. Needs ``example``. Default:
            rotations of space or of the plane, for images quarter turns. To be told for a model that is symmetric
            under a part of these only, say ``ace.SO2()`` where the vertical is built in: to all of them even its
            invariant features look as if they moved.

    Returns:
        The same model.

    Raises:
        AlreadyRelaxed: The model carries terms already.
        NoLayerMatched: No layer was chosen, or none can carry a term; the message lists what was tried.
        NotAttachable: Some layers named by ``layers`` cannot carry a term that acts; all are listed with the reason.
        LayerNotCalled: The example does not run some chosen layers through ``__call__``.
        AceError: The model is wrapped in ``DistributedDataParallel`` or sharded already; ``inputs`` names no input;
            ``group`` moves none.

    Example:
        >>> import torch, ace
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> relaxed = ace.relax(model, layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> relaxed is model, list(ace.relaxations(relaxed))
        (True, ['0', '2'])
    """
    if relaxations(model):
        raise AlreadyRelaxed(
            f"the model already has relaxation terms at {', '.join(relaxations(model))}: call ace.restore(model) first"
        )
    if isinstance(model, DistributedDataParallel) or any(hasattr(p, "full_tensor") for p in model.parameters()):
        raise AceError(
            "the model is divided over processes already, which would not know of the terms: call ace.relax first, "
            "then DistributedDataParallel or fully_shard"
        )
    if isinstance(term, str) and term not in MAPS:
        raise AceError(f"unknown term {term!r}: choose one of {', '.join(map(repr, MAPS))}, or pass a function")
    if rank is not None and (term != "linear" or rank < 1):
        raise AceError(f"rank={rank!r} with term={term!r}: a rank is a number >= 1, and only linear terms have one")
    if positions is not None and example is None:
        raise AceError("positions= needs example=, which shows the layers whose rows are those of the positions")
    if group is not None and example is None:
        raise AceError("group= needs example=, on which terms are tried: pass example=batch")
    make = low_rank(rank) if rank is not None else MAPS[term] if isinstance(term, str) else term
    planned = plan(model, layers, exclude, example, make, positions, inputs, group)
    modules = dict(model.named_modules())
    strict = {path: (type(modules[path]).__name__, reason) for path, reason in planned.strict.items()}
    for path, term_ in planned.terms.items():
        layer = modules[path]
        relaxation = Relaxation(path, term_, planned.gammas[path], normalize)
        relaxation.strict = strict
        relaxation.train(layer.training)
        layer.add_module(NAME, relaxation)
        layer.register_forward_hook(relaxation.hook, with_kwargs=True)
        _mark(layer)
    if planned.positions is not None:
        planned.positions.value = None
        model.add_module(POSITIONS, planned.positions)
        model.register_forward_pre_hook(planned.positions.capture, with_kwargs=True)
        model.register_forward_hook(planned.positions.follow)
        _mark(model)
    return model


def relaxations(model: nn.Module) -> dict[str, Relaxation]:
    """Return the relaxations of a model by the path of their layer, in module order.

    Args:
        model: A model, relaxed or not; may be wrapped (``DistributedDataParallel``, ``torch.compile``).

    Returns:
        Path of the layer, without the wrapper's prefix, to its ``Relaxation``.

    Example:
        >>> import torch, ace
        >>> ace.relaxations(torch.nn.Linear(2, 2))
        {}
    """
    return {module.path: module for module in model.modules() if isinstance(module, Relaxation)}


@contextmanager
def restored(model: nn.Module, recalibrate: Iterable[Any] | None = None) -> Iterator[None]:
    """Evaluate a relaxed model as ``restore`` would ship it: every γ acts as 0 inside the context.

    Args:
        model: A relaxed model.
        recalibrate: Batches on which BatchNorm statistics are re-estimated for the while, as in ``restore``.

    Yields:
        Nothing.

    Example:
        >>> import torch, ace
        >>> x = torch.randn(5, 3)
        >>> layer = torch.nn.Linear(3, 3)
        >>> plain = layer(x)
        >>> relaxed = ace.relax(layer, layers=torch.nn.Linear, example=x)
        >>> with ace.restored(relaxed):
        ...     torch.equal(relaxed(x), plain)
        True
    """
    gammas = [relaxation.gamma for relaxation in relaxations(model).values()]
    before = [gamma.detach().clone() for gamma in gammas]
    with torch.no_grad():
        for gamma in gammas:
            gamma.zero_()
    statistics = {buffer: buffer.clone() for norm in _norms(model) for buffer in norm.buffers(recurse=False)}
    try:
        if recalibrate is not None:
            _recalibrate(model, recalibrate)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in [*zip(gammas, before, strict=True), *statistics.items()]:
                tensor.copy_(value)


def restore(relaxed: Model, example: Any = None, recalibrate: Iterable[Any] | None = None) -> Model:
    r"""Take the relaxation terms off: the model you started with, bitwise the output of γ = 0.

    Reports (logger ``ace``) what removing the terms changed, and warns when γ was not 0.

    Args:
        relaxed: A model that ``relax`` returned.
        example: If given, the projection gap on it is measured and reported.
        recalibrate: Batches, each in the form of ``example``, on which BatchNorm statistics are re-estimated
            after the terms are off; those gathered under the relaxed forward pass are wrong for the restored
            model.

    Returns:
        The same object, without any trace of the relaxation.

    Raises:
        NotRelaxed: The model carries no terms.

    Warns:
        ConstraintNotMet: Some γ was not 0, so that the restored model differs from the relaxed one.

    Example:
        >>> import torch, ace
        >>> model = torch.nn.Linear(3, 3)
        >>> relaxed = ace.relax(model, layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> with torch.no_grad():
        ...     _ = relaxed.relaxation.gamma.zero_()
        >>> ace.restore(relaxed) is model, list(model.state_dict())
        (True, ['weight', 'bias'])
    """
    attached = _require(relaxed)
    worst = max(attached, key=lambda path: attached[path].gamma.abs().item())
    largest = attached[worst].gamma.abs().item()
    gap = projection_gap(relaxed, example) if example is not None else (0.0 if largest == 0.0 else None)
    for layer in list(relaxed.modules()):
        for name, kind in ((NAME, Relaxation), (POSITIONS, Positions)):
            if name in layer._modules and isinstance(layer._modules[name], kind):
                _detach(layer, name)
    measured = "not measured (pass example= to measure it)" if gap is None else f"{gap:.3g}"
    logger.info("restored %d layers: max |γ| %.3g, projection gap %s", len(attached), largest, measured)
    if largest > 0.0:
        warnings.warn(
            f"max |γ| was {largest:.3g} at {worst!r} when the terms were removed; projection gap {measured}: the "
            "restored model is not the one that was trained. Train longer, or keep the relaxed model and report "
            "its equivariance error",
            ConstraintNotMet,
            stacklevel=2,
        )
    if recalibrate is not None:
        _recalibrate(relaxed, recalibrate)
    return relaxed


def projection_gap(relaxed: nn.Module, example: Any) -> float:
    r"""Relative change of the output when the terms are removed.

    .. math:: \|f_\gamma(x) - f_0(x)\| \,/\, \|f_0(x)\|

    Args:
        relaxed: A relaxed model.
        example: What it is called with.

    Returns:
        The gap, over all floating-point outputs together; 0 where both norms vanish.

    Raises:
        NotRelaxed: The model carries no terms.

    Example:
        >>> import torch, ace
        >>> x = torch.randn(5, 3)
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=x)
        >>> ace.projection_gap(relaxed, x) > 0
        True
    """
    _require(relaxed)
    with evaluating(relaxed):
        with_terms = _flatten(call(relaxed, example))
        with restored(relaxed):
            without = _flatten(call(relaxed, example))
    change = torch.linalg.vector_norm(with_terms - without).item()
    return change / torch.linalg.vector_norm(without).item() if change else 0.0


def base_state_dict(relaxed: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model inside a relaxed one: the original keys only.

    Args:
        relaxed: A relaxed model.

    Returns:
        What ``restore(relaxed).state_dict()`` would be; tensors are shared with the model.

    Example:
        >>> import torch, ace
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> list(ace.base_state_dict(relaxed))
        ['weight', 'bias']
    """
    ours = tuple(f"{path}." for path, module in relaxed.named_modules() if isinstance(module, Relaxation))
    return {key: value for key, value in relaxed.state_dict().items() if not key.startswith(ours)}


def load_base_state_dict(relaxed: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state dict of the plain model into a relaxed one: the way back of ``base_state_dict``.

    γ and the terms stay as they are.

    Args:
        relaxed: A relaxed model.
        state: State dict of the plain model.

    Raises:
        CheckpointMismatch: A key is missing or unexpected, or a shape differs; nothing was loaded.

    Example:
        >>> import torch, ace
        >>> state = torch.nn.Linear(3, 3).state_dict()
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> ace.load_base_state_dict(relaxed, state)
        >>> torch.equal(relaxed.weight, state["weight"])
        True
    """
    own = base_state_dict(relaxed)
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, here {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and isinstance(value, Tensor) and value.shape != state[key].shape
    ]
    if problems:
        raise CheckpointMismatch(f"the state belongs to another model, nothing was loaded: {'; '.join(problems)}")
    relaxed.load_state_dict({**relaxed.state_dict(), **state})


@dataclass(frozen=True)
class LayerStatus:
    """One row of ``summary``: a layer that was relaxed, or one that stayed strict.

    Attributes:
        path: Path of the layer in the model.
        type: Its class name.
        gamma: Relaxation strength γ, or None for a strict layer.
        ratio: ‖γ f_neq‖ / ‖f_eq‖ on the example, or None without an example.
        multiplier: Lagrange multiplier λ, or None before a ``Problem`` was posed.
        status: ``relaxed``, ``met`` (γ = 0), ``retired``, ``not called yet``, or ``strict:`` with the reason.
    """

    path: str
    type: str
    gamma: float | None
    ratio: float | None
    multiplier: float | None
    status: str


class Summary(tuple[LayerStatus, ...]):
    """The rows of ``summary``; prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = ("layer", "type", "γ", "‖γ f_neq‖/‖f_eq‖", "λ", "status")
        cells = [
            (row.path, row.type, *map(_number, (row.gamma, row.ratio, row.multiplier)), row.status) for row in self
        ]
        widths = [max(len(line[column]) for line in [head, *cells]) for column in range(len(head))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [head, *cells]
        ]
        return "\n".join(line.rstrip() for line in lines)


def summary(relaxed: nn.Module, example: Any = None) -> Summary:
    """Describe each layer: path, type, γ, relative size of the relaxation, multiplier, status.

    Relaxed layers come first, then those that could have had a term but stay strict, with the reason.

    Args:
        relaxed: A relaxed model.
        example: If given, the model is run on it to measure ‖γ f_neq‖/‖f_eq‖.

    Returns:
        A tuple of ``LayerStatus``; ``print`` shows it as a table.

    Raises:
        NotRelaxed: The model carries no terms.

    Example:
        >>> import torch, ace
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> print(ace.summary(relaxed))
        layer   type    γ  ‖γ f_neq‖/‖f_eq‖  λ  status
        (root)  Linear  1  –                 –  not called yet
    """
    attached = _require(relaxed)
    ratios: list[float | None] = [None] * len(attached)
    if example is not None:
        with evaluating(relaxed), measuring(attached.values()) as sizes:
            call(relaxed, example)
            ratios = [
                relaxation.gamma.abs().item() * (neq / eq).sqrt().item() if eq else None
                for relaxation, (neq, eq, _) in zip(attached.values(), sizes(), strict=True)
            ]
    parents = {id(layer._modules[NAME]): layer for layer in relaxed.modules() if NAME in layer._modules}
    rows = [
        LayerStatus(
            path or "(root)",
            type(parents[id(relaxation)]).__name__,
            relaxation.gamma.item(),
            ratio,
            None if relaxation.dual is None else relaxation.dual[0][relaxation.dual[1]].item(),
            _status(relaxation),
        )
        for (path, relaxation), ratio in zip(attached.items(), ratios, strict=True)
    ]
    rows += [
        LayerStatus(path or "(root)", kind, None, None, None, f"strict: {reason}")
        for path, (kind, reason) in next(iter(attached.values())).strict.items()
    ]
    return Summary(rows)


@contextmanager
def measuring(
    attached: Iterable[Relaxation],
) -> Iterator[Callable[[], list[tuple[Tensor, Tensor, int]]]]:
    """Measure the relaxation terms in the forward passes inside the context.

    Args:
        attached: The relaxations to measure.

    Yields:
        A function that returns, for each relaxation, ‖f_neq‖² (with its graph; without γ), ‖f_eq‖² and the
        number of entries, summed over the calls so far.
    """
    attached = list(attached)
    for relaxation in attached:
        relaxation.sizes = []

    def totals() -> list[tuple[Tensor, Tensor, int]]:
        zero = [relaxation.gamma.new_zeros(()) for relaxation in attached]
        return [
            (
                sum((n for n, _, _ in r.sizes or []), z),
                sum((e for _, e, _ in r.sizes or []), z),
                sum(c for *_, c in r.sizes or []),
            )
            for r, z in zip(attached, zero, strict=True)
        ]

    try:
        yield totals
    finally:
        for relaxation in attached:
            relaxation.sizes = None


def check_called(model: nn.Module) -> None:
    """Raise ``LayerNotCalled`` if the model ran but some relaxed layers did not.

    Args:
        model: A relaxed model after a forward pass.

    Raises:
        LayerNotCalled: A layer is run through another method than ``__call__``, or not at all.
    """
    silent = [path for path, relaxation in relaxations(model).items() if not relaxation.called]
    if silent:
        raise LayerNotCalled(not_called(silent))


def _require(model: nn.Module) -> dict[str, Relaxation]:
    attached = relaxations(model)
    if not attached:
        raise NotRelaxed("the model carries no relaxation terms: call ace.relax(model, ...) first")
    return attached


def _mark(layer: nn.Module) -> None:
    """Keep the compiler from running a layer with hooks by the code of one without.

    Code that was compiled for one model serves all that pass its guards. They look at no hooks, so that a relaxed copy
    of a compiled model would silently run without its terms; but they do look for a ``forward`` of the instance.
    """
    if not isinstance(layer, torch.jit.ScriptModule | torch.fx.GraphModule):  # these replace their own
        layer.__dict__.setdefault("forward", layer.forward)


def _detach(layer: nn.Module, name: str) -> None:
    """Remove a child module, the hooks that are its bound methods, and the mark."""
    child = getattr(layer, name)
    for hooks, flags in (
        (layer._forward_hooks, (layer._forward_hooks_with_kwargs, layer._forward_hooks_always_called)),
        (layer._forward_pre_hooks, (layer._forward_pre_hooks_with_kwargs,)),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is child]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)
    delattr(layer, name)
    if getattr(layer.__dict__.get("forward"), "__func__", None) is type(layer).forward:
        del layer.__dict__["forward"]


@torch.no_grad()
def _recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate running statistics as the plain average over the batches, whatever the class of BatchNorm."""
    norms = _norms(model)
    if not norms:
        return
    with evaluating(model):
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
        try:
            for count, batch in enumerate(batches, start=1):
                for norm in norms:
                    norm.momentum = 1.0 / count  # type: ignore[assignment]
                call(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "running_mean") and isinstance(getattr(module, "momentum", None), float | None)
    ]


def _flatten(output: Any) -> Tensor:
    """Concatenate all floating-point entries of an output."""
    return torch.cat([tensor.detach().reshape(-1) for _, tensor in tensors_in(output) if tensor.is_floating_point()])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.3g}"  # no -0


def _status(relaxation: Relaxation) -> str:
    if relaxation.retired:
        return "retired"
    if not relaxation.called:
        return "not called yet"
    return "met" if relaxation.gamma.item() == 0.0 else "relaxed"
