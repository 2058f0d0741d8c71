"""Relaxation terms: what is added to a layer, and which layer type gets which.

A term is a module that is called with the arguments of its layer and returns what is to be added to the
layer's output: one tensor, or a tuple or dict with an entry for each output that changes. ``DenseTerm`` is
the term that fits most layers; ``register_term`` teaches ace a new layer type.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ace.errors import AceError, NotAttachable

Make = Callable[[int, int], nn.Module]
"""Makes the map of a term from its numbers of input and output features."""


class Call(NamedTuple):
    """One recorded call of a layer: its arguments and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Port:
    """An argument of a layer that its term reads, by position or by name."""

    index: int
    name: str
    width: int

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the argument, tensor of shape (..., width)."""
        value: Tensor = args[self.index] if self.index < len(args) else kwargs[self.name]
        return value


@dataclass(frozen=True)
class Write:
    """An output of a layer that its term changes: the output itself (None), or a place in a tuple or dict."""

    key: int | str | None
    width: int


class Positions(nn.Module):
    """The raw positions of the current forward pass, captured from the inputs of the whole model.

    Beside a layer that sees only invariant features a term on those features breaks no symmetry; with the
    positions as a second input it does. Registered once at the root of the model and shared by the terms.
    """

    def __init__(self, select: str | int | Callable[..., Tensor], width: int) -> None:
        super().__init__()
        self.select = select
        self.width = width
        self.value: Tensor | None = None

    def capture(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: remember the positions."""
        del model
        self.value = select_argument(self.select, args, kwargs)

    def release(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model: let the positions go, so that no graph is kept alive."""
        del model, args, output
        self.value = None

    def forward(self, stage: Any) -> Any:
        """Do nothing: a ``Sequential`` runs every child, so a child must be the identity."""
        return stage

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "value": None}  # never pickle or copy a tensor of a running graph


def select_argument(
    select: str | int | Callable[..., Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor:
    """Return the tensor among a model's inputs that ``select`` names (position, keyword, attribute, function)."""
    value: Any
    if callable(select):
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

    It mixes the components of all irreps freely, so it commutes with no group action: published as the
    dense branch of Pertigkiozoglou et al. (NeurIPS 2024, eq. 1).

    Args:
        reads: The arguments whose last axes are concatenated; their leading axes must broadcast.
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

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the concatenated features that the map reads, shape (..., features in)."""
        values = [port(args, kwargs) for port in self.reads]
        if self.positions is not None:
            if self.positions.value is None:
                raise AceError(
                    "a relaxation term takes the positions, but its layer was run outside of the model "
                    "that was relaxed: call the whole model"
                )
            values.append(self.positions.value)
        if len(values) == 1:
            return values[0]
        rows = torch.broadcast_shapes(*(value.shape[:-1] for value in values))
        return torch.cat([value.expand(*rows, value.shape[-1]) for value in values], dim=-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is added to the layer's output, in the structure of that output."""
        change = self.map(self.inputs(args, kwargs))
        if self.writes[0].key is None:
            return change
        parts = change.split([write.width for write in self.writes], dim=-1)
        return {write.key: part for write, part in zip(self.writes, parts, strict=True)}


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
            with torch.no_grad():
                v = nn.functional.normalize(self.weight.T @ u, dim=0)
                u = nn.functional.normalize(self.weight @ v, dim=0)
                self.u.copy_(u)
                self.v.copy_(v)
        sigma = torch.dot(u, self.weight @ v)
        return nn.functional.linear(input, self.weight / sigma, self.bias)


MAPS: dict[str, Make] = {"linear": linear, "mlp": MLP, "spectral": SpectralLinear}
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
    """

    path: str
    layer: nn.Module
    call: Call | None
    make: Make
    positions: Positions | None

    def dense(self, reads: list[Port], writes: list[Write]) -> DenseTerm:
        """Make the dense term with these inputs and outputs, plus the positions where the rows agree."""
        positions = self.positions
        if positions is not None and positions.value is not None and self.call is not None:
            rows = reads[0](self.call.args, self.call.kwargs).shape[:-1]
            positions = positions if positions.value.shape[:-1] == rows else None
        return DenseTerm(reads, writes, self.make, positions)


class TermFactory(Protocol):
    """Makes the term of a layer."""

    def __call__(self, site: Site) -> nn.Module:
        """Return a module that is called with the layer's arguments."""


_FACTORIES: dict[type[nn.Module], TermFactory] = {}
_HOSTS = {"e3nn": "ace.hosts.e3nn", "torch_geometric": "ace.hosts.pyg"}


def register_term(*types: type[nn.Module]) -> Callable[[TermFactory], TermFactory]:
    """Register how the relaxation term of a layer type is made; subclasses inherit it.

    The decorated function receives a ``Site`` (path, layer, recorded call, chosen map) and returns a module
    that is called with the layer's arguments and returns what to add to its output.

    Args:
        types: The layer types.

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
        return factory

    return decorate


def registered_factory(layer: nn.Module) -> TermFactory | None:
    """Return the factory registered for the nearest base class of a layer, or None."""
    return next((_FACTORIES[base] for base in type(layer).__mro__ if base in _FACTORIES), None)


def registered_types() -> tuple[type[nn.Module], ...]:
    """Return the layer types that have a registered term, after loading the rules of the imported libraries.

    Example:
        >>> import e3nn.o3
        >>> e3nn.o3.Linear in registered_types()
        True
    """
    for library, rules in _HOSTS.items():
        if library in sys.modules:
            importlib.import_module(rules)
    return tuple(_FACTORIES)


def generic_term(site: Site) -> nn.Module:
    """Make a dense term from the shapes seen when the example ran: the fall-back for any layer.

    Written are the floating-point outputs whose leading axes are those of at least one floating-point
    input; read are all floating-point inputs with the same leading axes.

    Args:
        site: The layer and its recorded call.

    Returns:
        A ``DenseTerm``.

    Raises:
        NotAttachable: Without an example, or where no input has the rows of an output.
    """
    if site.call is None:
        raise NotAttachable(
            f"the sizes of a {type(site.layer).__name__}'s term are read off a call: pass relax(..., example=batch)"
        )
    args, kwargs, output = site.call
    names = list(inspect.signature(site.layer.forward).parameters)
    inputs = [(index, names[index] if index < len(names) else "", value) for index, value in enumerate(args)]
    inputs += [(names.index(name) if name in names else sys.maxsize, name, value) for name, value in kwargs.items()]
    tensors = [(index, name, value) for index, name, value in inputs if _is_features(value)]
    rows = {value.shape[:-1] for _, _, value in tensors}
    changed = [(key, value) for key, value in _leaves(output) if _is_features(value) and value.shape[:-1] in rows]
    if not changed:
        raise NotAttachable(
            "no output has the leading axes of an input, so no row-wise term fits: inputs "
            f"{[tuple(value.shape) for _, _, value in tensors] or 'without floating-point tensors'}, outputs "
            f"{[tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for _, v in _leaves(output)]}; attach "
            "to a layer inside it, or register_term for its type"
        )
    shape = changed[0][1].shape[:-1]
    reads = [Port(index, name, value.shape[-1]) for index, name, value in tensors if value.shape[:-1] == shape]
    writes = [Write(key, value.shape[-1]) for key, value in changed if value.shape[:-1] == shape]
    return site.dense(reads, writes)


def _is_features(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 and value.shape[-1] > 0


def _leaves(output: Any) -> list[tuple[int | str | None, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    return [(None, output)]
