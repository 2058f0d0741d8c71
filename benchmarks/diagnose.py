"""A diagnosis of a benchmark task: what ``ace diagnose`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ace
from benchmarks.config import RunConfig
from benchmarks.models import MODELS
from benchmarks.seeds import Use, derived_seed
from benchmarks.tasks import Batch, Task
from benchmarks.train import build_model, build_task


class Shuffled:
    """The training batches, in another order in each epoch.

    Args:
        task: The task.
        batch_size: Samples per batch.
    """

    def __init__(self, task: Task, batch_size: int) -> None:
        self.task, self.batch_size = task, batch_size

    def __iter__(self) -> Iterator[Batch]:
        seed = int(torch.randint(2**31, ()))  # the random state is that of the diagnosis
        order = self.task.batches("train", self.batch_size, shuffle_seed=seed)
        return (self.task.augment(batch, derived_seed(seed, Use.TASK, number)) for number, batch in enumerate(order))


def diagnose(
    config: RunConfig, seeds: int, folder: Path | None = None, progress: Callable[[int], None] | None = None
) -> ace.Diagnosis:
    """Diagnose the data of a run's task with its model, on the validation split.

    Args:
        config: The run: its task, model, steps, batch size, learning rate and clipping are used.
        seeds: Number of trainings of each kind.
        folder: Where to keep what was measured of each seed.
        progress: Called with the number of updates done.

    Returns:
        The diagnosis.
    """
    torch.set_num_threads(config.threads)
    task = build_task(config)
    layers = MODELS[config.model.name].layers

    def build(seed: int) -> nn.Module:
        return build_model(config.model_copy(update={"seed": config.seed + seed}), task)

    frames = build(0)(**task.example()).dim()

    def split(batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        # a model that returns one frame is measured on the last one
        return batch.inputs, batch.target if batch.target.dim() == frames else batch.target[:, -1]

    relaxing: dict[str, Any] = {"layers": lambda path, module: type(module).__name__ in layers}
    return ace.diagnose(
        build,
        task.loss,
        Shuffled(task, config.batch_size),
        list(task.batches("valid", config.batch_size)),
        task.group,
        steps=config.steps,
        outputs=task.output_type,
        inputs=task.input_types,
        split=split,
        seeds=seeds,
        lr=config.lr,
        clip=config.clip,
        rho=getattr(config.method, "rho", 1.0),
        relaxing=relaxing,
        folder=folder,
        progress=progress,
    )
