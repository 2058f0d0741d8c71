"""How the inputs of a model transform: the type of each tensor in an example, by its name or by its shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import Path, map_paths, parts_of, rebuild, tensors_in
from ace.errors import AceError
from ace.groups import SO2, SO3, Cyclic, Element, Group, act, finding

TYPE_OF_NAME = {
    **dict.fromkeys(("pos", "positions", "_positions", "coords", "coors", "coordinates", "loc", "xyz"), "position"),
    **dict.fromkeys(("vel", "velocity", "velocities", "force", "forces", "cell", "shifts"), "vector"),
    "edge_index": "edge_index",
    **dict.fromkeys(("edge_attr", "edge_weight", "ptr", "y"), "invariant"),
}
"""Types assumed for inputs and outputs of these names; every other input is a ``scalar``."""

UNMOVED = ("scalar", "edge_index", "invariant")
"""Types that no geometric group moves."""


@dataclass(frozen=True)
class Input:
    """One tensor of an example: where it lies, what it is called, its value and its type."""

    path: Path
    name: str
    value: Tensor
    kind: str


def model_inputs(model: Callable[..., Any], example: Any, given: Mapping[int | str, str] | None = None) -> list[Input]:
    """List the tensors of an example with their types.

    A tensor's type is the one ``given`` for its name or for a container around it (by argument position,
    argument name, key or attribute; the innermost wins), else that of its name in ``TYPE_OF_NAME``,
    else ``scalar``.

    Args:
        model: A module or function: its signature names the positional arguments.
        example: A tuple of positional arguments, a dict of keyword arguments, or one object.
        given: Types by name or position.

    Returns:
        One entry for each tensor, nested ones included.

    Example:
        >>> import torch
        >>> found = model_inputs(lambda h, pos: h, (torch.ones(2, 4), torch.ones(2, 3)))
        >>> [(entry.name, entry.kind) for entry in found]
        [('h', 'scalar'), ('pos', 'position')]
    """
    names = parameter_names(model)
    found = []
    for path, value in tensors_in(_arguments(example)):
        labels = _labels(path, names)
        kind = next((given[label] for label in reversed(labels) if given and label in given), None)
        kind = kind or next((TYPE_OF_NAME[label] for label in reversed(labels) if label in TYPE_OF_NAME), "scalar")
        name = next((label for label in reversed(labels) if isinstance(label, str)), f"argument {path[0]}")
        found.append(Input(path, name, value, kind))
    return found


def unused_names(model: Callable[..., Any], example: Any, given: Mapping[int | str, str] | None) -> list[int | str]:
    """Return the keys of ``given`` that name nothing in the example."""
    names = parameter_names(model)
    labels = {label for path, _ in tensors_in(_arguments(example)) for label in _labels(path, names)}
    return [key for key in given or {} if key not in labels]


def with_inputs(example: Any, values: Mapping[Path, Tensor]) -> Any:
    """Return the example with other tensors, each cloned: a model may write to its inputs.

    Args:
        example: As the model is called with it.
        values: New tensors by path; the others are cloned as they are.

    Returns:
        An example of the same structure.

    Example:
        >>> import torch
        >>> with_inputs({"x": torch.ones(1), "y": torch.ones(1)}, {("x",): torch.zeros(1)})
        {'x': tensor([0.]), 'y': tensor([1.])}
    """
    new = map_paths(lambda path, tensor: values.get(path, tensor).clone(), _arguments(example))
    return new if isinstance(example, tuple | dict) else new[0]


_MOTIONS: dict[type, Callable[[Any], Any]] = {}


def register_motion(container: type, move: Callable[[Any], Any]) -> None:
    """Teach ace how an input that knows its own symmetry group is transformed.

    Args:
        container: A class of inputs; subclasses are included.
        move: Returns an object transformed by an element of its group other than the identity.
    """
    _MOTIONS[container] = move


def moved_example(
    model: nn.Module,
    example: Any,
    given: Mapping[int | str, str] | None = None,
    group: Group | None = None,
) -> Any:
    """Transform an example by one element of the group, or return None if nothing moves.

    Without a group its inputs suggest one: vectors and positions are rotated in space or in the plane, images by
    a quarter turn. Registered containers are moved by an element of their own group. If no input has a type that
    moves, floating-point inputs whose last axis is 3 are taken for vectors, or, failing these, square images of
    four axes for images.

    Args:
        model: The model that is called with the example.
        example: As in ``ace.relax``.
        given: Types by name or position.
        group: Where the element is drawn from, the same for all inputs.

    Returns:
        A transformed copy, or None, also where the transform changes nothing (an example of zeros).

    Raises:
        AceError: ``group`` moves none of the inputs, or does not act on one of them.

    Example:
        >>> import torch
        >>> x = torch.eye(3)
        >>> moved = moved_example(torch.nn.Identity(), x)
        >>> bool(torch.allclose(moved @ moved.T, x, atol=1e-6)), bool(torch.allclose(moved, x))
        (True, False)
    """
    changed, any_moved = _move_containers(_arguments(example))
    inputs = model_inputs(model, changed if isinstance(example, tuple | dict) else changed[0], given)
    moving = [entry for entry in inputs if entry.kind not in UNMOVED]
    if not moving and not any_moved:
        floats = [entry for entry in inputs if entry.value.is_floating_point() and entry.value.dim() > 1]
        moving = [replace(entry, kind="vector") for entry in floats if entry.value.shape[-1] == 3]
        moving = moving or [replace(entry, kind="image") for entry in floats if _is_image(entry.value)]
    values: dict[Path, Tensor] = {}
    if group is None:
        for entry in moving:
            if (element := _element(entry)) is not None:
                values |= _moved(element, [entry])
    else:
        elements = group.sample(8, seed=1)  # of a finite group some may be the identity
        values = next((found for element in elements if (found := _moved(element, moving))), {})
    if not values and not any_moved:
        if group is None:
            return None
        kinds = ", ".join(f"{entry.name} ({entry.kind})" for entry in inputs) or "none"
        raise AceError(f"group={group} moves no input of the example: {kinds}; inputs= says what transforms how")
    return with_inputs(changed if isinstance(example, tuple | dict) else changed[0], values)


def positions_of(model: nn.Module, example: Any, given: Mapping[int | str, str] | None = None) -> Input | None:
    """Return the positions among a model's inputs, or None.

    They are the first input of type ``position``; failing that, the first floating-point input whose last axis
    is 3.
    """
    inputs = [e for e in model_inputs(model, example, given) if e.value.is_floating_point() and e.value.dim() > 1]
    named = [e for e in inputs if e.kind == "position"]
    shaped = [e for e in inputs if e.kind in ("scalar", "vector") and e.value.shape[-1] == 3]
    return next(iter([*named, *shaped]), None)


def _arguments(example: Any) -> tuple[Any, ...] | dict[str, Any]:
    return example if isinstance(example, tuple | dict) else (example,)


def _labels(path: Path, names: list[str]) -> list[int | str]:
    """Names of a tensor, outermost first: position and name of its argument, keys and attributes further in."""
    first = path[0]
    argument: list[int | str] = [first, names[first]] if isinstance(first, int) and first < len(names) else [first]
    return [*argument, *(key for key in path[1:] if isinstance(key, str))]


def parameter_names(model: Callable[..., Any]) -> list[str]:
    """Return the names of a model's positional arguments, in order; none if its signature cannot be read."""
    try:
        signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    except (TypeError, ValueError):  # a builtin shows no signature
        return []
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, parameter in signature.parameters.items() if parameter.kind in named]


