"""Which layers get a relaxation term, and which term: by the user's choice, or by trying the layers on the example."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import tensors_in
from ace.errors import AceError, LayerNotCalled, NoLayerMatched, NotAttachable
from ace.generic import generic_term
from ace.groups import Group
from ace.inputs import moved_example, parameter_names, positions_of, unused_names
from ace.probing import is_inert, is_scripted, record, record_both, unreached
from ace.terms import (
    Call,
    Make,
    Port,
    Positions,
    Select,
    Site,
    is_default,
    load_hosts,
    registered_factory,
    registered_types,
    select_argument,
)

logger = logging.getLogger("ace")

Layers = type[nn.Module] | tuple[type[nn.Module], ...] | str | Callable[[str, nn.Module], bool]
"""How layers are chosen: a type, a tuple of types, a regular expression searched in the path, or a predicate."""

NAME = "relaxation"
"""Name of the child module that a relaxed layer gets."""

INVARIANT = "it sees only invariant features, so that a term on them breaks no symmetry"
UNREACHED = "no output of the model depends on what a term adds there"
ON_EDGES = "its rows are not the nodes, where terms cost less: name it in layers= to relax it as well"


@dataclass
class Plan:
    """What is to be done to a model.

    Attributes:
        terms: The terms by the path of their layer, in module order.
        gammas: A 1 for each, of the dtype and on the device of its layer: γ at the start, shape (1,).
        strict: Layers that could have had a term but stay strict, with the reason.
        positions: Where the positions are captured, if some term reads them.
    """

    terms: dict[str, nn.Module]
    gammas: dict[str, Tensor]
    strict: dict[str, str] = field(default_factory=dict)
    positions: Positions | None = None


def plan(
    model: nn.Module,
    layers: Layers | None,
    exclude: Layers | None,
    example: Any,
    make: Make,
    positions: Select | None,
    inputs: Mapping[int | str, str] | None,
    group: Group | None,
) -> Plan:
    """Decide which layers of a model get which terms; nothing is changed.

    Args:
        model: The model.
        layers: The user's choice, or None for the choice of ace.
        exclude: Layers to leave strict.
        example: What the model is called with, or None.
        make: Makes the map of a dense term.
        positions: The positions that all terms are to read, if the user gave them.
        inputs: Types of the model's inputs by name or position.
        group: Symmetry of the model, if the inputs do not suggest it.

    Returns:
        The plan.

    Raises:
        NoLayerMatched: No layer was chosen, or none can carry a term.
        NotAttachable: Some layers that the user chose cannot carry a term; all are listed with the reason.
        LayerNotCalled: The example does not run some of them.
        AceError: ``inputs`` names no input, or ``group`` moves none.
    """
    load_hosts()  # the rules also tell what an example holds, and how it moves
    if example is not None and (unknown := unused_names(model, example, inputs)):
        raise AceError(f"inputs= names {', '.join(map(repr, unknown))}, which the example does not have")
    if layers is None and is_scripted(model):
        raise NotAttachable(
            "the model is scripted and takes no hooks: relax it before scripting, restore it, then script"
        )
    spared = _matcher(exclude, "exclude") if exclude is not None else lambda path, module: False
    if layers is not None or example is None:
        chosen = _choose(model, layers, exclude, spared)
        trial = _Trial(model, chosen, example, make, positions, inputs, group)
        if layers is not None:
            return trial.plan(_explicit(chosen, trial, example))
        whole = _without_parts(chosen)
        if not whole:
            names = ", ".join(sorted(kind.__name__ for kind in registered_types()))
            raise NoLayerMatched(
                f"no layer of the model has a registered term (registered: {names or 'none'}), and without an example "
                "nothing else can be tried: pass example=batch"
            )
        return trial.plan(_explicit(whole, trial, example))
    trial = _Trial(model, _visible(model), example, make, positions, inputs, group)
    found = _registered(model, trial, spared) or _outermost(model, trial, spared)
    for path, module in trial.layers.items():
        if is_scripted(module) and next(module.parameters(), None) is not None:
            trial.strict.setdefault(path, trial.attempt(path) or "")
    if not found:
        raise NoLayerMatched(_nothing_found(trial))
    return trial.plan(found)


class _Trial:
    """The example, run once as it is and once transformed, and the terms tried on it so far."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        example: Any,
        make: Make,
        positions: Select | None,
        inputs: Mapping[int | str, str] | None,
        group: Group | None,
    ) -> None:
        self.model, self.layers, self.example, self.make = model, layers, example, make
        self.calls: dict[str, Call] = {}
        self.moved: dict[str, Call] = {}
        self.given: Positions | None = None  # the user's positions, read by every term
        self.spare: Positions | None = None  # those that terms beside invariant layers get
        self.elsewhere: Tensor | None = None  # the positions of the transformed example
        self.terms: dict[str, nn.Module] = {}
        self.gammas: dict[str, Tensor] = {}
        self.strict: dict[str, str] = {}
        self.rows: tuple[int, ...] = ()
        if example is None:
            return
        there = moved_example(model, example, inputs, group)
        if there is not None:
            move = partial(moved_example, model, given=inputs, group=group)
            self.calls, self.moved = record_both(model, layers, example, move)
        else:
            self.calls = record(model, layers, example)
            logger.info("no input is known to move: terms are not tried for symmetry; name types with inputs=")
        select = positions
        if select is None and (found := positions_of(model, example, inputs)) is not None:
            names = parameter_names(model)
            first = found.path[0]
            index = first if isinstance(first, int) else names.index(first) if first in names else len(names)
            name = first if isinstance(first, str) else names[first] if first < len(names) else ""
            select = Port(index, name, found.value.shape[-1], inside=found.path[1:])
        if select is not None:
            value = _argument(select, example)
            captured = Positions(select, value.shape[-1])
            captured.value = value
            self.rows = tuple(value.shape[:-1])
            self.elsewhere = None if there is None else _argument(select, there)
            self.given, self.spare = (captured, None) if positions is not None else (None, captured)

    def attempt(self, path: str) -> str | None:
        """Try to make the term of a layer; return why there is none."""
        layer, seen, moved = self.layers[path], self.calls.get(path), self.moved.get(path)
        if is_scripted(layer):
            return f"a scripted module takes no hooks; {_instead(self.model, path)}"
        if hasattr(layer, NAME):
            return f"it has an attribute {NAME!r} of its own"
        factory = registered_factory(layer) or generic_term
        # the user's positions at once; else without any first, and with those found where that breaks no symmetry
        tries = [self.given] if self.given is not None else [None] if self.spare is None else [None, self.spare]
        for positions in tries:
            try:
                term = factory(Site(path, layer, seen, self.make, positions, moved, self.rows))
            except NotAttachable as problem:
                return str(problem)
            gamma = like(layer, self.model, seen).new_ones(1)
            term = term.to(dtype=gamma.dtype, device=gamma.device).eval()
            reads = positions is not None and getattr(term, "positions", None) is not None
            where = (positions, self.elsewhere) if reads and positions and self.elsewhere is not None else None
            if seen is None or moved is None or not is_inert(term, seen, moved, where):
                self.terms[path], self.gammas[path] = term, gamma
                return None
        if self.rows:
            return f"{INVARIANT}, and its rows are not those of the positions"
        return f"{INVARIANT}; positions= says where the positions are among the model's inputs"

    def on_nodes(self, path: str) -> bool:
        """Whether the rows of a layer's output are those of the positions; True where these are not known."""
        call = self.calls.get(path)
        if call is None or not self.rows:
            return True
        nodes, count = self.rows, torch.Size(self.rows).numel()
        shapes = [tuple(tensor.shape) for _, tensor in tensors_in(call.output) if tensor.dim() > 0]
        return any(shape[: len(nodes)] == nodes or shape[0] == count for shape in shapes)

    def reached(self, paths: list[str]) -> list[str]:
        """Keep the paths whose terms reach an output; the others stay strict."""
        if self.example is None or not paths:
            return paths
        dead = unreached(self.model, self.layers, {path: self.terms[path] for path in paths}, self.example)
        self.strict.update(dict.fromkeys(dead, UNREACHED))
        return [path for path in paths if path not in dead]

    def plan(self, paths: list[str]) -> Plan:
        """Return the plan with the terms at these paths."""
        terms = {path: self.terms[path] for path in self.layers if path in paths}
        reads = any(getattr(term, "positions", None) is not None for term in terms.values())
        captured = (self.given or self.spare) if reads else None
        strict = {path: self.strict[path] for path in self.layers if path in self.strict and path not in terms}
        return Plan(terms, {path: self.gammas[path] for path in terms}, strict, captured)


