"""The relaxation as a constraint, with multipliers: the methods of this project and the published algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

import ace
from benchmarks.methods.base import Method
from benchmarks.options import Relaxing
from benchmarks.tasks import Batch


class Constrained(Method):
    """The relaxation under a constraint, by the primal-dual optimizer."""

    def setup(self) -> None:  # noqa: D102
        self.relax()
        self.optimizer = ace.PrimalDual(
            ace.Problem(self.trained, self.loss, self.constraint()),
            self.make_optimizer(self.model.parameters()),
            steps=self.config.steps,
            clip=self.config.clip,
            max_skipped=1,  # a loss that is not finite ends the run, as it does with the other methods
            **self.form(),
        )

    def constraint(self) -> ace.Exact | ace.Resilient | ace.EquivarianceError:
        """Return what is asked of γ."""
        return ace.Exact()

    def of_model(self, **asked: float) -> ace.EquivarianceError:
        """Return a constraint on the equivariance error of the whole model, under the group of the task."""
        types: dict[str, Any] = {"inputs": self.task.input_types, "outputs": self.task.output_type}
        return ace.EquivarianceError(self.task.group, **types, **asked)

    def form(self) -> dict[str, Any]:
        """Return the further arguments of the optimizer."""
        return {}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # noqa: D102
        loss = super().loss(model, batch)
        self.optimizer.cmp.divided = self.copies == 1
        return loss

    def step(self, batch: Batch) -> Any:  # noqa: D102
        return self.optimizer.roll(batch)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.optimizer.load_state_dict(state)


class Ace(Constrained):
    """γ = 0, by the default form."""

    class Options(Relaxing):  # noqa: D106
        polish: float = Field(0.2, ge=0, lt=1)

    def form(self) -> dict[str, Any]:  # noqa: D102
        return {"polish": self.config.method.polish}


class AceResilient(Constrained):
    """The relaxation for a price, ``rho``, shipped with the terms that the data pay for.

    With ``measure="equivariance"`` it is not the layers' terms that are paid for, but the error of the whole model.
    """

    class Options(Relaxing):  # noqa: D106
        rho: float = Field(1.0, gt=0)
        measure: Literal["strength", "norm", "relative", "equivariance"] = "strength"

    ships_relaxed = True

    def constraint(self) -> ace.Resilient | ace.EquivarianceError:  # noqa: D102
        rho, measure = self.config.method.rho, self.config.method.measure
        return self.of_model(rho=rho) if measure == "equivariance" else ace.Resilient(rho, measure=measure)


class AceTolerance(Constrained):
    """A tolerance ``eps`` on the equivariance error of the whole model, shipped with its terms."""

    class Options(Relaxing):  # noqa: D106
        eps: float = Field(0.05, gt=0)
        share: float = Field(1.0, gt=0, le=1)

    ships_relaxed = True

    def constraint(self) -> ace.EquivarianceError:  # noqa: D102
        return self.of_model(eps=self.config.method.eps, share=self.config.method.share)

    def admits(self, error: float) -> bool:  # noqa: D102
        return error <= self.config.method.eps


class AcePaper(Constrained):
    """γ = 0 by Algorithm 1 as published, with dual rate ``dual_lr`` (default: ``lr``)."""

    class Options(Relaxing):  # noqa: D106
        dual_lr: float | None = Field(None, gt=0)

    def form(self) -> dict[str, Any]:  # noqa: D102
        return {"preset": "paper", "dual_lr": self.config.method.dual_lr}
