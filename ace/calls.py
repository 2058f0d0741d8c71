"""How an example is handed to a model, and how ace looks into what models take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]
"""Where a tensor lies in nested containers: a key or index for each level."""


def call(model: Callable[..., Any], example: Any) -> Any:
    """Call a model with an example.

    A ``tuple`` holds positional arguments, a ``dict`` keyword arguments; anything else (a tensor, a
    PyG ``Data``, ...) is the one argument.

    Args:
        model: A module or function.
        example: What it is called with.

    Returns:
        Whatever the model returns.

    Example:
        >>> import torch
        >>> call(torch.add, (torch.ones(1), torch.ones(1)))
        tensor([2.])
        >>> call(torch.sum, {"input": torch.ones(3)})
        tensor(3.)
    """
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, dict):
        return model(**example)
    return model(example)


_REGISTERED: dict[type, tuple[Callable[[Any], dict[Any, Any]], Callable[[Any, dict[Any, Any]], Any]]] = {}


def register_container(
    container: type, parts: Callable[[Any], dict[Any, Any]], rebuild: Callable[[Any, dict[Any, Any]], Any]
) -> None:
    """Teach ace a class that carries tensors, so that terms can add to a layer's output of that class.

    Tuples, lists, mappings, dataclasses and PyG ``Data`` need no registration.

    Args:
        container: The class; subclasses are included.
        parts: Returns what an object holds, by name.
        rebuild: Makes, from an object and new parts, an object that is like it but holds them.

    Example:
        >>> import torch
        >>> class Boxed:
        ...     def __init__(self, inside):
        ...         self.inside = inside
        >>> register_container(Boxed, lambda box: {"inside": box.inside}, lambda box, parts: Boxed(parts["inside"]))
        >>> map_tensors(torch.neg, Boxed(torch.ones(1))).inside
        tensor([-1.])
    """
    _REGISTERED[container] = (parts, rebuild)


def parts_of(value: Any) -> dict[Any, Any] | None:
    """Return what a container holds, by key; None for a tensor and anything else that is no container.

    Example:
        >>> parts_of([10, 20]), parts_of(3)
        ({0: 10, 1: 20}, None)
    """
    if isinstance(value, Tensor):
        return None
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    for container, (parts, _) in _REGISTERED.items():
        if isinstance(value, container):
            return parts(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if _is_data(value):
        return {key: value[key] for key in sorted(value.keys())}  # a Data gives its keys in the order of a set
    return None


def rebuild(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a container like ``value`` that holds other parts.

    Args:
        value: A container.
        parts: All of its parts, as ``parts_of`` lists them.

    Returns:
        An object of the same class; ``value`` is left alone.

    Example:
        >>> rebuild((1, 2), {0: 3, 1: 4})
        (3, 4)
    """
    if type(value) is dict:
        return parts
    if isinstance(value, tuple | list):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    for container, (_, make) in _REGISTERED.items():
        if isinstance(value, container):
            return make(value, parts)
    new = copy.copy(value)
    for key, part in parts.items():
        if isinstance(value, Mapping) or _is_data(value):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # a dataclass, which may be frozen
    return new


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield each tensor inside nested containers with its path.

    Example:
        >>> import torch
        >>> [path for path, _ in tensors_in({"a": [torch.ones(1), torch.ones(2)]})]
        [('a', 0), ('a', 1)]
    """
    if isinstance(value, Tensor):
        yield path, value
        return
    for key, part in (parts_of(value) or {}).items():
        yield from tensors_in(part, (*path, key))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to every tensor inside nested containers.

    Args:
        function: Applied to each tensor.
        value: The structure; other leaves are left alone.

    Returns:
        The same structure with the tensors replaced.

    Example:
        >>> import torch
        >>> map_tensors(torch.neg, {"x": [torch.ones(1)], "n": 3})
        {'x': [tensor([-1.])], 'n': 3}
    """
    return map_paths(lambda _path, tensor: function(tensor), value)


def map_paths(function: Callable[[Path, Tensor], Tensor], value: Any, path: Path = ()) -> Any:
    """Like ``map_tensors``, with the path of each tensor as the function's first argument."""
    if isinstance(value, Tensor):
        return function(path, value)
    parts = parts_of(value)
    if not parts:
        return value
    return rebuild(value, {key: map_paths(function, part, (*path, key)) for key, part in parts.items()})


def merge(output: Any, change: Any, function: Callable[[Path, Tensor, Tensor], Tensor], path: Path = ()) -> Any:
    """Combine a layer's output with what its term returned.

    Args:
        output: What the layer returned.
        change: What the term returned: a tensor, or a container with an entry for each part that changes.
        function: Makes the new tensor from its path, a tensor of the output and one of the change.
        path: Where ``output`` lies.

    Returns:
        The output with the changed tensors replaced; parts without an entry are passed on.

    Example:
        >>> import torch
        >>> merge((torch.ones(1), "kept"), {0: torch.ones(1)}, lambda path, y, change: y + change)
        (tensor([2.]), 'kept')
    """
    if isinstance(output, Tensor) and isinstance(change, Tensor):
        return function(path, output, change)
    changed, parts = parts_of(change), parts_of(output)
    if parts is None or changed is None:
        raise TypeError(f"a change of type {type(change).__name__} does not fit an output {type(output).__name__}")
    return rebuild(
        output,
        {
            key: part if changed.get(key) is None else merge(part, changed[key], function, (*path, key))
            for key, part in parts.items()
        },
    )


def _is_data(value: Any) -> bool:
    """Whether a value is a PyG ``Data``: known by what it can do, so that PyG need not be imported."""
    return not isinstance(value, Mapping) and all(hasattr(value, name) for name in ("keys", "apply", "clone"))
