"""The methods that are compared with: free terms, schedules of γ, and penalties."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer
from torch import Tensor

import ace
from ace.distributed import total, total_sizes, world_size
from ace.errors import ConfigError
from ace.relaxation import measuring
from benchmarks.methods.base import Unconstrained
from benchmarks.methods.controllers import Controlled, Controller, Schedule
from benchmarks.models import MODELS
from benchmarks.options import Options, Relaxing
from benchmarks.regularizers import (
    GROUP,
    LieRegularizer,
    ProjectionRegularizer,
    TurnRegularizer,
    Z,
    not_from,
    on_irreps,
    on_pixels,
)
from benchmarks.seeds import Use, derived_seed
from benchmarks.tasks import Batch


class Augmentation(Unconstrained):
    """The relaxed model with γ = 1, each training sample moved by an element of its own."""

    def step(self, batch: Batch) -> Any:  # noqa: D102
        loss = self.loss(self.trained, self.moved(batch))
        return self.descend(loss, loss)

    def moved(self, batch: Batch) -> Batch:
        """Move inputs and target of each sample by a random element of the group."""
        seed = derived_seed(self.config.seed, Use.SAMPLE_ELEMENTS, self.done)
        return self.task.transform(batch, *self.task.group.sample(len(batch), seed))


class Scheduled(Controlled):
    """γ of all layers follows a curve; shipped with its terms only if the curve ends above 0."""

    class Options(Relaxing):  # noqa: D106
        final: float = Field(0.0, ge=0, le=1)
        until: float = Field(0.8, gt=0, le=1)

    def setup(self) -> None:  # noqa: D102
        super().setup()
        self.ships_relaxed = self.strength(1.0) > 0

    def strength(self, progress: float) -> float:
        """Return γ after this share of the steps."""
        raise NotImplementedError

    def make_controller(self) -> Controller:  # noqa: D102
        return Schedule(self.strength)

    def admits(self, error: float) -> bool:  # noqa: D102
        del error  # on the way down the relaxed model is not yet what the method makes
        return not self.ships_relaxed or self.strength(self.done / self.config.steps) == self.strength(1.0)


class LinearDecay(Scheduled):
    """γ falls linearly from 1 to ``final``, which it reaches after the share ``until`` of the steps."""

    def strength(self, progress: float) -> float:  # noqa: D102
        method = self.config.method
        return 1 - (1 - method.final) * self.fallen(min(progress / method.until, 1.0))

    def fallen(self, progress: float) -> float:
        """Return how much of the way down is done."""
        return progress


class CosineDecay(LinearDecay):
    """γ falls along half a cosine from 1 to ``final``."""

    def fallen(self, progress: float) -> float:  # noqa: D102
        return (1 - math.cos(math.pi * progress)) / 2


class Cr(Scheduled):
    r"""Constraint relaxation (Pertigkiozoglou et al., NeurIPS 2024): γ follows a triangle 0, 1, 0.

    At step t of T, :math:`\gamma_t = 1 - |2t/T - 1|` for all layers, which is 0 at the last step, and the
    objective is J + weight · r with the ``LieRegularizer``'s r, on pixels with the ``TurnRegularizer``'s.
    """

    by_types = True

    class Options(Options):  # noqa: D106
        weight: float = Field(0.01, ge=0)

    def setup(self) -> None:  # noqa: D102
        super().setup()
        entry = MODELS[self.config.model.name]
        if entry.turns is None:
            self.regularizer = LieRegularizer(self.model, entry.read_types, entry.write_types)
        else:
            self.regularizer = TurnRegularizer(self.model, entry.turns)

    def strength(self, progress: float) -> float:  # noqa: D102
        return 1 - abs(2 * progress - 1)

    def price(self) -> Tensor:  # noqa: D102
        derivative, norm = self.regularizer.parts(self.copies)
        return self.config.method.weight * (derivative + norm)


class CrNorm(Cr):
    """The control of ``cr``: the same with the norm of the terms' outputs alone, without the Lie derivative."""

    def price(self) -> Tensor:  # noqa: D102
        return self.config.method.weight * self.regularizer.parts(self.copies)[1]


class Penalty(Unconstrained):
    r"""A fixed price on the size of the terms: J + weight · :math:`\sum_i \|f^i_{neq}\|^2 / \|f^i_{eq}\|^2`, γ = 1."""

    class Options(Relaxing):  # noqa: D106
        weight: float = Field(0.1, ge=0)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        with measuring(ace.relaxations(self.model).values()) as totals:
            loss = self.loss(self.trained, batch)
            sizes = total_sizes(totals())
        price = torch.stack([neq / eq.detach().clamp_min(1e-12) for neq, eq, _ in sizes]).sum()
        return self.descend(loss, loss + self.config.method.weight * price)


class Rpp(Unconstrained):
    r"""Residual pathway prior (Finzi et al., NeurIPS 2021): J + weight · :math:`\|\theta_{neq}\|^2`, γ = 1.

    The maximum a posteriori form, with a prior on the weights of the terms alone.
    """

    class Options(Relaxing):  # noqa: D106
        weight: float = Field(0.01, ge=0)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        loss = self.loss(self.trained, batch)
        weights = [p for r in ace.relaxations(self.model).values() for p in r.term.parameters()]
        prior = torch.stack([p.square().sum() for p in weights]).sum()
        return self.descend(loss, loss + self.config.method.weight * prior)


