"""Relaxation terms: what is added to a layer, and which layer type gets which.

A term is a module that is called with the arguments of its layer and returns what is to be added to the
layer's output: one tensor, or a container with an entry for each part that changes. ``DenseTerm`` is the term
that fits most layers; ``register_term`` teaches ace a new layer type.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ace.calls import Path, parts_of, tensors_in
from ace.errors import AceError

Make = Callable[[int, int], nn.Module]
"""Makes the map of a term from its numbers of input and output features."""


class Call(NamedTuple):
    """One recorded call of a layer: its arguments and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Port:
    """A tensor among the arguments of a layer that its term reads.

    Attributes:
        index: Position of the argument.
        name: Its name, for when it is passed by keyword.
        width: Number of features: the product of the feature axes.
        axes: The feature axes, counted from the end, in order; the other axes are rows.
        inside: Where the tensor lies inside the argument, if that is a container.
    """

    index: int
    name: str
    width: int
    axes: tuple[int, ...] = (-1,)
    inside: Path = ()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the argument with its feature axes flattened, tensor of shape (..., width)."""
        value: Any = args[self.index] if self.index < len(args) else kwargs[self.name]
        for key in self.inside:
            parts = parts_of(value)
            assert parts is not None
            value = parts[key]
        tensor: Tensor = value
        return rows_first(tensor, self.axes)


@dataclass(frozen=True)
class Write:
    """A tensor in the output of a layer that its term changes.

    Attributes:
        key: Where it lies in the output: None for the output itself, a key of a tuple or dict, or a path of keys.
        width: Number of features: the product of the feature axes.
        axes: The feature axes, counted from the end, in order; the other axes are rows.
        shape: Sizes of the feature axes; the width alone where that is the last axis.
    """

    key: Any
    width: int
    axes: tuple[int, ...] = (-1,)
    shape: tuple[int, ...] = ()

    def __call__(self, features: Tensor) -> Tensor:
        """Return features of shape (..., width) in the layout of the output."""
        if self.axes == (-1,):
            return features
        rows = features.dim() - 1
        apart = features.unflatten(-1, self.shape)
        output: Tensor = apart.movedim(tuple(range(rows, apart.dim())), self.axes)
        return output


def rows_first(value: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Move the feature axes of a tensor to the end and flatten them.

    Example:
        >>> rows_first(torch.ones(2, 5, 3, 7), (-3, -2)).shape
        torch.Size([2, 7, 15])
    """
    if axes == (-1,):
        return value
    last = tuple(range(-len(axes), 0))
    features: Tensor = value.movedim(axes, last).flatten(-len(axes))
    return features


Select = str | int | Port | Callable[..., Tensor]
"""How the positions are found among a model's inputs: position, keyword, attribute, port, or function."""


class Positions(nn.Module):
    """The raw positions of the current forward pass, captured from the inputs of the whole model.

    Beside a layer that sees only invariant features a term on those features breaks no symmetry; with the
    positions as a second input it does. Registered once at the root of the model and shared by the terms.
    The last positions are kept until the next forward pass, since activation checkpointing runs layers again in the
    backward pass; before that reaches the layers of an earlier forward pass, the positions of that one are put back.
    """

    def __init__(self, select: Select, width: int) -> None:
        super().__init__()
        self.select = select
        self.width = width
        self._value: Tensor | None = None
        self._read = False

    @property
    def value(self) -> Tensor | None:
        """The positions of the last forward pass; once read, they are put back when its gradient comes."""
        self._read = True
        return self._value

    @value.setter
    def value(self, value: Tensor | None) -> None:
        self._value = value

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: remember the positions."""
        del model
        self._value = select_argument(self.select, args, kwargs)
        self._read = False

    def follow(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: when the gradient comes back to this pass, so do its positions."""
        del model, args
        if torch.compiler.is_compiling() or not self._read:  # a compiled graph keeps what it runs again together
            return
        value = self._value

        def put_back(gradient: Tensor) -> None:
            del gradient
            self._value = value

        for _, tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(put_back)

    def forward(self, stage: Any) -> Any:
        """Do nothing: a ``Sequential`` runs every child, so a child must be the identity."""
        return stage

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_value": None}  # never pickle or copy a tensor of a running graph


