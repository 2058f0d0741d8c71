r"""Controllers: rules that set γ of every layer before each update, from what the last update showed.

A schedule is one that looks at the number of the step alone. A learned one can learn from the task: it keeps what it
computed the last γ from, computes them again in the next call, and ``gammas.backward(statistics.gradient)`` is the
derivative of the loss with respect to its own parameters, by the chain rule through γ.
"""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

import ace
from ace.distributed import total, total_sizes
from ace.errors import AceError, ConfigError
from ace.relaxation import measuring
from ace.symmetry import Watch
from benchmarks.methods.base import Unconstrained
from benchmarks.options import Relaxing
from benchmarks.tasks import Batch

MEASURED = ("gradient", "ratio", "error")
"""Statistics that are measured only for controllers that ask for them."""


@dataclass(frozen=True)
class Statistics:
    r"""What the last update showed; detached tensors, with one entry for each relaxed layer where not said otherwise.

    All that is measured is 0 before the first update, and what the controller does not ask for is always 0.

    Attributes:
        step: Updates done.
        steps: Updates planned.
        gamma: Relaxation strengths γ in the last update; 1 before the first.
        loss: Task loss J on the batch of the last update, without axes.
        gradient: :math:`\partial J / \partial \gamma_i`.
        ratio: :math:`\lVert f^i_{neq} \rVert / \lVert f^i_{eq} \rVert` over the batch, without γ.
        error: Equivariance error of the model on the batch, without axes:
            :math:`(\sum_s \lVert f(g_s x_s) - g_s f(x_s) \rVert^2 / \sum_s \lVert f(x_s) \rVert^2)^{1/2}`, with one
            random element for each sample. It costs a further forward pass.
    """

    step: int
    steps: int
    gamma: Tensor
    loss: Tensor
    gradient: Tensor
    ratio: Tensor
    error: Tensor


class Controller(ABC):
    """Sets γ of every layer before each update.

    The constructor is called with the number of relaxed layers and the options of the configuration.

    Attributes:
        reads: Those of ``gradient``, ``ratio`` and ``error`` that it wants measured.

    Example:
        >>> class Halving(Controller):
        ...     def step(self, statistics):
        ...         return statistics.gamma / 2
        >>> one, none = torch.ones(2), torch.zeros(2)
        >>> Halving().step(Statistics(0, 10, one, none.sum(), none, none, none.sum()))
        tensor([0.5000, 0.5000])
    """

    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def step(self, statistics: Statistics) -> Tensor:
        """Return γ of every layer for the next update, shape (layers,); its graph is left alone."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that it needs to go on; without a state of its own, nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state that ``state_dict`` returned."""
        del state


class Schedule(Controller):
    """The same γ in all layers, a function of the share of the steps that is done after the update.

    Args:
        curve: Share, above 0 and up to 1, to γ.

    Example:
        >>> one, none = torch.ones(2), torch.zeros(2)
        >>> Schedule(lambda share: 1 - share).step(Statistics(2, 10, one, none.sum(), none, none, none.sum()))
        tensor([0.7000, 0.7000])
    """

    def __init__(self, curve: Callable[[float], float]) -> None:
        self.curve = curve

    def step(self, statistics: Statistics) -> Tensor:  # noqa: D102
        return torch.full_like(statistics.gamma, self.curve((statistics.step + 1) / statistics.steps))


class Descent(Controller):
    r"""γ learns as a weight does: down its gradient, in units of that gradient's running size, between 0 and 1.

    .. math:: \gamma_i \leftarrow \min(1, \max(0, \gamma_i - \eta\, g_i / s_i)), \qquad
        s_i^2 \leftarrow \beta s_i^2 + (1 - \beta) g_i^2

    Nothing asks for symmetry, so what is left of γ is what the training loss wants.

    Args:
        layers: Number of layers.
        rate: Rate η.
        decay: Decay β.
    """

    reads = ("gradient",)

    def __init__(self, layers: int, rate: float = 0.01, decay: float = 0.99) -> None:
        self.rate, self.decay = rate, decay
        self.square = torch.zeros(layers)

    def step(self, statistics: Statistics) -> Tensor:  # noqa: D102
        gradient = statistics.gradient
        self.square = self.decay * self.square + (1 - self.decay) * gradient.square()
        unit = self.square.sqrt().clamp_min(torch.finfo(gradient.dtype).tiny)
        return (statistics.gamma - self.rate * gradient / unit).clamp(0, 1)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"square": self.square}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self.square = state["square"]


def _number(value: Any) -> Any:
    """Read what YAML takes for a word, such as 1e-3, as the number that it is."""
    try:
        return float(value) if isinstance(value, str) and value.lstrip("+-")[:1].isdigit() else value
    except ValueError:
        return value