class Projection(Unconstrained):
    """A price on the distance of the terms from equivariant maps (Berndt and Stühmer, 2026; PER of Kim et al., 2023).

    The objective is J + weight · r with the ``ProjectionRegularizer``'s r, γ = 1. Between irreps ``groups`` names the
    groups, with the factor of each; without it, it is O(3) alone. On pixels the group is that of the quarter turns.
    """

    by_types = True

    class Options(Options):  # noqa: D106
        weight: float = Field(0.01, ge=0)
        groups: dict[str, Annotated[float, Field(ge=0)]] | None = Field(None, min_length=1)
        axis: tuple[float, float, float] = Z

        @field_validator("groups")
        @classmethod
        def _known(cls, groups: dict[str, float] | None) -> dict[str, float] | None:
            if unknown := [name for name in groups or {} if not re.fullmatch(GROUP, name)]:
                raise ValueError(
                    f"{unknown[0]!r} is none of o3, so3, so2, octahedral, inversion, c and d with a number, such as c4"
                )
            return groups

        @model_serializer(mode="wrap")
        def _used(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
            """Leave out what came later and is not used: a run stays the same run."""
            unused = {key for key in ("groups", "axis") if getattr(self, key) == type(self).model_fields[key].default}
            return {key: value for key, value in serialize(self).items() if key not in unused}

    def setup(self) -> None:  # noqa: D102
        super().setup()
        self.regularizer = ProjectionRegularizer(self.model, self.projections)

    def projections(self, layer: Any, weight: Tensor) -> list[tuple[float, Any]]:
        """Return the factor and the projection of each group for the term of a layer.

        Raises:
            ConfigError: Groups are named, but the features are on pixels.
        """
        entry, method = MODELS[self.config.model.name], self.config.method
        if entry.turns is None:
            types = entry.read_types(layer), entry.write_types(layer), weight
            positions = entry.read_positions(layer)
            return [
                (factor, not_from(positions, on_irreps(*types, group, method.axis)))
                for group, factor in (method.groups or {"o3": 1.0}).items()
            ]
        if method.groups:
            raise ConfigError(
                f"method.groups is for terms between e3nn irreps; those of model {self.config.model.name!r} are on "
                "pixels, where the group is that of the quarter turns: leave it out"
            )
        return [(1.0, on_pixels(entry.turns(layer), weight))]

    def step(self, batch: Batch) -> Any:  # noqa: D102
        loss = self.loss(self.trained, batch)
        return self.descend(loss, loss + self.config.method.weight * self.regularizer.distance())


class Remul(Augmentation):
    r"""REMUL (Elhag et al., 2024): the loss on the data and, weighted, the loss on transformed data, γ = 1.

    .. math:: \alpha\, J(f(x), y) + \beta\, J(f(g x), g y)

    with one random element for each sample. ``weight`` is β, for α = 1.
    """

    class Options(Relaxing):  # noqa: D106
        weight: float = Field(1.0, ge=0)

    def step(self, batch: Batch) -> Any:  # noqa: D102
        task, symmetry = self.losses(batch)
        return self.descend(task, task + self.config.method.weight * symmetry)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss on the batch and on the transformed batch."""
        return self.loss(self.trained, batch), self.loss(self.trained, self.moved(batch))


class RemulGradNorm(Remul):
    r"""REMUL with the weights of GradNorm (Chen et al., ICML 2018).

    Each step moves the two weights :math:`w_k` down the gradient of
    :math:`\sum_k |G_k - \bar G\, r_k^{1.5}|`, where :math:`G_k` is the norm of the gradient of :math:`w_k J_k` on the
    last relaxed layer, :math:`\bar G` their mean, held fixed, and :math:`r_k` the loss :math:`J_k` over its first
    value, relative to the mean of both; then scales them to the sum 2.
    """

    class Options(Relaxing):  # noqa: D106
        balance_lr: float = Field(0.025, gt=0)

    def setup(self) -> None:  # noqa: D102
        super().setup()
        self.balance = torch.ones(2)
        self.first = torch.zeros(2)
        last = list(ace.relaxations(self.model))[-1]
        self.shared = [p for p in self.model.get_submodule(last).parameters() if p.requires_grad]

    def step(self, batch: Batch) -> Any:  # noqa: D102
        losses = self.losses(batch)
        self.rebalance(losses)
        alpha, beta = self.balance.tolist()
        return self.descend(losses[0], alpha * losses[0] + beta * losses[1])

    def rebalance(self, losses: tuple[Tensor, Tensor]) -> None:
        """Take one step on the weights."""
        now = total(torch.stack(losses).detach()) / world_size()
        if not now.isfinite().all():
            return
        norms = []
        for loss in losses:
            gradients = torch.autograd.grad(loss, self.shared, retain_graph=True, allow_unused=True)
            means = [total(g) / world_size() for g in gradients if g is not None]
            norms.append(torch.stack([g.norm() for g in means]).norm())
        size = torch.stack(norms)
        if self.done == 0:
            self.first = now
        ratio = now / self.first.clamp_min(1e-30)
        weighted = self.balance * size
        target = weighted.mean() * (ratio / ratio.mean()).pow(1.5)
        moved = self.balance - self.config.method.balance_lr * (weighted - target).sign() * size
        self.balance = 2 * moved.clamp_min(1e-3) / moved.clamp_min(1e-3).sum()

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {**super().state_dict(), "balance": self.balance, "first": self.first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self.balance, self.first = state["balance"], state["first"]
