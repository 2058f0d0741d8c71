"""The fall-back term: which tensors to read and write, and which of their axes are features, read off a call.

A dense term may mix features freely, but must treat all rows (batch, nodes, edges, points) alike, or it would not
apply to an input of another size. Features are the components of vectors and tensors, found by transforming the
example, and the channels, found by the sizes of the layer's parameters.
"""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import Path, tensors_in
from ace.errors import NotAttachable
from ace.terms import Port, Site, Write

LARGEST_COMPONENTS = 64
"""Most components that an axis of a vector or of stacked spherical tensors may have."""


@dataclass(frozen=True)
class Layout:
    """How a tensor is split into rows and features: the feature axes, in order, and the sizes of the others.

    ``sure`` is False where the feature axis is a guess: an axis that holds no components and has the size of no
    parameter may hold neighbours, of which the next example has another number. ``moves`` is True where the example
    shows components.
    """

    axes: tuple[int, ...]
    rows: tuple[int, ...]
    sure: bool = True
    moves: bool = False


def generic_term(site: Site) -> nn.Module:
    """Make a dense term from what was seen when the example ran: the fall-back for any layer.

    Written are the floating-point outputs whose rows are those of at least one floating-point input; read are
    all floating-point inputs with the same rows.

    Args:
        site: The layer and its recorded call.

    Returns:
        A ``DenseTerm``.

    Raises:
        NotAttachable: Without an example, where the layer changes the dict that it is given, or where no input
            has the rows of an output.
    """
    if site.call is None:
        raise NotAttachable(
            f"the sizes of a {type(site.layer).__name__}'s term are read off a call: pass relax(..., example=batch)"
        )
    args, kwargs, output = site.call
    given = [*args, *kwargs.values()]
    if not isinstance(output, Tensor) and any(output is value for value in given):
        raise NotAttachable(
            f"it writes its results into the {type(output).__name__} that it is given; attach to a layer inside it"
        )
    names = list(inspect.signature(site.layer.forward).parameters)
    sources: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    inputs = [(path, value) for path, value in tensors_in(sources) if _is_features(value)]
    passed_on = {id(value) for _, value in tensors_in(sources)}
    outputs = [(p, v) for p, v in tensors_in(output) if _is_features(v) and id(v) not in passed_on]
    seen_in = _layouts(site, inputs, outputs, read=True)
    seen_out = _layouts(site, outputs, inputs, read=False)
    layouts_in = _as_shown(inputs, seen_in, outputs, seen_out)
    layouts_out = _as_shown(outputs, seen_out, inputs, seen_in)
    rows = _shared_rows(site, layouts_in, layouts_out)
    if rows is None:
        raise NotAttachable(
            "no output has the rows of an input, so no row-wise term fits: inputs "
            f"{[tuple(value.shape) for _, value in inputs] or 'without floating-point tensors'}, outputs "
            f"{[tuple(value.shape) for _, value in outputs] or 'without floating-point tensors'}; attach to a layer "
            "inside it, or register_term for its type"
        )
    sure = any(layout.sure and layout.rows == rows for layout in layouts_in)
    reads = []
    for (path, value), layout in zip(inputs, layouts_in, strict=True):
        if layout.rows == rows and layout.sure >= sure:
            index, name = _argument(path[0], names)
            reads.append(Port(index, name, _width(value, layout.axes), layout.axes, path[1:]))
    writes = []
    for (path, value), layout in zip(outputs, layouts_out, strict=True):
        if layout.rows == rows:
            key = None if not path else path[0] if len(path) == 1 else path
            shape = tuple(value.shape[axis] for axis in layout.axes)
            writes.append(Write(key, _width(value, layout.axes), layout.axes, shape))
    return site.dense(reads, writes)


def components(value: Tensor, moved: Tensor, tolerance: float, spared: Collection[int] = ()) -> tuple[int, ...]:
    """Find the axes along which a group acts: the norm over them is invariant, the tensor itself is not.

    Args:
        value: A tensor of the example's forward pass.
        moved: The same tensor for the transformed example.
        tolerance: Relative change that counts as none.
        spared: Axes (from the end) that are known to be rows.

    Returns:
        The axes, counted from the end, in order: none for a tensor that does not change, one for vectors, two for
        tensors of second order; also none if no axis explains the change.

    Example:
        >>> import torch
        >>> turn = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        >>> vectors = torch.randn(5, 3, 8)
        >>> components(vectors, torch.einsum("ij,njc->nic", turn, vectors), 1e-4)
        (-2,)
    """
    if value.shape != moved.shape or same(value, moved, tolerance):
        return ()
    sizes = {axis: value.shape[axis] for axis in range(-value.dim() + 1, 0) if axis not in spared}
    candidates = [axis for axis, size in sizes.items() if 1 < size <= LARGEST_COMPONENTS]
    pairs = [(a, b) for a, b in itertools.combinations(candidates, 2) if sizes[a] == sizes[b]]
    for axes in [*((axis,) for axis in reversed(candidates)), *pairs]:
        if same(torch.linalg.vector_norm(value, dim=axes), torch.linalg.vector_norm(moved, dim=axes), tolerance):
            return axes
    return ()