def _explicit(chosen: Mapping[str, nn.Module], trial: _Trial, example: Any) -> list[str]:
    """Make the terms of the layers that the user chose, or refuse with all the reasons."""
    scripted = [path for path, layer in chosen.items() if is_scripted(layer)]
    silent = [path for path in chosen if path not in trial.calls and path not in scripted]
    if example is not None and silent:
        raise LayerNotCalled(not_called(silent))
    problems = {path: problem for path in chosen if (problem := trial.attempt(path)) is not None}
    good = [path for path in chosen if path not in problems]
    if not problems:
        good = trial.reached(good)
        problems = {path: UNREACHED for path in chosen if path not in good}
    if problems:
        raise NotAttachable(
            "no relaxation term fits these layers, so nothing was changed:\n  "
            + "\n  ".join(f"{p or '(root)'} ({type(chosen[p]).__name__}): {why}" for p, why in problems.items())
            + "\nleave them strict with exclude=, or choose other layers"
        )
    return good


def _registered(model: nn.Module, trial: _Trial, spared: Callable[[str, nn.Module], bool]) -> list[str]:
    """Choose the outermost layers of registered types: those on the nodes, or failing these, any."""
    fits: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        if registered_factory(module) is not None:
            if spared(path, module):
                trial.strict[path] = "excluded"
                return
            if not is_default(module):
                trial.strict[path] = f"a {type(module).__name__} gets a term only if layers= names it"
                return
            problem = trial.attempt(path) if path in trial.calls or is_scripted(module) else _SILENT
            if problem is None:
                fits.append(path)
                return
            trial.strict[path] = problem
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if inner in trial.layers:
                visit(inner, child)

    visit("", model)
    fits = trial.reached(fits)
    nodes = [path for path in fits if trial.on_nodes(path)]
    if nodes:
        trial.strict.update({path: ON_EDGES for path in fits if path not in nodes})
    return nodes or fits


