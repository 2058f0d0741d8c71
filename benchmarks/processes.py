"""Where a run is trained: in this process or several, as torchrun starts them, each with its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ace.distributed import rank, world_size
from ace.errors import AceError, ConfigError
from benchmarks.tasks import Batch

T = TypeVar("T")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Be one of the processes that torchrun started, for the while; without torchrun a process alone.

    Args:
        device: ``cpu``, or ``cuda`` for a GPU of its own for each process of a machine.

    Raises:
        ConfigError: Torch does not see as many GPUs.
    """
    if device == "cuda":
        _prepare_gpu()
    if not torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group()  # gloo, and NCCL where there are GPUs
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank()))


def share(batch: Batch) -> tuple[Batch, float]:
    """Return this process's part of a batch, and its weight.

    The mean over the processes of weight times mean over the part is the mean over the batch. A batch that has fewer
    samples than there are processes is not divided: a process without samples could not run the model.

    Example:
        >>> import torch
        >>> batch = Batch({"x": torch.ones(3, 2)}, torch.ones(3))
        >>> part, weight = share(batch)
        >>> len(part), weight
        (3, 1.0)
    """
    count, size = len(batch), world_size()
    if size == 1 or count < size:
        return batch, 1.0
    first, last = count * rank() // size, count * (rank() + 1) // size
    return batch.part(first, last), size * (last - first) / count


def together(action: Callable[[], T]) -> T:
    """Do something on all processes that can fail on some; return what it returned here.

    Raises:
        AceError: It failed on another process.
    """
    if world_size() == 1:
        return action()
    result: T
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    found: list[str | None] = [None] * world_size()
    torch.distributed.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(found):
        if message is not None:
            raise AceError(f"process {number} failed: {message}")
    return result


def from_first(value: T) -> T:
    """Return the value that the first process passes."""
    if world_size() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def move(model: nn.Module, device: str) -> nn.Module:
    """Move a model to the GPU of this process, if it has one; data stay.

    From then on it takes its inputs there, and brings its outputs back.

    Args:
        model: The model.
        device: ``cpu`` or ``cuda``.
    """
    if device == "cpu":
        return model
    gpu = torch.device(device, local_rank())

    def there(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        del module
        return _to(gpu, args), _to(gpu, kwargs)

    def back(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        del module, args
        return _to(torch.device("cpu"), output)

    model.register_forward_pre_hook(there, with_kwargs=True)
    model.register_forward_hook(back)
    return model.to(gpu)


def _prepare_gpu() -> None:
    needed, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if found < needed:
        raise ConfigError(f"device is cuda: {needed} GPUs are needed here, torch sees {found}; device=cpu does without")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it its results differ from run to run
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.cuda.set_device(local_rank())


def _to(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(device, entry) for key, entry in value.items()}
    return tuple(_to(device, entry) for entry in value) if isinstance(value, tuple) else value