def select_argument(select: Select, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the tensor among a model's inputs that ``select`` names (position, keyword, attribute, port, function)."""
    value: Any
    if isinstance(select, Port):
        value = select(args, kwargs)
    elif callable(select):
        value = select(*args, **kwargs)
    elif isinstance(select, int):
        value = args[select]
    elif select in kwargs:
        value = kwargs[select]
    else:
        value = next((getattr(arg, select) for arg in args if hasattr(arg, select)), None)
    if not isinstance(value, Tensor):
        raise AceError(
            f"positions={select!r} names no tensor among the model's inputs ({len(args)} positional, "
            f"keywords {sorted(kwargs)}): pass an index, a keyword, an attribute of an input, or a function of "
            "the inputs that returns them"
        )
    return value


class DenseTerm(nn.Module):
    r"""A dense map on the concatenated features of a layer's inputs, one row at a time.

    .. math:: f_\mathrm{neq}(x_1, x_2, \dots) = \mathrm{map}([x_1, x_2, \dots])

    Features are the channels together with the components of vectors and tensors, wherever their axes are; rows
    are the other axes: batch, nodes, edges, points.

    It mixes the components of all irreps freely, so it commutes with no group action: published as the
    dense branch of Pertigkiozoglou et al. (NeurIPS 2024, eq. 1).

    Args:
        reads: The arguments whose features are concatenated; their rows must broadcast.
        writes: The outputs that receive the result, in order.
        make: Makes the map from (features in, features out).
        positions: Where the model's positions are captured, if they are a further input.

    Example:
        >>> import torch
        >>> term = DenseTerm([Port(0, "x", 3)], [Write(None, 2)], torch.nn.Linear)
        >>> term(torch.ones(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        reads: list[Port],
        writes: list[Write],
        make: Make,
        positions: Positions | None = None,
    ) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.writes = tuple(writes)
        self.positions = positions
        width = sum(port.width for port in reads) + (positions.width if positions is not None else 0)
        self.map = make(width, sum(write.width for write in writes))

    @property
    def feature_axes(self) -> dict[Path, tuple[int, ...]]:
        """The feature axes of each output that is changed, by its path."""
        keys = [() if w.key is None else w.key if isinstance(w.key, tuple) else (w.key,) for w in self.writes]
        return {key: write.axes for key, write in zip(keys, self.writes, strict=True)}

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the concatenated features that the map reads, shape (..., features in)."""
        values = [port(args, kwargs) for port in self.reads]
        rows = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
        if self.positions is not None:
            positions = self.positions.value
            if positions is None:
                raise AceError(
                    "a relaxation term takes the positions, but its layer was run outside of the model "
                    "that was relaxed: call the whole model"
                )
            values.append(positions.to(values[0].dtype).reshape(*rows, self.positions.width))
        if len(values) == 1:
            return values[0]
        return torch.cat([value.expand(*rows, value.shape[-1]) for value in values], dim=-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is added to the layer's output, in the structure of that output."""
        change = self.map(self.inputs(args, kwargs))
        if self.writes[0].key is None:
            return self.writes[0](change)
        changes: dict[Any, Any] = {}
        for write, part in zip(self.writes, change.split([write.width for write in self.writes], dim=-1), strict=True):
            *outer, last = write.key if isinstance(write.key, tuple) else (write.key,)
            place = changes
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = write(part)
        return changes


START = 0.1
"""Size of the last layer of a linear or MLP term at the start, relative to PyTorch's initialisation: the relaxed model
starts near the plain one, so that γ is judged by what the term learns and not by random weights."""


def linear(features_in: int, features_out: int) -> nn.Linear:
    """Return a dense layer that starts small."""
    layer = nn.Linear(features_in, features_out)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(START)
    return layer


class MLP(nn.Sequential):
    """Two dense layers with a SiLU between them, the second small; hidden width is the larger of input and output."""

    def __init__(self, features_in: int, features_out: int) -> None:
        hidden = max(features_in, features_out)
        super().__init__(nn.Linear(features_in, hidden), nn.SiLU(), linear(hidden, features_out))


class SpectralLinear(nn.Linear):
    r"""A dense layer whose weight is divided by its largest singular value, :math:`Wx/\sigma(W) + b`.

    The singular value comes from one step of power iteration a training call (Miyato et al., ICLR 2018), on
    vectors kept in buffers. Our own because the parametrization of PyTorch cannot be pickled.
    """

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__(features_in, features_out)
        self.u: Tensor
        self.v: Tensor
        left, _, right = torch.linalg.svd(self.weight.detach(), full_matrices=False)
        self.register_buffer("u", left[:, 0].clone())
        self.register_buffer("v", right[0].clone())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear uses)
        """Return the map of ``input``, shape (..., features out)."""
        u, v = self.u, self.v
        if self.training:
            u, v = power_iteration(self.weight, u)
            self.u.copy_(u)
            self.v.copy_(v)
        return nn.functional.linear(input, self._divided(self.weight, u, v), self.bias)

    def _divided(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        divided: Tensor = weight / torch.dot(u, weight @ v)
        return divided

    @property
    def matrix(self) -> Tensor:
        """The weight divided by the singular value."""
        return self._divided(whole(self.weight), self.u, self.v)


@torch.no_grad()
def power_iteration(matrix: Tensor, u: Tensor, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Return estimates (u, v) of the first singular vectors, from an estimate of the left one."""
    v = u
    for _ in range(steps):
        v = nn.functional.normalize(matrix.T @ u, dim=0)
        u = nn.functional.normalize(matrix @ v, dim=0)
    return u, v


SMALL = 64
"""Least side of a matrix up to which its operator norm is computed exactly."""
POWER_STEPS = 4
"""Steps of power iteration for larger ones, each time that the norm is asked for."""


def operator_norm(matrix: Tensor, start: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the largest singular value of a matrix, with its graph.

    Args:
        matrix: Any matrix.
        start: What this function returned beside the norm the last time, when the matrix was about the same.

    Returns:
        The norm: exact where the smaller side has at most 64 rows or columns, else by power iteration that goes on
        from ``start``, which is never too large. And where to start the next time, None if exact.

    Example:
        >>> operator_norm(torch.diag(torch.tensor([3.0, 4.0])))
        (tensor(4.), None)
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if min(matrix.shape) <= SMALL:
        return torch.linalg.matrix_norm(matrix, ord=2), None
    if start is None:
        start = torch.linalg.svd(matrix.detach(), full_matrices=False)[0][:, 0].contiguous()
    u, v = power_iteration(matrix.detach(), start, POWER_STEPS)
    return torch.dot(u, matrix @ v), u


def whole(weight: Tensor) -> Tensor:
    """Return a weight as one tensor, also where ``fully_shard`` has divided it over the processes."""
    joined: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return joined


def matrix_of(term: nn.Module) -> Tensor | None:
    """Return the matrix of a term that is one linear map, but for its bias; None if it is not.

    A term is judged by its attribute ``map``, as that of ``DenseTerm``, or by itself if it has none. Of a convolution
    it is the map of one patch.

    Example:
        >>> matrix_of(low_rank(2)(5, 4)).shape, matrix_of(MLP(3, 3))
        (torch.Size([4, 5]), None)
    """
    inner = getattr(term, "map", term)
    if isinstance(matrix := getattr(inner, "matrix", None), Tensor):
        return matrix
    if isinstance(inner, nn.Linear) and type(inner).forward is nn.Linear.forward:
        return whole(inner.weight)
    if not isinstance(inner, nn.Sequential):
        return None
    product: Tensor | None = None
    for layer in inner:
        factor = matrix_of(layer)
        if factor is None:
            return None
        product = factor if product is None else factor @ product
    return product


WIDE = 2**17
"""Weights of a full matrix above which a linear term has low rank, unless the user says otherwise."""
RANK = 32
"""Rank of the linear terms of such wide layers: without it they had many times the weights of the model itself."""


def linear_or_low_rank(features_in: int, features_out: int) -> nn.Module:
    """Return a dense map, of rank ``RANK`` if a full matrix had more than ``WIDE`` weights."""
    wide = features_in * features_out > WIDE
    return low_rank(RANK)(features_in, features_out) if wide else linear(features_in, features_out)


def low_rank(rank: int) -> Make:
    """Return a maker of dense maps of a given rank, for layers so wide that a full matrix costs too much.

    The map is two linear layers with ``rank`` features between them, where that is less than a full matrix.

    Args:
        rank: Largest rank of the maps.

    Returns:
        A function (features in, features out) -> module.

    Example:
        >>> low_rank(4)(100, 50)
        Sequential(
          (0): Linear(in_features=100, out_features=4, bias=False)
          (1): Linear(in_features=4, out_features=50, bias=True)
        )
    """

    def make(features_in: int, features_out: int) -> nn.Module:
        if rank * (features_in + features_out) >= features_in * features_out:
            return linear(features_in, features_out)
        return nn.Sequential(nn.Linear(features_in, rank, bias=False), linear(rank, features_out))

    return make


MAPS: dict[str, Make] = {"linear": linear_or_low_rank, "mlp": MLP, "spectral": SpectralLinear}
"""The maps that ``relax(term=...)`` knows by name."""


@dataclass(frozen=True)
class Site:
    """A layer that is to receive a term.

    Attributes:
        path: Its path in the model.
        layer: The layer.
        call: How the example ran through it, or None without an example.
        make: Makes the dense map that the user chose.
        positions: The positions, if terms are to read them as well.
        moved: The same call with the example transformed, where ace knows how.
        nodes: Leading axes of the model's positions, () if unknown.
    """

    path: str
    layer: nn.Module
    call: Call | None
    make: Make
    positions: Positions | None
    moved: Call | None = None
    nodes: tuple[int, ...] = ()

    def dense(self, reads: list[Port], writes: list[Write]) -> DenseTerm:
        """Make the dense term with these inputs and outputs, plus the positions where the rows agree."""
        positions = self.positions
        if positions is not None and positions.value is not None and self.call is not None:
            rows = reads[0](self.call.args, self.call.kwargs).shape[:-1]
            positions = positions if positions.value.shape[:-1].numel() == rows.numel() else None
        return DenseTerm(reads, writes, self.make, positions)


class TermFactory(Protocol):
    """Makes the term of a layer."""

    def __call__(self, site: Site) -> nn.Module:
        """Return a module that is called with the layer's arguments."""


_FACTORIES: dict[type[nn.Module], TermFactory] = {}
_ON_REQUEST: set[type[nn.Module]] = set()
_HOSTS = {
    "e3nn": "ace.hosts.e3nn",
    "torch_geometric": "ace.hosts.pyg",
    "escnn": "ace.hosts.escnn",
    "cuequivariance_torch": "ace.hosts.cuequivariance",
}


def register_term(*types: type[nn.Module], default: bool = True) -> Callable[[TermFactory], TermFactory]:
    """Register how the relaxation term of a layer type is made; subclasses inherit it.

    The decorated function receives a ``Site`` (path, layer, recorded call, chosen map) and returns a module
    that is called with the layer's arguments and returns what to add to its output.

    Args:
        types: The layer types.
        default: Whether ``relax`` chooses these layers by itself; otherwise only when ``layers=`` names them.

    Returns:
        A decorator that leaves the function as it is.

    Example:
        >>> import ace, torch
        >>> class Doubled(torch.nn.Linear):
        ...     pass
        >>> @ace.register_term(Doubled)
        ... def doubled_term(site):
        ...     return torch.nn.Linear(site.layer.in_features, site.layer.out_features)
        >>> model = ace.relax(torch.nn.Sequential(Doubled(2, 3)))
        >>> list(ace.relaxations(model))
        ['0']
    """

    def decorate(factory: TermFactory) -> TermFactory:
        for layer_type in types:
            _FACTORIES[layer_type] = factory
            _ON_REQUEST.discard(layer_type)
            if not default:
                _ON_REQUEST.add(layer_type)
        return factory

    return decorate


def registered_factory(layer: nn.Module) -> TermFactory | None:
    """Return the factory registered for the nearest base class of a layer, or None."""
    return next((_FACTORIES[base] for base in type(layer).__mro__ if base in _FACTORIES), None)


def is_default(layer: nn.Module) -> bool:
    """Whether a layer of a registered type is one that ``relax`` chooses by itself."""
    return next((base not in _ON_REQUEST for base in type(layer).__mro__ if base in _FACTORIES), False)


def registered_types() -> tuple[type[nn.Module], ...]:
    """Return the layer types that have a registered term, after loading the rules of the imported libraries.

    Example:
        >>> import e3nn.o3
        >>> e3nn.o3.Linear in registered_types()
        True
    """
    load_hosts()
    return tuple(_FACTORIES)


def load_hosts() -> None:
    """Load the rules of those libraries that are imported."""
    for library, rules in _HOSTS.items():
        if library in sys.modules:
            importlib.import_module(rules)
