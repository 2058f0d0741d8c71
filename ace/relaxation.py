"""Attach relaxation terms to the layers of a model, look at them, and take them off again.

A relaxed layer computes f = f_eq + γ·f_neq. The term f_neq and its strength γ live in one child module of the
layer, ``layer.relaxation``; a forward hook adds them to the layer's output. Nothing of the model is replaced:
classes, state-dict keys and object identities stay.
"""

from __future__ import annotations

import difflib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ace.calls import call
from ace.errors import (
    AceError,
    AlreadyRelaxed,
    ConstraintNotMet,
    LayerNotCalled,
    NoLayerMatched,
    NotAttachable,
    NotRelaxed,
    ShapeMismatch,
)
from ace.terms import (
    MAPS,
    Call,
    Make,
    Positions,
    Site,
    TermFactory,
    generic_term,
    registered_factory,
    registered_types,
    select_argument,
)

logger = logging.getLogger("ace")

Model = TypeVar("Model", bound=nn.Module)
Layers = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]
"""How layers are chosen: a type, a tuple of types, a regular expression searched in the path, or a predicate."""

NAME = "relaxation"
"""Name of the child module that a relaxed layer gets."""
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
        called: Whether the layer ran since the term was attached.
        dual: The vector of multipliers that a problem posed on the model keeps, and this layer's place in it.
    """

    def __init__(self, path: str, term: nn.Module, like: Tensor, normalize: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, dtype=like.dtype, device=like.device))
        self.term = term.to(dtype=like.dtype, device=like.device)
        self.path = path
        self.normalize = normalize
        self.retired = False
        self.called = False
        self.sizes: list[tuple[Tensor, Tensor, int]] | None = None
        self.dual: tuple[Tensor, int] | None = None

    def forward(self, stage: Any) -> Any:
        """Do nothing: a ``Sequential`` runs every child, so a child must be the identity."""
        return stage

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the layer: return f_eq + γ·f_neq."""
        del layer
        self.called = True
        if self.retired:
            return None
        return self._add(output, self.term(*args, **kwargs))

    def _add(self, output: Any, change: Any) -> Any:
        if isinstance(output, Tensor) and isinstance(change, Tensor):
            return self._add_tensor(output, change)
        parts = change if isinstance(change, Mapping) else dict(enumerate(change))
        if isinstance(output, Mapping):
            changed = {k: v if parts.get(k) is None else self._add(v, parts[k]) for k, v in output.items()}
            return changed if type(output) is dict else type(output)(changed)  # type: ignore[call-arg]
        new = [v if parts.get(k) is None else self._add(v, parts[k]) for k, v in enumerate(output)]
        return type(output)(*new) if hasattr(output, "_fields") else type(output)(new)

    def _add_tensor(self, output: Tensor, change: Tensor) -> Tensor:
        if change.shape != output.shape:
            raise ShapeMismatch(
                f"{self.path}: the term returns shape {tuple(change.shape)} for an output of shape "
                f"{tuple(output.shape)}"
            )
        if self.normalize:
            norm = torch.linalg.vector_norm(change, dim=-1, keepdim=True)
            size = torch.linalg.vector_norm(output.detach(), dim=-1, keepdim=True)
            # a row of zeros has no direction: there the factor stays finite
            change = change * (size / torch.maximum(norm, SMALLEST_RATIO * size + torch.finfo(norm.dtype).tiny))
        if self.sizes is not None:
            # ‖f_neq‖² without γ, so that the derivative with respect to γ is known even at γ = 0
            exact = torch.promote_types(output.dtype, torch.float32)
            self.sizes.append(
                (change.to(exact).square().sum(), output.detach().to(exact).square().sum(), output.numel())
            )
        return output + (self.gamma * change).to(output.dtype)

    def retire(self) -> None:
        """Set γ to 0 and take the term out of the forward pass: from now on the layer costs what f_eq costs."""
        with torch.no_grad():
            self.gamma.zero_()
        self.retired = True

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
    normalize: bool = False,
    positions: str | int | Callable[..., Tensor] | None = None,
) -> Model:
    r"""Add a relaxation term to each chosen layer: f = f_eq + γ·f_neq, with γ = 1 at the start.

    The model stays the same object with the same state-dict keys; it gains parameters named
    ``<path>.relaxation.gamma`` and ``<path>.relaxation.term...``. Attach before ``torch.compile`` and before
    building the optimizer.

    Args:
        model: Any equivariant model.
        layers: Which layers: a type, a tuple of types, a regular expression searched in the module path, or a
            predicate ``(path, module) -> bool``. Default: every layer whose type has a registered term.
        example: What the model is called with: a tuple of positional arguments, a dict of keyword arguments,
            or one object. Needed where a term's sizes are read off the layer's input and output.
        exclude: Layers to leave strict, chosen in the same ways.
        term: The map inside a term: ``"linear"``, ``"mlp"``, ``"spectral"`` (linear, operator norm 1), or a
            function (features in, features out) -> module.
        normalize: Scale each row of f_neq to the size of f_eq's row, so that γ is the relative norm of the
            relaxation and a tolerance on it means something. (A row of f_neq below 1e-6 of f_eq's stays smaller.)
        positions: Positions as a second input of the terms: an argument index or keyword of the model, an
            attribute of its input, or a function of its inputs that returns a tensor of shape (rows, d). For
            layers that see only invariant features. Needs ``example``.

    Returns:
        The same model.

    Raises:
        AlreadyRelaxed: The model carries terms already.
        NoLayerMatched: No layer was chosen; the message lists the nearest types.
        NotAttachable: Some chosen layers cannot carry a term; all are listed with the reason.
        LayerNotCalled: The example does not run some chosen layers through ``__call__``.

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
    if isinstance(term, str) and term not in MAPS:
        raise AceError(f"unknown term {term!r}: choose one of {', '.join(map(repr, MAPS))}, or pass a function")
    if positions is not None and example is None:
        raise AceError("positions= needs example=, which shows the layers whose rows are those of the positions")
    make = MAPS[term] if isinstance(term, str) else term
    chosen = _choose(model, layers, exclude)
    calls = _record(model, chosen, example) if example is not None else {}
    captured = _capture(positions, example) if positions is not None else None

    terms: dict[str, nn.Module] = {}
    problems: list[str] = []
    for path, layer in chosen.items():
        factory: TermFactory = registered_factory(layer) or generic_term
        if isinstance(layer, torch.jit.ScriptModule):
            problems.append(f"{path}: a scripted module takes no hooks; relax before scripting")
            continue
        if hasattr(layer, NAME):
            problems.append(f"{path or '(root)'} ({type(layer).__name__}): it has an attribute {NAME!r} of its own")
            continue
        try:
            terms[path] = factory(Site(path, layer, calls.get(path), make, captured))
        except NotAttachable as problem:
            problems.append(f"{path} ({type(layer).__name__}): {problem}")
    if problems:
        raise NotAttachable(
            "no relaxation term fits these layers, so nothing was changed:\n  "
            + "\n  ".join(problems)
            + "\nleave them strict with exclude=, or choose other layers"
        )

    for path, layer in chosen.items():
        relaxation = Relaxation(path, terms[path], _like(layer, model, calls.get(path)), normalize)
        relaxation.train(layer.training)
        layer.add_module(NAME, relaxation)
        layer.register_forward_hook(relaxation.hook, with_kwargs=True)
    if captured is not None:
        captured.value = None
        model.add_module(POSITIONS, captured)
        model.register_forward_pre_hook(captured.capture, with_kwargs=True)
        model.register_forward_hook(captured.release, always_call=True)
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
def restored(model: nn.Module) -> Iterator[None]:
    """Evaluate a relaxed model as ``restore`` would ship it: every γ acts as 0 inside the context.

    Args:
        model: A relaxed model.

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
    try:
        yield
    finally:
        with torch.no_grad():
            for gamma, value in zip(gammas, before, strict=True):
                gamma.copy_(value)


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
            if isinstance(layer._modules.get(name), kind):
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
    with _evaluating(relaxed):
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


