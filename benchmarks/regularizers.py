"""Regularisers that pull relaxation terms towards equivariant maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

import ace
from ace.distributed import total
from ace.groups import SO3, Cyclic, Dihedral, Group, Inversion, Octahedral, act, act_generator
from ace.terms import matrix_of


class LieRegularizer:
    r"""Regulariser of the dense maps of all relaxation terms.

    Equations 3 to 5 of Pertigkiozoglou et al. (NeurIPS 2024), with the input x of each term detached, so that
    they act on the term only and not on what comes before it:

    .. math::

        R_l &= \sum_n \sum_{a=1}^{3} \| W_l A^\mathrm{in}_a x_{l,n} - A^\mathrm{out}_a (W_l x_{l,n} + b_l) \|^2,
        \qquad N_l = \sum_n \| W_l x_{l,n} + b_l \|^2 \\
        r &= \sqrt{\textstyle\sum_l R_l} + \sqrt{\textstyle\sum_l N_l}

    A_a are the generators of the rotations on the term's input and output; the sums run over all rows n of
    the batch. A bias is part of the map, so that r = 0 in its first part exactly where the map is equivariant.

    Args:
        relaxed: A relaxed model whose terms are linear.
        reads: Layer -> e3nn irreps of the concatenated inputs of its term.
        writes: Layer -> e3nn irreps of the concatenated outputs.

    Example:
        >>> relaxed = ace.relax(nn.Linear(3, 3), layers=nn.Linear, example=torch.ones(5, 3))
        >>> regularizer = LieRegularizer(relaxed, lambda layer: "1x1o", lambda layer: "1x1o")
        >>> dense = relaxed.relaxation.term.map
        >>> _ = nn.init.eye_(dense.weight), nn.init.zeros_(dense.bias)  # commutes with rotations
        >>> _ = relaxed(torch.ones(5, 3))
        >>> derivative, norm = regularizer.parts()
        >>> derivative.item() < 1e-6, round(norm.item() ** 2)
        (True, 15)
    """

    def __init__(self, relaxed: nn.Module, reads: Callable[[Any], str], writes: Callable[[Any], str]) -> None:
        self._terms: list[tuple[nn.Linear, list[Tensor], Tensor, Tensor]] = []
        for path, relaxation in ace.relaxations(relaxed).items():
            layer, dense, seen = relaxed.get_submodule(path), relaxation.term.map, list[Tensor]()
            into, out = (_generators(types(layer), dense.weight) for types in (reads, writes))
            self._terms.append((dense, seen, into, out))
            dense.register_forward_pre_hook(partial(_remember, seen))

    def parts(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Return the two roots for the inputs seen since the last call, of all processes; tensors without axes.

        Args:
            copies: How many processes saw the same inputs, which then count once.
        """
        derivatives, norms = [], []
        for dense, seen, into, out in self._terms:
            x = torch.cat(seen)
            seen.clear()
            weight, bias = dense.weight.T, dense.bias
            # x Aᵀ_in Wᵀ - (x Wᵀ + b) Aᵀ_out, where the product of the matrices is cheaper than that of the rows
            derivative = x @ (into @ weight - weight @ out) - (bias @ out)[:, None]
            derivatives.append(derivative.square().sum())
            norms.append((x @ weight + bias).square().sum())
        derivative, norm = total(torch.stack((torch.stack(derivatives).sum(), torch.stack(norms).sum()))) / copies
        return _root(derivative), _root(norm)


