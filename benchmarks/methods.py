"""The training methods that are compared: each sets a model up, takes steps, and hands over what is shipped."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ace
from ace.errors import ConstraintNotMet, NonFiniteLoss
from benchmarks.config import RunConfig
from benchmarks.models import MODELS
from benchmarks.regularizers import LieRegularizer
from benchmarks.tasks import Batch, Task

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
        ships_relaxed: Whether the model is shipped with its relaxation terms.
        model: The model in training.
    """

    ships_relaxed: ClassVar[bool] = False

    def __init__(self, config: RunConfig, model: nn.Module, task: Task) -> None:
        self.config = config
        self.model = model
        self.task = task
        self.setup()

    @abstractmethod
    def setup(self) -> None:
        """Relax the model if the method does, and make its optimizer."""

    @abstractmethod
    def step(self, batch: Batch) -> Any:
        """Update the model; return what ``History.append`` records."""

    def admits(self, error: float) -> bool:
        """Whether a model of this equivariance error may be shipped."""
        del error
        return True

    def finish(self) -> nn.Module:
        """Return the model that is shipped."""
        if ace.relaxations(self.model) and not self.ships_relaxed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConstraintNotMet)  # the summary has γ and the projection gap
                ace.restore(self.model)
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
            normalize=getattr(self.config.method, "normalize", False),
        )

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of the run over some parameters."""
        make: Any = OPTIMIZERS[self.config.optimizer]
        return make(parameters, lr=self.config.lr, weight_decay=self.config.weight_decay)


class Strict(Method):
    """Plain training of the equivariant model; also the base of the methods that do not learn γ."""

    def setup(self) -> None:  # noqa: D102
        self.done = 0
        self.weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = self.make_optimizer(self.weights)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        loss = self.task.loss(self.model, batch)
        return self.descend(loss, loss)

    def descend(self, task_loss: Tensor, objective: Tensor) -> Any:
        """Take one step on the objective."""
        if not math.isfinite(objective.item()):
            raise NonFiniteLoss(
                f"the loss was {objective.item()} at step {self.done + 1} (task loss {task_loss.item():.3g}): lower "
                "lr, set clip, or look at the data"
            )
        self.optimizer.zero_grad()
        objective.backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        self.optimizer.step()
        self.done += 1
        record = {"step": self.done, "task_loss": task_loss.detach(), "layers": ()}
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

    ships_relaxed = True

    def setup(self) -> None:  # noqa: D102
        self.relax()
        for relaxation in ace.relaxations(self.model).values():
            relaxation.gamma.requires_grad_(False)
        super().setup()


class Cr(Unconstrained):
    r"""Constraint relaxation (Pertigkiozoglou et al., NeurIPS 2024): γ follows a triangle 0, 1, 0.

    At step t of T, :math:`\gamma_t = 1 - |2t/T - 1|` for all layers, which is 0 at the last step, and the
    objective is J + weight · r with the ``LieRegularizer``'s r.
    """

    ships_relaxed = False

    def setup(self) -> None:  # noqa: D102
        super().setup()
        entry = MODELS[self.config.model.name]
        self.regularizer = LieRegularizer(self.model, entry.read_types, entry.write_types)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        strength = 1 - abs(2 * (self.done + 1) / self.config.steps - 1)
        for relaxation in ace.relaxations(self.model).values():
            relaxation.gamma.fill_(strength)
        loss = self.task.loss(self.model, batch)
        return self.descend(loss, loss + self.config.method.weight * sum(self.regularizer.parts()))


class Ace(Method):
    """The relaxation as a constraint, γ = 0, by the default primal-dual optimizer."""

    def setup(self) -> None:  # noqa: D102
        self.relax()
        self.optimizer = ace.PrimalDual(
            ace.Problem(self.model, self.task.loss, self.constraint()),
            self.make_optimizer(self.model.parameters()),
            steps=self.config.steps,
            clip=self.config.clip,
            max_skipped=1,  # a loss that is not finite ends the run, as it does with the other methods
            **self.form(),
        )

    def constraint(self) -> ace.Exact | ace.Resilient | ace.EquivarianceError:
        """Return what is asked of γ."""
        return ace.Exact()

    def form(self) -> dict[str, Any]:
        """Return the further arguments of the optimizer."""
        return {}

    def step(self, batch: Batch) -> Any:  # noqa: D102
        return self.optimizer.roll(batch)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.optimizer.load_state_dict(state)


class AceResilient(Ace):
    """The relaxation as a price, shipped with the terms that the data pay for."""

    ships_relaxed = True

    def constraint(self) -> ace.Resilient:  # noqa: D102
        return ace.Resilient(self.config.method.rho)


class AceTolerance(Ace):
    """A tolerance on the equivariance error of the whole model, shipped with its terms."""

    ships_relaxed = True

    def constraint(self) -> ace.EquivarianceError:  # noqa: D102
        return ace.EquivarianceError(
            self.task.group,
            self.config.method.eps,
            inputs=self.task.input_types,
            outputs=self.task.output_type,
            share=self.config.method.share,
        )

    def admits(self, error: float) -> bool:  # noqa: D102
        return error <= self.config.method.eps


class AcePaper(Ace):
    """γ = 0 by Algorithm 1 as published."""

    def form(self) -> dict[str, Any]:  # noqa: D102
        return {"preset": "paper", "dual_lr": self.config.method.dual_lr}


METHODS: dict[str, type[Method]] = {
    "strict": Strict,
    "unconstrained": Unconstrained,
    "ace": Ace,
    "ace-resilient": AceResilient,
    "ace-tolerance": AceTolerance,
    "ace-paper": AcePaper,
    "cr": Cr,
}
"""Name in the configuration -> method."""