def _outermost(model: nn.Module, trial: _Trial, spared: Callable[[str, nn.Module], bool]) -> list[str]:
    """Choose the blocks of a model that nobody has registered: the outermost layers that a term fits.

    A module that is made of several such layers is not chosen but searched: the root, a lone wrapper inside it,
    and whatever keeps them in a ``ModuleList`` or the like. PyTorch's own layers are the last resort: in a network
    of blocks they are the insides of the blocks.
    """
    before = dict(trial.strict)
    for own in (True, False):
        trial.strict = dict(before)
        fits: set[str] = set()
        for path, module in trial.layers.items():  # in module order: the terms draw their weights one after the other
            if path in trial.calls and _is_layer(module, own) and not spared(path, module):
                problem = trial.attempt(path)
                if problem is None:
                    fits.add(path)
                else:
                    trial.strict[path] = problem
        stacks = {path for path in fits if _is_stack(path, trial.layers, fits)}
        wrapper: str | None = ""
        while wrapper is not None and (inner := _outer(wrapper, fits)):
            stacks.add(wrapper)
            wrapper = inner[0] if len(inner) == 1 else None
        chosen: list[str] = []
        for path in trial.layers:
            inside = any(path.startswith(f"{outer}.") or outer == "" for outer in chosen)
            if path in fits and path not in stacks and not inside:
                chosen.append(path)
        chosen = trial.reached(chosen)
        nodes = [path for path in chosen if trial.on_nodes(path)]
        trial.strict.update({path: ON_EDGES for path in chosen if nodes and path not in nodes})
        trial.strict = {p: why for p, why in trial.strict.items() if not any(p.startswith(f"{c}.") for c in chosen)}
        if nodes or chosen:
            return nodes or chosen
    return []


def _outer(path: str, fits: set[str]) -> list[str]:
    """The outermost paths of ``fits`` inside a module."""
    prefix = f"{path}." if path else ""
    inside = [other for other in fits if other != path and other.startswith(prefix)]
    return [p for p in inside if not any(p.startswith(f"{q}.") for q in inside)]


def _is_stack(path: str, layers: Mapping[str, nn.Module], fits: set[str]) -> bool:
    """Whether some container inside a module, or the module as a container, holds two layers that terms fit."""
    prefix = f"{path}." if path else ""
    containers = [
        name
        for name, module in layers.items()
        if (name == path or name.startswith(prefix))
        and isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    ]
    return any(len(_outer(name, fits)) > 1 for name in containers)


