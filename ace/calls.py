"""How an example or a batch is handed to a model: the one place that decides it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], example: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists, dicts and PyG ``Data`` objects.

    Args:
        function: Applied to each tensor.
        example: The structure; other leaves are left alone.

    Returns:
        The same structure with the tensors replaced.

    Example:
        >>> import torch
        >>> map_tensors(torch.neg, {"x": [torch.ones(1)], "n": 3})
        {'x': [tensor([-1.])], 'n': 3}
    """
    if isinstance(example, torch.Tensor):
        return function(example)
    if isinstance(example, dict):
        return {key: map_tensors(function, value) for key, value in example.items()}
    if isinstance(example, tuple) and hasattr(example, "_fields"):
        return type(example)(*(map_tensors(function, value) for value in example))
    if isinstance(example, (tuple, list)):
        return type(example)(map_tensors(function, value) for value in example)
    if hasattr(example, "apply") and hasattr(example, "clone") and hasattr(example, "keys"):
        return example.clone().apply(function)
    return example