class Controlled(Unconstrained):
    """γ as a controller sets it, a class ``module:Class``; shipped with the terms, or with ``restore`` without them."""

    class Options(Relaxing):  # noqa: D106
        controller: str = "benchmarks.methods.controllers:Descent"
        options: dict[str, Annotated[Any, BeforeValidator(_number)]] = Field({})
        restore: bool = False

    def setup(self) -> None:  # noqa: D102
        super().setup()
        self.attached = ace.relaxations(self.model)
        self.controller = self.make_controller()
        name = type(self.controller).__name__
        if unknown := set(self.controller.reads) - set(MEASURED):
            raise ConfigError(f"controller {name} reads {', '.join(sorted(unknown))}: there are {', '.join(MEASURED)}")
        for relaxation in self.attached.values():
            relaxation.gamma.requires_grad_("gradient" in self.controller.reads)  # not a weight of the optimizer
        none = torch.zeros_like(self.gammas())
        self.statistics = Statistics(0, self.config.steps, self.gammas(), none.sum(), none, none, none.sum())

    def make_controller(self) -> Controller:
        """Return the controller that the configuration names.

        Raises:
            ConfigError: It cannot be imported, is no controller, or does not take the options.
        """
        method = self.config.method
        self.ships_relaxed = not method.restore
        try:
            found = pkgutil.resolve_name(method.controller)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"method.controller = {method.controller!r} cannot be imported ({error}): it is written module:Class, "
                "with the folder of the module in PYTHONPATH"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Controller)):
            raise ConfigError(f"method.controller = {method.controller!r} is no subclass of Controller")
        try:
            return found(len(self.attached), **method.options)
        except TypeError as error:
            raise ConfigError(f"method.options = {method.options}: {error}") from error

    def gammas(self) -> Tensor:
        """Return γ of every layer, shape (layers,)."""
        return torch.cat([relaxation.gamma.detach() for relaxation in self.attached.values()])

    def step(self, batch: Batch) -> Any:  # noqa: D102
        self.set_gammas(self.controller.step(self.statistics))
        watch = Watch(self.model, self.task.input_types, self.task.output_type, seed=self.config.seed)
        reads, measured = self.controller.reads, dict[str, Tensor]()
        with ExitStack() as stack:
            if "ratio" in reads:
                totals = stack.enter_context(measuring(self.attached.values()))
            if "error" in reads:
                stack.enter_context(watch.watching())
            loss = self.loss(self.trained, batch)
            if "ratio" in reads:
                measured["ratio"] = torch.stack(
                    [(neq / eq.clamp_min(1e-12)).sqrt().detach() for neq, eq, _ in total_sizes(totals())]
                )
        if "error" in reads:
            with torch.no_grad():
                differences, sizes = watch.squares(self.task.group, self.done, divided=self.copies == 1)
            difference, size = total(torch.stack((differences.sum(), sizes.sum())))
            measured["error"] = (difference / size).sqrt()
        record = self.descend(loss, loss + self.price())
        if "gradient" in reads:
            measured["gradient"] = torch.cat([relaxation.gamma.grad for relaxation in self.attached.values()])
        self.remember(record.cmp_state.misc["task_loss"], measured)
        return record

    def set_gammas(self, gammas: Tensor) -> None:
        """Put γ into the layers.

        Raises:
            AceError: It has another shape than (layers,), or entries that are not finite.
        """
        if gammas.shape != (len(self.attached),) or not bool(gammas.isfinite().all()):
            raise AceError(
                f"controller {type(self.controller).__name__} returned {gammas.detach()} after {self.done} updates: "
                f"γ are {len(self.attached)} finite numbers, one for each layer"
            )
        with torch.no_grad():
            for relaxation, gamma in zip(self.attached.values(), gammas, strict=True):
                relaxation.gamma.fill_(gamma)
                relaxation.gamma.grad = None

    def remember(self, loss: Tensor, measured: Mapping[str, Tensor]) -> None:
        """Keep the statistics of this update for the next one."""
        old = self.statistics
        kept = {name: measured.get(name, getattr(old, name)) for name in MEASURED}
        self.statistics = Statistics(self.done, self.config.steps, self.gammas(), loss, **kept)

    def price(self) -> Tensor | float:
        """Return what is added to the task loss after its forward pass."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        seen = {name: getattr(self.statistics, name) for name in ("loss", *MEASURED)}
        return {**super().state_dict(), "controller": self.controller.state_dict(), "statistics": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self.controller.load_state_dict(state["controller"])
        self.remember(state["statistics"]["loss"], state["statistics"])