def _is_layer(module: nn.Module, own: bool) -> bool:
    """Whether a module is a candidate: it has parameters, is no normalisation, and is PyTorch's own or is not.

    A library's subclass of ``Linear`` counts as PyTorch's own; what it calls a ``Sequential`` does not.
    """
    bases = [base for base in type(module).__mro__ if base not in (nn.Module, nn.Sequential)]
    shipped = type(module) is nn.Sequential or any(base.__module__.startswith("torch.nn.") for base in bases)
    bare = isinstance(module, nn.ModuleList | nn.ModuleDict)
    trainable = next(module.parameters(), None) is not None
    return shipped != own and trainable and not bare and "norm" not in type(module).__name__.lower()


_SILENT = "the example does not run it through __call__"


def not_called(paths: list[str]) -> str:
    """Say that layers are never run through ``__call__``, and what to do."""
    return (
        f"these layers are never run through __call__, so a term there would never act: {', '.join(paths)}; call "
        "layer(...) instead of layer.forward(...) or another method, or leave them out with exclude="
    )


def _visible(model: nn.Module) -> dict[str, nn.Module]:
    """All modules but the insides of generated ones, which are no layers."""
    closed = [p for p, m in model.named_modules() if isinstance(m, torch.fx.GraphModule) or is_scripted(m)]
    return {
        path: module
        for path, module in model.named_modules()
        if not isinstance(module, torch.fx.GraphModule) and not any(path.startswith(f"{outer}.") for outer in closed)
    }


def _without_parts(chosen: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Leave out what is inside another chosen layer, and types that only the user chooses."""
    whole = {
        path: layer
        for path, layer in chosen.items()
        if not any(other != path and (path.startswith(f"{other}.") or not other) for other in chosen)
    }
    return {path: layer for path, layer in whole.items() if is_default(layer)}


def _choose(
    model: nn.Module, layers: Layers | None, exclude: Layers | None, spared: Callable[[str, nn.Module], bool]
) -> dict[str, nn.Module]:
    """Return the layers that the user's choice matches; of the registered types if there is none."""
    known = registered_types()
    picks = _matcher(known if layers is None else layers, "layers")
    chosen = {
        path: module for path, module in model.named_modules() if picks(path, module) and not spared(path, module)
    }
    if not chosen and layers is not None:
        wanted = [layers] if isinstance(layers, str) else [kind.__name__ for kind in _types(layers)]
        hint = f"no layer matched layers={layers!r}" + (f" and not exclude={exclude!r}" if exclude is not None else "")
        raise NoLayerMatched(f"{hint}. Nearest layer types in the model: {_nearest(model, wanted)}")
    return chosen


def _nothing_found(trial: _Trial) -> str:
    reasons = "".join(f"\n  {path or '(root)'}: {reason}" for path, reason in trial.strict.items())
    return (
        "no layer of the model can carry a relaxation term, so nothing was changed. Choose layers by type, regular "
        f"expression or predicate, or register_term for a type. Tried:{reasons or ' no layer with parameters ran'}"
    )


def _nearest(model: nn.Module, wanted: list[str]) -> str:
    present = sorted({type(module).__name__ for module in model.modules()})
    score = {
        name: max((difflib.SequenceMatcher(None, name.lower(), w.lower()).ratio() for w in wanted), default=0)
        for name in present
    }
    return ", ".join(sorted(present, key=lambda name: -score[name])[:5])


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


def _instead(model: nn.Module, path: str) -> str:
    """Name the nearest module around a scripted one to which a term can be attached."""
    modules = dict(model.named_modules())
    outer = path
    while outer and is_scripted(modules[outer]):
        outer = outer.rpartition(".")[0]
    if is_scripted(modules[outer]):
        return "relax the model before scripting it"
    return (
        f"relax before scripting, or attach to {outer or 'the whole model'} ({type(modules[outer]).__name__}) around it"
    )


def _argument(select: Select, example: Any) -> Tensor:
    args: tuple[Any, ...] = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    return select_argument(select, args, example if isinstance(example, dict) else {})


def like(layer: nn.Module, model: nn.Module, recorded: Call | None) -> Tensor:
    """Return a tensor with the dtype and device that the layer's term must have."""
    outputs = [] if recorded is None else [tensor for _, tensor in tensors_in(recorded.output)]
    candidates = [*layer.parameters(), *outputs, *model.parameters()]
    return next((tensor for tensor in candidates if tensor.is_floating_point()), torch.zeros(()))
