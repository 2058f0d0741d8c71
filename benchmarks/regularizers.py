"""Regularisers that pull relaxation terms towards equivariant maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

import ace
from ace.distributed import total
from ace.groups import SO3, act_generator


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

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the two roots for the inputs seen since the last call, of all processes; tensors without axes."""
        derivatives, norms = [], []
        for dense, seen, into, out in self._terms:
            x = torch.cat(seen)
            seen.clear()
            weight, bias = dense.weight.T, dense.bias
            # x Aᵀ_in Wᵀ - (x Wᵀ + b) Aᵀ_out, where the product of the matrices is cheaper than that of the rows
            derivative = x @ (into @ weight - weight @ out) - (bias @ out)[:, None]
            derivatives.append(derivative.square().sum())
            norms.append((x @ weight + bias).square().sum())
        derivative, norm = total(torch.stack((torch.stack(derivatives).sum(), torch.stack(norms).sum())))
        return _root(derivative), _root(norm)


class ProjectionRegularizer:
    r"""Distance of the dense maps of all relaxation terms from the equivariant ones.

    .. math:: r = \sum_l \| T_l - P(T_l) \|, \qquad
        P(T) = \int_{O(3)} D^\mathrm{out}(g)^{-1}\, T\, D^\mathrm{in}(g)\, dg

    the Frobenius norm of weight and bias minus their Reynolds projection. By Schur's lemma the projection keeps, of
    each block between copies of the same irrep, the mean of its diagonal times the identity, and no other block.
    What a layer adds must not move with translations, so the projection keeps no weight that reads positions.

    Args:
        relaxed: A relaxed model whose terms are linear.
        reads: Layer -> e3nn irreps of the concatenated inputs of its term.
        writes: Layer -> e3nn irreps of the concatenated outputs.
        positions: Layer -> the entries of its inputs that are positions.

    Example:
        >>> relaxed = ace.relax(nn.Linear(3, 3), layers=nn.Linear, example=torch.ones(5, 3))
        >>> types = lambda layer: "1x1o"
        >>> regularizer = ProjectionRegularizer(relaxed, types, types, lambda layer: slice(0))
        >>> dense = relaxed.relaxation.term.map
        >>> _ = nn.init.eye_(dense.weight), nn.init.zeros_(dense.bias)
        >>> regularizer.distance().item() < 1e-12
        True
        >>> _ = nn.init.ones_(dense.weight)  # the projection keeps the diagonal, six ones are left
        >>> round(regularizer.distance().item() ** 2, 4)
        6.0
    """

    def __init__(
        self,
        relaxed: nn.Module,
        reads: Callable[[Any], str],
        writes: Callable[[Any], str],
        positions: Callable[[Any], slice],
    ) -> None:
        self._terms: list[tuple[nn.Linear, o3.Irreps, o3.Irreps, slice]] = []
        for path, relaxation in ace.relaxations(relaxed).items():
            layer = relaxed.get_submodule(path)
            types = o3.Irreps(reads(layer)), o3.Irreps(writes(layer))
            self._terms.append((relaxation.term.map, *types, positions(layer)))

    def distance(self) -> Tensor:
        """Return r; a tensor without axes."""
        distances = []
        for dense, reads, writes, positions in self._terms:
            kept = project(dense.weight, reads, writes)
            kept[:, positions] = 0
            weight = dense.weight - kept
            bias = dense.bias - project(dense.bias[:, None], o3.Irreps("0e"), writes)[:, 0]
            distances.append(_root(weight.square().sum() + bias.square().sum()))
        return torch.stack(distances).sum()


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


def _blocks(irreps: o3.Irreps) -> list[tuple[slice, Any]]:
    return list(zip(irreps.slices(), irreps, strict=True))


def _remember(seen: list[Tensor], dense: nn.Module, args: tuple[Tensor]) -> None:
    """Keep the input of a map, in training only: an evaluation in between is none of the regulariser's."""
    if dense.training:
        seen.append(args[0].detach().flatten(0, -2))


def _root(square: Tensor) -> Tensor:
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()  # the root has no derivative at 0


def _generators(irreps: str, weight: Tensor) -> Tensor:
    """Transposed generators of the rotations on a representation, shape (3, dim, dim)."""
    basis = torch.eye(o3.Irreps(irreps).dim, dtype=torch.float64)
    return torch.stack([act_generator(generator, basis, irreps) for generator in SO3().generators()]).to(weight)
