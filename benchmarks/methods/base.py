"""What a training method is: it sets a model up, takes steps, and hands over what is shipped."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ace
from ace.distributed import total, world_size
from ace.errors import ConfigError, ConstraintNotMet, NonFiniteLoss
from ace.probing import evaluating
from benchmarks.models import MODELS
from benchmarks.options import Options, Relaxing
from benchmarks.processes import share
from benchmarks.tasks import Batch, Task

if TYPE_CHECKING:
    from benchmarks.config import RunConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Method(ABC):
    """A way to train a model.

    Args:
        config: The run.
        model: The equivariant model with its initial weights; relaxed in place where the method relaxes.
        task: What is to be learnt.

    Attributes:
        Options: The options ``method.*`` of the configuration, with their defaults.
        relaxes: Whether it adds relaxation terms.
        by_types: Whether it needs the types of what the layers read and write, irreps or turns, from the model's entry.
        ships_relaxed: Whether the model is shipped with its relaxation terms.
        model: The model in training.
        copies: Number of processes that computed the last loss on the whole batch; 1 where they divided it.
    """

    Options: type[Options] = Relaxing
    relaxes = True
    by_types = False
    ships_relaxed = False

    def __init__(self, config: RunConfig, model: nn.Module, task: Task) -> None:
        self.config = config
        self.model = model
        self.task = task
        self.copies = 1
        self.setup()
        self.trained  # noqa: B018 (what cannot be trained so is refused before the first step)

    @abstractmethod
    def setup(self) -> None:
        """Relax the model if the method does, and make its optimizer."""

    @abstractmethod
    def step(self, batch: Batch) -> Any:
        """Update the model; return what ``History.append`` records."""

    @cached_property
    def trained(self) -> nn.Module:
        """The model as its losses call it: where there are several processes, they average its gradients.

        Raises:
            ConfigError: The model has layers whose statistics would be those of a part of the batch.
        """
        if world_size() == 1:
            return self.model
        norms = [path for path, module in self.model.named_modules() if hasattr(module, "running_mean")]
        if norms:
            raise ConfigError(
                f"model {self.config.model.name!r} normalises over the batch ({norms[0]} and so on), which several "
                "processes divide: train it with one process"
            )
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with evaluating(self.model):
            loss = self.task.loss(self.model, next(self.task.batches("train", 4)))
        reached = torch.autograd.grad(loss, weights, allow_unused=True)
        some_unused = any(gradient is None for gradient in reached)
        return DistributedDataParallel(self.model, find_unused_parameters=some_unused)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task loss of this process's part of a batch; the mean over the processes is that of the batch."""
        part, weight = share(batch)
        self.copies = world_size() if part is batch else 1
        return weight * self.task.loss(model, part)

    def admits(self, error: float) -> bool:
        """Whether a model of this equivariance error may be shipped."""
        del error
        return True

    def finish(self, recalibrate: Iterable[Any] | None = None) -> nn.Module:
        """Return the model that is shipped.

        Args:
            recalibrate: Model inputs on which the statistics of BatchNorm are re-estimated where terms are taken off.
        """
        if ace.relaxations(self.model) and not self.ships_relaxed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstraintNotMet)  # the summary has γ and the projection gap
                ace.restore(self.model, recalibrate=recalibrate)
        return self.model

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return all that training needs to go on."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``state_dict`` returned."""

    def relax(self) -> None:
        """Add a relaxation term to each layer that the model's entry names."""
        layers = MODELS[self.config.model.name].layers
        ace.relax(
            self.model,
            layers=lambda path, module: type(module).__name__ in layers,
            example=self.task.example(),
            term=getattr(self.config.method, "term", "linear"),
            rank=getattr(self.config.method, "rank", None),
            normalize=getattr(self.config.method, "normalize", False),
        )

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of the run over some parameters."""
        make: Any = OPTIMIZERS[self.config.optimizer]
        return make(parameters, lr=self.config.lr, weight_decay=self.config.weight_decay)


class Strict(Method):
    """Plain training of the equivariant model; also the base of the methods that do not learn γ."""

    Options = Options
    relaxes = False

    def setup(self) -> None:  # noqa: D102
        self.done = 0
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.make_optimizer(self.weights)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        loss = self.loss(self.trained, batch)
        return self.descend(loss, loss)

    def descend(self, task_loss: Tensor, objective: Tensor) -> Any:
        """Take one step on the objective."""
        seen, aim = total(torch.stack((task_loss.detach(), objective.detach()))) / world_size()
        if not math.isfinite(aim.item()):
            raise NonFiniteLoss(
                f"the loss was {aim.item()} at step {self.done + 1} (task loss {seen.item():.3g}): lower lr, set clip, "
                "or look at the data"
            )
        self.optimizer.zero_grad()
        objective.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.optimizer.step()
        self.done += 1
        record = {"step": self.done, "task_loss": seen, "layers": ()}
        if attached := ace.relaxations(self.model):
            gammas = torch.cat([relaxation.gamma.detach() for relaxation in attached.values()])
            record |= {"layers": tuple(attached), "gamma": gammas}
        return SimpleNamespace(cmp_state=SimpleNamespace(misc=record))

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]


class Unconstrained(Strict):
    """The relaxed model with γ = 1 throughout, shipped with its terms."""

    Options = Relaxing
    relaxes = True
    ships_relaxed = True

    def setup(self) -> None:  # noqa: D102
        self.relax()
        for relaxation in ace.relaxations(self.model).values():
            relaxation.gamma.requires_grad_(False)
        super().setup()