class TurnRegularizer:
    r"""The regulariser of Pertigkiozoglou et al. (NeurIPS 2024) for convolutions, where the group is finite.

    Their form for images: an element of the group in place of generators, the weights in place of their outputs,

    .. math::

        r = \sum_l \| W_l - g W_l \| + \sum_l \| W_l \|, \qquad
        (g W)(\Delta) = \rho^\mathrm{out}(g)\, W(g^{-1} \Delta)\, \rho^\mathrm{in}(g)^{-1}

    W the kernel, a matrix for each pixel Δ, and its bias, g the smallest quarter turn of the group. As g generates the
    quarter turns, the first part is 0 exactly where the convolution is equivariant to them.

    Args:
        relaxed: A relaxed model whose terms are linear maps of patches.
        turns: Layer -> number of quarter turns, counterclockwise -> the orthogonal matrices of the turn on the channels
            that are read and on those that are written.

    Example:
        >>> relaxed = ace.relax(nn.Linear(9, 1), layers=nn.Linear, example=torch.ones(1, 9))  # one patch of 3 × 3
        >>> scalars = {number: ([[1.0]], [[1.0]]) for number in range(4)}
        >>> regularizer = TurnRegularizer(relaxed, lambda layer: scalars)
        >>> dense = relaxed.relaxation.term.map
        >>> _ = nn.init.ones_(dense.weight), nn.init.zeros_(dense.bias)
        >>> difference, norm = regularizer.parts()
        >>> difference.item() < 1e-6, norm.item()
        (True, 3.0)
    """

    def __init__(self, relaxed: nn.Module, turns: Callable[[Any], Mapping[int, tuple[Any, Any]]]) -> None:
        self._terms: list[tuple[nn.Module, int, tuple[Tensor, Tensor]]] = []
        for path, relaxation in ace.relaxations(relaxed).items():
            group, (weight, _) = turns(relaxed.get_submodule(path)), _affine(relaxation.term)
            number = min(filter(None, group), default=0)
            self._terms.append((relaxation.term, number, _matrices_of_turn(group[number], weight)))

    def parts(self, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Return the two sums; tensors without axes. They do not depend on inputs, nor on how many ``copies`` read."""
        del copies
        differences, norms = [], []
        for term, number, (into, out) in self._terms:
            weight, bias = _affine(term)
            kernel = _kernel(weight, len(into))
            turned = _turned(number, into, out, kernel, bias)
            differences.append(_norm(kernel - turned[0], bias - turned[1]))
            norms.append(_norm(kernel, bias))
        return torch.stack(differences).sum(), torch.stack(norms).sum()


class ProjectionRegularizer:
    r"""Distance of the dense maps of all relaxation terms from the equivariant ones.

    .. math:: r = \sum_l \sum_j c_j \| T_l - P_j(T_l) \|, \qquad
        P_j(T) = \int_{G_j} D^\mathrm{out}(g)^{-1}\, T\, D^\mathrm{in}(g)\, dg

    the Frobenius norm of weight and bias minus their Reynolds projection: the nearest map equivariant to G_j.

    Args:
        relaxed: A relaxed model whose terms are linear.
        projections: Layer and weight of its term, shape (out, in) -> pairs of c_j and P_j.

    Example:
        >>> relaxed = ace.relax(nn.Linear(3, 3), layers=nn.Linear, example=torch.ones(5, 3))
        >>> vectors = lambda layer, weight: [(1.0, on_irreps("1o", "1o", weight))]
        >>> regularizer = ProjectionRegularizer(relaxed, vectors)
        >>> dense = relaxed.relaxation.term.map
        >>> _ = nn.init.eye_(dense.weight), nn.init.zeros_(dense.bias)
        >>> regularizer.distance().item() < 1e-12
        True
        >>> _ = nn.init.ones_(dense.weight)  # the projection keeps the diagonal, six ones are left
        >>> round(regularizer.distance().item() ** 2, 4)
        6.0
    """

    def __init__(
        self, relaxed: nn.Module, projections: Callable[[Any, Tensor], Sequence[tuple[float, Projection]]]
    ) -> None:
        self._terms: list[tuple[nn.Module, Sequence[tuple[float, Projection]]]] = []
        for path, relaxation in ace.relaxations(relaxed).items():
            layer, term = relaxed.get_submodule(path), relaxation.term
            self._terms.append((term, projections(layer, _affine(term)[0].detach())))

    def distance(self) -> Tensor:
        """Return r; a tensor without axes."""
        distances = []
        for term, projections in self._terms:
            weight, bias = _affine(term)
            for factor, projection in projections:
                kept = projection(weight, bias)
                distances.append(factor * _norm(weight - kept[0], bias - kept[1]))
        return torch.stack(distances).sum()


Projection = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From weight, shape (out, in), and bias of a linear map to those of the nearest equivariant one."""

Z = (0.0, 0.0, 1.0)
GROUP = r"o3|so3|so2|octahedral|inversion|[cd][1-9]\d*"
"""Names of the groups that ``on_irreps`` knows, as a regular expression: c4 is C_4, d4 is D_4."""


def on_irreps(
    reads: str, writes: str, weight: Tensor, group: str = "o3", axis: tuple[float, float, float] = Z
) -> Projection:
    r"""Make the projection onto the maps between irreps that are equivariant to a group.

    By Schur's lemma for O(3) and SO(3), and for the others by the mean over their elements,

    .. math:: P(T) = \frac{1}{|G|} \sum_{g \in G} D^\mathrm{out}(g)^{-1}\, T\, D^\mathrm{in}(g),

    for SO(2) over more than 2 l equidistant angles, l the largest degree: exact, since a product of two matrix
    elements turns with at most that frequency.

    Args:
        reads: e3nn irreps of the input.
        writes: e3nn irreps of the output.
        weight: Has the dtype and the device of what will be projected.
        group: ``o3``, ``so3``, ``so2``, ``octahedral``, ``inversion``, ``c4`` (any number) or ``d4``.
        axis: Of ``so2``, ``c4`` and ``d4``.

    Example:
        >>> weight, bias = torch.ones(3, 3), torch.ones(3)
        >>> kept, kept_bias = on_irreps("1o", "1o", weight, "so2")(weight, bias)
        >>> kept_bias.abs() > 1e-6  # x, y, z
        tensor([False, False,  True])
    """
    into, out, one = o3.Irreps(reads), o3.Irreps(writes), o3.Irreps("0e")
    if group == "so3":
        into, out = (o3.Irreps([(mul, (ir.l, 1)) for mul, ir in irreps]) for irreps in (into, out))
    if group in {"o3", "so3"}:
        weights, biases = (partial(project, reads=types, writes=out) for types in (into, one))
    else:
        mean = _finite(group, axis, max(into.lmax, out.lmax))
        weights, biases = (Average(*mean, types, out, weight) for types in (into, one))

    def projected(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weights(weight), biases(bias[:, None])[:, 0]

    return projected


def not_from(positions: slice, projection: Projection) -> Projection:
    """Make a projection keep no weight that reads positions: what a layer adds must not move with translations."""

    def projected(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        kept, kept_bias = projection(weight, bias)
        kept[:, positions] = 0
        return kept, kept_bias

    return projected


def on_pixels(turns: Mapping[int, tuple[Any, Any]], weight: Tensor) -> Projection:
    r"""Make the projection onto the convolutions that are equivariant to quarter turns.

    .. math:: P(W)(\Delta) = \frac{1}{|G|} \sum_{g \in G}
        \rho^\mathrm{out}(g)\, W(g^{-1} \Delta)\, \rho^\mathrm{in}(g)^{-1}

    W the kernel, a matrix for each pixel Δ; exact, as quarter turns move pixels to pixels.

    Args:
        turns: Number of quarter turns, counterclockwise -> the orthogonal matrices of the turn on the channels that are
            read and on those that are written. The numbers are those of a group.
        weight: Shape (out, in · pixels); has the dtype and the device of what will be projected.

    Example:
        >>> turns = {number: ([[1.0]], [[1.0]]) for number in range(4)}  # scalars
        >>> weight = torch.tensor([[8.0, 1, 2, 3, 4, 5, 6, 7, 0]])
        >>> on_pixels(turns, weight)(weight, torch.ones(1))
        (tensor([[4., 4., 4., 4., 4., 4., 4., 4., 4.]]), tensor([1.]))
    """
    halves = [(number, *_matrices_of_turn(turns[number], weight)) for number in (2, 1) if number in turns]
    channels = len(turns[0][0])

    def projected(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        kept = _kernel(weight, channels), bias
        for turn in halves:  # with r a quarter turn, 1 + r + r² + r³ = (1 + r)(1 + r²)
            kept = tuple((one + other) / 2 for one, other in zip(kept, _turned(*turn, *kept), strict=True))
        return kept[0].flatten(1), kept[1]

    return projected


def _matrices_of_turn(matrices: tuple[Any, Any], weight: Tensor) -> tuple[Tensor, Tensor]:
    into, out = (torch.as_tensor(matrix).to(weight) for matrix in matrices)
    return into, out


def _kernel(weight: Tensor, channels: int) -> Tensor:
    """The map of a square patch as a kernel, shape (out, in, rows, columns)."""
    side = math.isqrt(weight.shape[1] // channels)
    return weight.unflatten(1, (channels, side, side))


def _turned(number: int, into: Tensor, out: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a kernel with its channels."""
    moved = into @ (out @ kernel.flatten(1)).unflatten(1, (len(into), -1))
    return moved.unflatten(-1, kernel.shape[-2:]).rot90(number, (-2, -1)), out @ bias


def project(weight: Tensor, reads: o3.Irreps, writes: o3.Irreps) -> Tensor:
    """Project a linear map onto the equivariant maps between two representations of O(3).

    Args:
        weight: Shape (dim of writes, dim of reads).
        reads: Representation of its input.
        writes: Representation of its output.

    Returns:
        The nearest equivariant map, of the same shape.

    Example:
        >>> project(torch.ones(4, 3), o3.Irreps("1o"), o3.Irreps("0e+1o"))[1:].tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    projected = torch.zeros_like(weight)
    for (rows, out), (columns, into) in product(_blocks(writes), _blocks(reads)):
        if out.ir == into.ir:
            block = weight[rows, columns].unflatten(0, (out.mul, -1)).unflatten(-1, (into.mul, -1))
            mean = block.diagonal(dim1=1, dim2=3).mean(-1)
            projected[rows, columns] = torch.kron(mean, torch.eye(out.ir.dim).to(weight))
    return projected


class Average:
    """The projection of linear maps onto those equivariant to a finite group, by the mean over its elements.

    It mixes only the entries of a block between two irreps, so a matrix for each pair of irreps is all of it.

    Args:
        group: The group.
        order: Number of its elements.
        reads: Representation of the input.
        writes: Representation of the output.
        weight: Has the dtype and the device of what will be projected.

    Example:
        >>> weight = torch.ones(1, 6)
        >>> Average(Inversion(), 2, o3.Irreps("1o+1e"), o3.Irreps("0e"), weight)(weight)
        tensor([[0., 0., 0., 1., 1., 1.]])
    """

    def __init__(self, group: Group, order: int, reads: o3.Irreps, writes: o3.Irreps, weight: Tensor) -> None:
        self._pairs = []
        for (rows, out), (columns, into) in product(_blocks(writes.simplify()), _blocks(reads.simplify())):
            left, right = (_matrices(group, order, str(irreps.ir)) for irreps in (out, into))
            mean = torch.einsum("gki,glj->ijkl", left, right) / order
            if mean.abs().max() > 1e-9:
                self._pairs.append((rows, columns, mean.to(weight)))

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the nearest equivariant map, of the same shape (dim of writes, dim of reads)."""
        projected = torch.zeros_like(weight)
        for rows, columns, mean in self._pairs:
            block = weight[rows, columns].unflatten(1, (-1, mean.shape[1])).unflatten(0, (-1, mean.shape[0]))
            projected[rows, columns] = torch.einsum("aibj,ijkl->akbl", block, mean).flatten(2).flatten(0, 1)
        return projected


@cache
def _matrices(group: Group, order: int, irrep: str) -> Tensor:
    """Matrices of all elements of a finite group, shape (order, dim, dim), float64."""
    basis = torch.eye(o3.Irrep(irrep).dim, dtype=torch.float64)
    return torch.stack([act(element, basis, irrep).T for element in group.sample(order)])


def _finite(name: str, axis: tuple[float, float, float], degree: int) -> tuple[Group, int]:
    """Return a finite group and its order; its mean is that of the named one for irreps of at most this degree."""
    if name in {"octahedral", "inversion"}:
        return (Octahedral(), 48) if name == "octahedral" else (Inversion(), 2)
    if name[0] == "d":
        return Dihedral(int(name[1:]), axis), 2 * int(name[1:])
    turns = 2 * degree + 1 if name == "so2" else int(name[1:])
    return Cyclic(turns, axis), turns


def _blocks(irreps: o3.Irreps) -> list[tuple[slice, Any]]:
    return list(zip(irreps.slices(), irreps, strict=True))


def _remember(seen: list[Tensor], dense: nn.Module, args: tuple[Tensor]) -> None:
    """Keep the input of a map, in training only: an evaluation in between is none of the regulariser's."""
    if dense.training:
        seen.append(args[0].detach().flatten(0, -2))


def _affine(term: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight, shape (out, in), and bias of a linear term; of a convolution those of the map of one patch."""
    weight, last = matrix_of(term), term.map[-1] if isinstance(term.map, nn.Sequential) else term.map
    assert weight is not None
    return weight, last.bias


def _norm(weight: Tensor, bias: Tensor) -> Tensor:
    return _root(weight.square().sum() + bias.square().sum())


def _root(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # the root has no derivative at 0


def _generators(irreps: str, weight: Tensor) -> Tensor:
    """Transposed generators of the rotations on a representation, shape (3, dim, dim)."""
    basis = torch.eye(o3.Irreps(irreps).dim, dtype=torch.float64)
    return torch.stack([act_generator(generator, basis, irreps) for generator in SO3().generators()]).to(weight)