def _element(entry: Input) -> Element | None:
    """An element other than the identity that acts on this input; the same one for all inputs of a kind."""
    turns = [turn for turn in Cyclic(4).sample(4) if turn.plane is not None and float(turn.plane[0, 0]) < 0.5]
    candidates = turns if entry.kind.endswith("image") else [*SO3().sample(1, seed=1), *SO2().sample(1, seed=1)]
    return next((element for element in candidates if finding(element, entry.value, entry.kind) is None), None)


def _moved(element: Element, moving: list[Input]) -> dict[Path, Tensor]:
    """The inputs that this element changes."""
    there = ((entry, act(element, entry.value.detach(), entry.kind)) for entry in moving)
    return {
        entry.path: value.requires_grad_(entry.value.requires_grad)
        for entry, value in there
        if not torch.equal(value, entry.value)
    }


def _is_image(value: Tensor) -> bool:
    return value.dim() == 4 and value.shape[-1] == value.shape[-2] > 3


def _move_containers(value: Any) -> tuple[Any, bool]:
    """Move the containers of registered classes anywhere in a structure."""
    for container, move in _MOTIONS.items():
        if isinstance(value, container):
            return move(value), True
    parts = parts_of(value)
    if not parts:
        return value, False
    new = {key: _move_containers(part) for key, part in parts.items()}
    if not any(moved for _, moved in new.values()):
        return value, False
    return rebuild(value, {key: part for key, (part, _) in new.items()}), True
