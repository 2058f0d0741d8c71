"""What the processes that train one model tell one another; a process alone is told what it knows.

Each process has a share of every batch, and its own loss: that of its share. ``DistributedDataParallel`` and
``fully_shard`` average the gradients of these losses, so what is summed here over the processes carries the graph of
this process's part alone, multiplied by their number: the average is then the derivative of the sum.
"""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn


def rank() -> int:
    """Return the number of this process, from 0."""
    return torch.distributed.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes.

    Example:
        >>> rank(), world_size()
        (0, 1)
    """
    return torch.distributed.get_world_size() if _active() else 1


def total(value: Tensor) -> Tensor:
    """Return the sum over all processes, bitwise the same on each of them.

    Args:
        value: Any tensor, of the same shape everywhere.

    Example:
        >>> total(torch.ones(2))
        tensor([1., 1.])
    """
    if world_size() == 1:
        return value
    summed = value.detach().clone()
    torch.distributed.all_reduce(summed)
    return _with_graph(summed, value)


def total_sizes(sizes: list[tuple[Tensor, Tensor, int]]) -> list[tuple[Tensor, Tensor, int]]:
    """Sum what ``ace.relaxation.measuring`` measured: of a ratio, the ratio of the sums, not the mean of the ratios."""
    if world_size() == 1:
        return sizes
    change, output, entries = zip(*sizes, strict=True)
    counts = torch.tensor(entries).to(change[0])
    summed = total(torch.stack((torch.stack(change), torch.stack(output), counts)))
    return list(zip(summed[0], summed[1].detach(), summed[2].detach().long().tolist(), strict=True))


def gather(columns: Tensor) -> Tensor:
    """Join the columns of all processes, each its own number of them, in the order of the processes.

    Args:
        columns: Shape (rows, own columns).

    Returns:
        Shape (rows, all columns), bitwise the same on each process.
    """
    if world_size() == 1:
        return columns
    counts = _counts(columns.shape[1], columns.device)
    padded = nn.functional.pad(columns.detach(), (0, max(counts) - columns.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    parts = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
    parts[rank()] = _with_graph(parts[rank()], columns)
    return torch.cat(parts, dim=1)


def place(count: int, device: torch.device) -> tuple[int, int]:
    """Return how many of something the processes before this one have, and how many there are in all.

    Args:
        count: How many this process has.
        device: Where it computes.
    """
    counts = _counts(count, device)
    return sum(counts[: rank()]), sum(counts)


def _active() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _counts(count: int, device: torch.device) -> list[int]:
    if world_size() == 1:
        return [count]
    mine = torch.tensor([count], device=device)
    counts = [torch.empty_like(mine) for _ in range(world_size())]
    torch.distributed.all_gather(counts, mine)
    return [int(other) for other in counts]


def _with_graph(value: Tensor, own: Tensor) -> Tensor:
    """Give a value the graph of this process's part, for which the mean over the processes is taken later."""
    return value + world_size() * (own - own.detach()) if own.requires_grad else value