def same(value: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors agree to a relative tolerance of their size."""
    if value.shape != other.shape:
        return False
    scale = torch.linalg.vector_norm(value)
    return bool(torch.linalg.vector_norm(value - other) <= tolerance * scale)


def tolerance_of(value: Tensor) -> float:
    """Relative change that still counts as rounding: some equivariant layers are no better than 1e-5 in float64."""
    eps: float = torch.finfo(value.dtype).eps
    return max(1e-4, math.sqrt(eps))


def _layouts(
    site: Site, tensors: list[tuple[Path, Tensor]], others: list[tuple[Path, Tensor]], read: bool
) -> list[Layout]:
    """The layout of each tensor: rows lead where the model's positions do, vectors and channels are features."""
    moved: dict[Path, Tensor] = {}
    if site.moved is not None:
        source: Any = {**dict(enumerate(site.moved.args)), **site.moved.kwargs} if read else site.moved.output
        moved = dict(tensors_in(source))
    nodes = site.nodes
    sizes = {size for parameter in site.layer.parameters() for size in parameter.shape if size > 1}
    layouts = []
    for path, value in tensors:
        dim = value.dim()
        leading = len(nodes) if nodes and dim > len(nodes) and tuple(value.shape[: len(nodes)]) == nodes else 1
        known = [axis for axis in range(-dim, 0) if value.shape[axis] > 1 and value.shape[axis] in sizes]
        unknown = [axis for axis in range(-dim, 0) if axis not in known and value.shape[axis] in _neighbours(nodes)]
        resized = _resized(value, [other for _, other in others], unknown)
        if resized is not None and resized < -dim + leading:
            leading = 1  # what looked like nodes are channels: a list of vectors is no list of points
        spared = range(-dim, -dim + leading)
        vectors = components(value, moved[path], tolerance_of(value), spared) if path in moved else ()
        free = [axis for axis in range(-dim + leading, 0) if axis not in vectors]
        features = {*vectors, *(axis for axis in free if value.shape[axis] == 1)}
        channel = resized if resized in free else next((axis for axis in reversed(known) if axis in free), None)
        sure = dim == 2 or bool(vectors) or channel in known or (channel is None and bool(features))
        if channel is None and not features:
            if -1 in unknown:
                layouts.append(Layout((), ()))  # an entry for each of the other nodes: no features at all
                continue
            channel, sure = -1, dim == 2 or any(other.shape == value.shape for _, other in others)
        axes = tuple(sorted(features if channel is None else {*features, channel}))
        rows = tuple(value.shape[axis] for axis in range(-dim, 0) if axis not in axes)
        layouts.append(Layout(axes, rows, sure, bool(vectors)))
    return layouts


def _resized(value: Tensor, others: list[Tensor], spared: Collection[int]) -> int | None:
    """The one axis, counted from the end, in which a tensor differs from what the layer makes of it: the channels."""
    for other in others:
        if other.dim() == value.dim():
            differing = [axis for axis in range(-value.dim(), 0) if other.shape[axis] != value.shape[axis]]
            # scalars beside vectors have 1 component, not 1 channel
            channels = [axis for axis in differing if 1 not in (value.shape[axis], other.shape[axis])]
            if len(differing) == len(channels) == 1 and channels[0] not in (-value.dim(), *spared):
                return channels[0]
    return None


def _neighbours(nodes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of an axis that may hold the other nodes."""
    return (nodes[-1], nodes[-1] - 1) if nodes else ()


def _as_shown(
    tensors: list[tuple[Path, Tensor]],
    layouts: list[Layout],
    others: list[tuple[Path, Tensor]],
    other_layouts: list[Layout],
) -> list[Layout]:
    """Layouts in which a tensor that shows no components has that of one of its shape on the other side that does.

    The vectors that enter a first layer may be zero still, or spherical tensors have their scalars only.
    """
    shown = {value.shape: layout for (_, value), layout in zip(others, other_layouts, strict=True) if value.any()}
    result = []
    for (_, value), own in zip(tensors, layouts, strict=True):
        layout, other = own, shown.get(value.shape)
        if other is not None and not layout.moves and (other.moves or not value.any()):
            layout = other
        result.append(layout)
    return result


def _shared_rows(site: Site, inputs: list[Layout], outputs: list[Layout]) -> tuple[int, ...] | None:
    """The rows that inputs and outputs have in common: those of the nodes if they can be, else of the first output."""
    available = {layout.rows for layout in inputs if layout.axes}
    shared = [layout.rows for layout in outputs if layout.rows in available]
    shared.sort(key=lambda rows: rows != site.nodes)
    return shared[0] if shared else None


def _argument(key: int | str, names: list[str]) -> tuple[int, str]:
    if isinstance(key, int):
        return key, names[key] if key < len(names) else ""
    return names.index(key) if key in names else sys.maxsize, key


def _width(value: Tensor, axes: tuple[int, ...]) -> int:
    width = 1
    for axis in axes:
        width *= value.shape[axis]
    return width


def _is_features(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 2 and value.numel() > 0