@dataclass(frozen=True)
class LayerStatus:
    """One row of ``summary``: a relaxed layer.

    Attributes:
        path: Path of the layer in the model.
        type: Its class name.
        gamma: Relaxation strength γ.
        ratio: ‖γ f_neq‖ / ‖f_eq‖ on the example, or None without an example.
        multiplier: Lagrange multiplier λ, or None before a ``Problem`` was posed.
        status: ``relaxed``, ``met`` (γ = 0), ``retired`` or ``not called yet``.
    """

    path: str
    type: str
    gamma: float
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
    """Describe each relaxed layer: path, type, γ, relative size of the relaxation, multiplier, status.

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
        with _evaluating(relaxed), measuring(attached.values()) as sizes:
            call(relaxed, example)
            ratios = [
                relaxation.gamma.abs().item() * (neq / eq).sqrt().item() if eq else None
                for relaxation, (neq, eq, _) in zip(attached.values(), sizes(), strict=True)
            ]
    parents = {id(layer._modules.get(NAME)): layer for layer in relaxed.modules()}
    return Summary(
        LayerStatus(
            path or "(root)",
            type(parents[id(relaxation)]).__name__,
            relaxation.gamma.item(),
            ratio,
            None if relaxation.dual is None else relaxation.dual[0][relaxation.dual[1]].item(),
            _status(relaxation),
        )
        for (path, relaxation), ratio in zip(attached.items(), ratios, strict=True)
    )


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
        raise LayerNotCalled(_not_called(silent))


def _not_called(paths: list[str]) -> str:
    return (
        f"these layers are never run through __call__, so a term there would never act: {', '.join(paths)}; call "
        "layer(...) instead of layer.forward(...) or another method, or leave them out with exclude="
    )


def _choose(model: nn.Module, layers: Layers | None, exclude: Layers | None) -> dict[str, nn.Module]:
    known = registered_types()
    picks = _matcher(known if layers is None else layers, "layers")
    spared = _matcher(exclude, "exclude") if exclude is not None else lambda path, module: False
    chosen = {
        path: module for path, module in model.named_modules() if picks(path, module) and not spared(path, module)
    }
    if chosen:
        return chosen
    present = sorted({type(module).__name__ for module in model.modules()})
    if layers is None:
        wanted = [layer_type.__name__ for layer_type in known]
        hint = (
            f"no layer of the model has a registered term (registered: {', '.join(sorted(wanted)) or 'none'}). Choose "
            "layers by type, regular expression or predicate, and pass example="
        )
    else:
        wanted = [layers] if isinstance(layers, str) else [t.__name__ for t in _types(layers)]
        hint = f"no layer matched layers={layers!r}" + (f" and not exclude={exclude!r}" if exclude is not None else "")
    score = {
        name: max((difflib.SequenceMatcher(None, name.lower(), w.lower()).ratio() for w in wanted), default=0)
        for name in present
    }
    nearest = sorted(present, key=lambda name: -score[name])[:5]
    raise NoLayerMatched(f"{hint}. Nearest layer types in the model: {', '.join(nearest)}")


def _types(layers: Layers) -> tuple[type[nn.Module], ...]:
    if isinstance(layers, tuple):
        return layers
    return (layers,) if isinstance(layers, type) else ()


def _matcher(layers: Layers, argument: str) -> Callable[[str, nn.Module], bool]:
    if isinstance(layers, str):
        try:
            pattern = re.compile(layers)
        except re.error as problem:
            raise AceError(f"{argument}={layers!r} is no regular expression: {problem}") from problem
        return lambda path, module: pattern.search(path) is not None
    if isinstance(layers, type) or (isinstance(layers, tuple) and all(isinstance(kind, type) for kind in layers)):
        return lambda path, module: isinstance(module, layers)
    if not callable(layers):
        raise AceError(
            f"{argument}={layers!r}: pass a type, a tuple of types, a regular expression, or a function of path and "
            "module"
        )
    return layers


def _record(model: nn.Module, chosen: Mapping[str, nn.Module], example: Any) -> dict[str, Call]:
    """Run the example and keep the first call of each chosen layer."""
    calls: dict[str, Call] = {}

    def recorder(path: str) -> Callable[..., None]:
        def record(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            del layer
            calls.setdefault(path, Call(args, kwargs, output))

        return record

    handles = [
        layer.register_forward_hook(recorder(path), with_kwargs=True)
        for path, layer in chosen.items()
        if not isinstance(layer, torch.jit.ScriptModule)
    ]
    try:
        with _evaluating(model):
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    silent = [p for p, layer in chosen.items() if p not in calls and not isinstance(layer, torch.jit.ScriptModule)]
    if silent:
        raise LayerNotCalled(_not_called(silent))
    return calls


def _capture(select: str | int | Callable[..., Tensor], example: Any) -> Positions:
    args: tuple[Any, ...] = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    value = select_argument(select, args, example if isinstance(example, dict) else {})
    captured = Positions(select, value.shape[-1])
    captured.value = value
    return captured


def _like(layer: nn.Module, model: nn.Module, recorded: Call | None) -> Tensor:
    """Return a tensor with the dtype and device that the layer's term must have."""
    outputs = recorded.output if recorded is not None else None
    values = (
        outputs.values()
        if isinstance(outputs, Mapping)
        else outputs
        if isinstance(outputs, tuple | list)
        else [outputs]
    )
    candidates = [*layer.parameters(), *(v for v in values if isinstance(v, Tensor)), *model.parameters()]
    return next((tensor for tensor in candidates if tensor.is_floating_point()), torch.zeros(()))


def _require(model: nn.Module) -> dict[str, Relaxation]:
    attached = relaxations(model)
    if not attached:
        raise NotRelaxed("the model carries no relaxation terms: call ace.relax(model, ...) first")
    return attached


def _detach(layer: nn.Module, name: str) -> None:
    """Remove a child module and the hooks that are its bound methods."""
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


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def _recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Re-estimate running statistics as the plain average over the batches, whatever the class of BatchNorm."""
    norms = [
        m
        for m in model.modules()
        if hasattr(m, "running_mean") and isinstance(getattr(m, "momentum", None), float | None)
    ]
    with _evaluating(model):
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


def _flatten(output: Any) -> Tensor:
    """Concatenate all floating-point entries of an output."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value.detach().reshape(-1))
        elif isinstance(value, Mapping):
            for part in value.values():
                collect(part)
        elif isinstance(value, tuple | list):
            for part in value:
                collect(part)

    collect(output)
    return torch.cat(found)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _status(relaxation: Relaxation) -> str:
    if relaxation.retired:
        return "retired"
    if not relaxation.called:
        return "not called yet"
    return "met" if relaxation.gamma.item() == 0.0 else "relaxed"
