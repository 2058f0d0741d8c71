"""Several gloo processes on this machine, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

from ace.probing import default_dtype

multiprocessing.set_forkserver_preload(["torch", "e3nn.o3", "torch_geometric"])  # imported once, not by each process


def spawn(function, world, folder, *arguments, dtype=torch.float64):
    """Call ``function(rank, *arguments)`` in each of ``world`` processes; return what each returns."""
    folder = Path(folder) / f"of-{world}"
    folder.mkdir()
    torch.multiprocessing.start_processes(
        _process, (world, folder, dtype, function, arguments), nprocs=world, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank, world, folder, dtype, function, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        with default_dtype(dtype):
            torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
