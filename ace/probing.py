"""Run the example through a model and judge, layer by layer, whether a relaxation term there would act."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import call, map_tensors, merge, parts_of, rebuild, tensors_in
from ace.generic import same, tolerance_of
from ace.terms import Call, Positions

logger = logging.getLogger("ace")


def record(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, Call]:
    """Run the example and keep the first call of each layer.

    Args:
        model: The model; it runs in eval mode, and its training flags are put back.
        layers: The layers to watch, by path.
        example: What the model is called with.

    Returns:
        The calls by path, in the order in which they ended; layers that did not run are missing.
    """
    calls: dict[str, Call] = {}
    handles = []
    for path, layer in layers.items():
        if is_scripted(layer):
            continue

        def keep(layer: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            del layer
            if path not in calls:
                # copies of the containers: a later layer may write into a dict that this one was given or returned
                calls[path] = Call(*_snapshot((args, kwargs, output), {}))

        handles.append(layer.register_forward_hook(keep, with_kwargs=True))
    try:
        with evaluating(model), same_randomness():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def record_both(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Any, move: Callable[[Any], Any]
) -> tuple[dict[str, Call], dict[str, Call]]:
    """Record the calls for an example and for its transform, which are to be compared, free of rounding on the way.

    Rounding decides which of two points at nearly the same distance is the nearest, and a neighbour that changes
    changes all that follows by much more than rounding. So the example is moved, and a copy of the model run on it, in
    float64, and only what that computed is rounded to the dtypes in which the model computes it.

    Args:
        model: The model.
        layers: The layers to watch, by path.
        example: What the model is called with.
        move: Returns the transform of an example.

    Returns:
        The calls by path, as ``record``, of the example and of its transform. As the model itself computes them where
        it cannot be copied, does not run in float64, or runs through other layers there.
    """
    plain = record(model, layers, example), record(model, layers, move(example))
    try:
        with default_dtype(torch.float64):
            twin = copy.deepcopy(model).double()
            modules = dict(twin.named_modules())
            watched, fine = {path: modules[path] for path in layers}, map_tensors(_double, example)
            exact = record(twin, watched, fine), record(twin, watched, move(fine))
        here, there = (
            {path: Call(*_snapshot(tuple(calls[path]), {}, tuple(seen))) for path, seen in own.items()}
            for own, calls in zip(plain, exact, strict=True)
        )
    except Exception as problem:  # whatever someone else's model raises in a dtype that is not its own
        logger.info("layers are compared in the model's own dtype, since it does not run in float64: %s", problem)
        return plain
    return here, there


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


def _snapshot(value: Any, copies: dict[int, Any], like: Any = None) -> Any:
    """Copy containers, not the tensors in them; what occurs twice is one object in the copy too.

    With ``like``, a structure that is the same, tensors are copied too: in the dtypes that they have there.
    """
    if isinstance(value, Tensor):
        return value if like is None else copies.setdefault(id(value), value.to(like.dtype))
    parts = parts_of(value)
    if parts is None:
        return value
    if id(value) not in copies:
        others = parts_of(like) or {}
        new = {key: _snapshot(part, copies, None if like is None else others[key]) for key, part in parts.items()}
        copies[id(value)] = rebuild(value, new)
    return copies[id(value)]


@torch.no_grad()
def is_inert(term: nn.Module, seen: Call, moved: Call, positions: tuple[Positions, Tensor] | None) -> bool:
    r"""Whether a term breaks no symmetry: it transforms as the layer's output does.

    With :math:`x` and :math:`x'` what the layer is given for the example and for its transform, the term is inert
    if :math:`f_\\mathrm{neq}(x') = f_\\mathrm{neq}(x)` where the output is invariant, or if it changes and yet
    keeps, in each row, its norm and its product with the layer's output, as an orthogonal action on both does.

    Args:
        term: The term, not attached yet.
        seen: The layer's call on the example.
        moved: Its call on the transformed example.
        positions: Where the term reads the positions, and those of the transformed example; None if it does not.

    Returns:
        True only if it is certain: False where the two calls cannot be compared.
    """
    before = dict(tensors_in(term(*seen.args, **seen.kwargs)))
    if positions is None:
        after = dict(tensors_in(term(*moved.args, **moved.kwargs)))
    else:
        capture, elsewhere = positions
        here, capture.value = capture.value, elsewhere
        try:
            after = dict(tensors_in(term(*moved.args, **moved.kwargs)))
        finally:
            capture.value = here
    outputs, moved_outputs = dict(tensors_in(seen.output)), dict(tensors_in(moved.output))
    for path, change in before.items():
        if path not in after or after[path].shape != change.shape:
            return False
        tolerance = tolerance_of(change)
        if same(change, after[path], tolerance):
            if not same(outputs[path], moved_outputs[path], tolerance):
                return False  # the output moves and the term does not
        else:
            rows, rows_after = _rows(change), _rows(after[path])
            if not same(rows.norm(dim=1), rows_after.norm(dim=1), tolerance):
                return False
            products = (rows * _rows(outputs[path])).sum(1), (rows_after * _rows(moved_outputs[path])).sum(1)
            scale = (rows.norm(dim=1) * _rows(outputs[path]).norm(dim=1)).norm()
            if (products[0] - products[1]).norm() > tolerance * scale:
                return False
    return True


def unreached(
    model: nn.Module, layers: Mapping[str, nn.Module], terms: Mapping[str, nn.Module], example: Any
) -> list[str]:
    """Find the terms that no output of the model depends on.

    Each term is added with strength 0 in one forward pass; then the graphs of the outputs are searched for the
    strengths. (No backward pass: a model of forces may have freed its graph already. And a derivative that
    happens to be 0, as behind a gate that starts at 0, is no reason to leave a layer strict.)

    Args:
        model: The model.
        layers: Its layers, by path.
        terms: Their terms, by path, not attached yet.
        example: What the model is called with.

    Returns:
        The paths of the terms from which no output descends; none if the outputs carry no graph at all.
    """
    strengths = {path: torch.zeros(1, requires_grad=True) for path in terms}
    handles = []
    for path, term in terms.items():

        def add(layer: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, term: nn.Module = term) -> Any:
            del layer
            strength = strengths[path]
            return merge(
                output, term(*args, **kwargs), lambda _, y, change: y + (strength.to(y.device) * change).to(y.dtype)
            )

        handles.append(layers[path].register_forward_hook(add, with_kwargs=True))
    try:
        with evaluating(model), same_randomness(), torch.enable_grad():
            output = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    nodes = {tensor.grad_fn for _, tensor in tensors_in(output) if tensor.grad_fn is not None}
    if not nodes:
        return []
    waiting, leaves = list(nodes), set()
    while waiting:
        node = waiting.pop()
        leaves.add(id(getattr(node, "variable", None)))
        new = {parent for parent, _ in node.next_functions if parent is not None} - nodes
        nodes |= new
        waiting.extend(new)
    return [path for path, strength in strengths.items() if id(strength) not in leaves]


def is_scripted(module: nn.Module) -> bool:
    """Whether a module was compiled to TorchScript: it takes no hooks."""
    return isinstance(module, torch.jit.ScriptModule)


def _rows(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0] if value.dim() else 1, -1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():  # some layers cache their weights in eval mode: the cache must carry no graph
        model.eval()
    try:
        yield
    finally:
        with torch.no_grad():
            for module, mode in modes:
                if module.training != mode:
                    module.train(mode)  # drops such a cache; parents come before their children
        for module, mode in modes:
            module.training = mode  # a module that two parents share


@contextmanager
def same_randomness() -> Iterator[None]:
    """Give a model that draws random numbers the same ones each time, and put the random state back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


@contextmanager
def default_dtype(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Make a dtype the default inside the context, or only put back the present one: some libraries change it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
