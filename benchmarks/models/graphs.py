"""Operations on batched graphs shared by the models. Rows of one graph are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_target(values: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Sum edge values at the node each edge points to.

    Args:
        values: Edge values, shape (E, ...).
        target: Index of the node each edge points to, shape (E,).
        nodes: Number of nodes N.

    Returns:
        Sums, shape (N, ...); zero at nodes without an edge.

    Example:
        >>> import torch
        >>> sum_by_target(torch.ones(3, 1), torch.tensor([0, 0, 2]), 3).ravel()
        tensor([2., 0., 1.])
    """
    return values.new_zeros(nodes, *values.shape[1:]).index_add(0, target, values)


def mean_by_target(values: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Average edge values at the node each edge points to; zero at nodes without an edge.

    Args:
        values: Edge values, shape (E, d).
        target: Index of the node each edge points to, shape (E,).
        nodes: Number of nodes N.

    Returns:
        Means, shape (N, d).

    Example:
        >>> import torch
        >>> mean_by_target(torch.ones(3, 1), torch.tensor([0, 0, 2]), 3).ravel()
        tensor([1., 0., 1.])
    """
    degree = sum_by_target(values.new_ones(len(values)), target, nodes).clamp(min=1)
    return sum_by_target(values, target, nodes) / degree[:, None]


def centroid(pos: Tensor, batch: Tensor) -> Tensor:
    """Mean position of the graph each node belongs to.

    Args:
        pos: Positions, shape (N, 3).
        batch: Graph index of each node, from 0 without gaps, in ascending order, shape (N,).

    Returns:
        Centroid of the graph of each node, shape (N, 3).

    Example:
        >>> import torch
        >>> centroid(torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [5.0, 5, 5]]), torch.tensor([0, 0, 1]))
        tensor([[1., 0., 0.],
                [1., 0., 0.],
                [5., 5., 5.]])
    """
    return mean_by_target(pos, batch, int(batch[-1]) + 1).index_select(0, batch)


def radius_graph(pos: Tensor, batch: Tensor, cutoff: float | None = None) -> Tensor:
    """Join the nodes of each graph that are closer than a cutoff.

    Args:
        pos: Positions, shape (N, 3).
        batch: Graph of each node, ascending from 0, shape (N,).
        cutoff: Largest distance; None joins all nodes of a graph.

    Returns:
        Source and target of each edge, no node with itself, shape (2, E).

    Example:
        >>> import torch
        >>> pos = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [3.0, 0, 0], [0.0, 0, 0]])
        >>> radius_graph(pos, torch.tensor([0, 0, 0, 1]), cutoff=1.5)
        tensor([[1, 0],
                [0, 1]])
    """
    sizes = batch.bincount()
    partners = sizes[batch]  # of each node, itself among them
    target = torch.arange(len(batch), device=batch.device).repeat_interleave(partners)
    place = torch.arange(len(target), device=batch.device) - (partners.cumsum(0) - partners)[target]
    source = (sizes.cumsum(0) - sizes)[batch][target] + place
    keep = source != target
    if cutoff is not None:
        keep &= torch.linalg.vector_norm(pos.detach()[source] - pos.detach()[target], dim=-1) < cutoff
    return torch.stack((source, target))[:, keep]
