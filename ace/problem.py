r"""The constrained problem and the optimizer that solves it; the only file that knows Cooper.

    min_θ,γ  J(θ, γ)   subject to   constraint on |γ_i| for each relaxed layer i, or on the error of the model

``Problem`` poses it as a ``cooper.ConstrainedMinimizationProblem`` with one vector multiplier; ``PrimalDual`` is a
``cooper.ConstrainedOptimizer`` with three forms of the constraints on the layers: proximal (default), augmented, and
the published one; and one of the constraint on the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
from cooper.cmp import CMPState, ConstrainedMinimizationProblem, LagrangianStore
from cooper.constraints.constraint import Constraint as CooperConstraint
from cooper.constraints.constraint_state import ConstraintState
from cooper.formulations.formulations import AugmentedLagrangian, Lagrangian
from cooper.multipliers.multipliers import DenseMultiplier
from cooper.optim.constrained_optimizers.constrained_optimizer import ConstrainedOptimizer
from cooper.optim.optimizer import RollOut
from cooper.penalty_coefficients.penalty_coefficients import DensePenaltyCoefficient
from cooper.utils.annotations import ConstraintType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ace.constraints import Bounded, Constraint, EquivarianceError, Exact, LayerConstraint, Resilient
from ace.distributed import gather, total, total_sizes, world_size
from ace.errors import (
    AceError,
    CheckpointMismatch,
    NonFiniteLoss,
    NotRelaxed,
    OptimizerMismatch,
    ShapeMismatch,
)
from ace.exponentiated import ExponentiatedGradient
from ace.proximal import ProximalGradient
from ace.relaxation import Relaxation, check_called, measuring, relaxations
from ace.saliency import Saliency
from ace.symmetry import Watch
from ace.terms import matrix_of, operator_norm

Form = Literal["proximal", "augmented", "paper", "tolerance", "price"]

DUAL_RATE = 2.0
"""κ_d: the dual rate times the planned steps, in the proximal form."""
PRIMAL_RATE = 50.0
"""κ_γ: the rate of γ times the planned steps, in the proximal form."""
PRICED_RATE = 5.0
"""The same under ``Resilient``, where γ stays: how far each batch moves it is noise in the model that is shipped."""
AUGMENTED_RATE = 10.0
"""Dual rate of the augmented form times the planned steps, in units of the penalty."""
RESILIENT_RATE = 40.0
"""Dual rate of the resilient constraints times the planned steps, in units of ρ."""
TOLERANCE_RATE = 40.0
"""Rate of log λ times the planned steps, for a tolerance on the equivariance error of the model."""
FASTEST_TOLERANCE = 0.1
"""Largest rate of log λ: were it faster than the weights can follow, the model would inflate f instead."""
TOLERANCE_START = 0.01
"""What the constraint on the equivariance error weighs in the Lagrangian at the start, relative to the loss."""
TOLERANCE_MOST = 1.0
"""What it weighs at most, relative to the running size of the loss. Weights that follow the constraint alone do not
meet it sooner for a larger multiplier; they unlearn the task, and what was wound up takes long to unwind."""
_SIZE_RATE = 0.05  # of the running mean square of the loss

_WRAPPERS = {"LightningOptimizer", "AcceleratedOptimizer"}


class Problem(ConstrainedMinimizationProblem):
    r"""The training problem of a relaxed model: minimise the loss subject to a constraint on the relaxation.

    Args:
        relaxed: A model that ``relax`` returned, possibly wrapped (``DistributedDataParallel``, compiled).
        loss: ``loss(model, batch)`` returns the task loss, a tensor without axes. Put ``torch.autocast`` in it.
        constraint: ``Exact()``, ``Bounded(eps)``, ``Resilient(rho)``, ``EquivarianceError(group, eps)`` or
            ``EquivarianceError(group, rho=rho)``.

    Attributes:
        model: The relaxed model as given.
        relaxations: Path of each relaxed layer to its ``Relaxation``.
        gammas: The relaxation strengths γ_i, parameters of shape (1,), in layer order.
        names: What is constrained: the paths of the layers, or the names of the groups.
        slack: The slacks u, shape (layers,), where the form has them as primal variables; else None.
        step: Number of updates done.
        divided: Whether each of several processes has its own part of the batch; set it to False for a batch that each
            of them has in whole.

    Raises:
        NotRelaxed: The model carries no relaxation terms.
        AceError: With ``measure="spectral"``, some terms are no linear map; all are listed. Or γ is sharded.

    Example:
        >>> import torch, ace
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=torch.randn(5, 3))
        >>> problem = ace.Problem(relaxed, loss=lambda model, batch: model(batch).square().mean())
        >>> list(problem.relaxations)
        ['']
    """

    multiplier: nn.Parameter
    """The multipliers λ, shape (names,), once posed."""

    def __init__(
        self,
        relaxed: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__()
        self.model = relaxed
        self.loss = loss
        self.constraint = Exact() if constraint is None else constraint
        self.relaxations: dict[str, Relaxation] = relaxations(relaxed)
        if not self.relaxations:
            raise NotRelaxed("the model carries no relaxation terms: call ace.relax(model, ...) before ace.Problem")
        self.gammas: tuple[nn.Parameter, ...] = tuple(relaxation.gamma for relaxation in self.relaxations.values())
        if hasattr(self.gammas[0], "full_tensor"):
            raise AceError(
                "γ is sharded, and each process needs all of it: pass "
                "ignored_params={r.gamma for r in ace.relaxations(model).values()} to every fully_shard"
            )
        self.form: Form | None = None
        self.slack: nn.Parameter | None = None
        self.units: Tensor | None = None
        self.step = 0
        self.divided = True
        self.names = tuple(self.relaxations)
        self.excess: Tensor | None = None  # (r/ε)² on the batch last observed, over all ranks
        self._watch: Watch | None = None
        if isinstance(self.constraint, EquivarianceError):
            tolerance = self.constraint
            self.names = tuple(tolerance.groups)
            self._watch = Watch(relaxed, tolerance.inputs, tolerance.outputs, tolerance.share, tolerance.seed)
        self._sizes: list[tuple[Tensor, Tensor, int]] | None = None
        self._singular: list[Tensor | None] = [None] * len(self.relaxations)  # where power iteration goes on
        if isinstance(self.constraint, LayerConstraint) and self.constraint.measure == "spectral":
            _check_linear(self.relaxations)

    def pose(self, form: Form, penalty: float = 1.0) -> None:
        r"""Create the multipliers of a form; ``PrimalDual`` calls it.

        Args:
            form: ``"proximal"``: inequality on |γ| that acts through the proximal step; ``"augmented"``: Lagrangian
                plus :math:`\tfrac{c}{2}\|h\|^2`; ``"paper"``: plain Lagrangian, with slacks for ``Resilient``.
            penalty: c of the augmented form, in units of the loss.

        Raises:
            AceError: The problem was posed before, or ``Resilient`` is posed in the augmented form.
        """
        if self.form is not None:
            raise AceError(f"the problem was posed before (form {self.form!r}): make a new ace.Problem")
        if (form in ("tolerance", "price")) != isinstance(self.constraint, EquivarianceError):
            raise AceError("a constraint on the equivariance error has a form of its own: leave out form= and preset=")
        resilient = isinstance(self.constraint, Resilient)
        if resilient and form == "augmented":
            raise AceError(
                "Resilient is a quadratic price already: use form='proximal' (the default) or preset='paper'"
            )
        zeros = self.gammas[0].detach().new_zeros(len(self.names))
        signed = form != "proximal" and isinstance(self.constraint, Exact) and self.constraint.measure == "strength"
        augmented = form == "augmented"
        multiplier = DenseMultiplier(init=zeros.clone(), dtype=zeros.dtype, device=zeros.device)
        self.multiplier = cast("nn.Parameter", multiplier.weight)
        self.relaxation = CooperConstraint(
            ConstraintType.EQUALITY if signed else ConstraintType.INEQUALITY,
            formulation_type=AugmentedLagrangian if augmented else Lagrangian,
            multiplier=multiplier,
            penalty_coefficient=DensePenaltyCoefficient(zeros.new_tensor(penalty)) if augmented else None,
        )
        if resilient and form == "paper":
            self.slack = nn.Parameter(zeros)
        if isinstance(self.constraint, LayerConstraint):
            for index, attached in enumerate(self.relaxations.values()):
                attached.dual = (self.multiplier, index)
        self.form = form

    def observing(self) -> AbstractContextManager[None]:
        """Watch the forward pass inside the context, where the constraint needs the batch."""
        if self._watch is not None:
            return self._watch.watching()
        deterministic = cast("LayerConstraint", self.constraint).deterministic
        return nullcontext() if deterministic else self._measuring()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        with measuring(self.relaxations.values()) as totals:
            yield
            self._sizes = totals()

    def compute_violations(self) -> CMPState:
        """Return the violations at the current γ (and, if the constraint needs it, the batch last observed)."""
        if self._watch is not None:
            return self._compute_errors(self._watch)
        assert isinstance(self.constraint, LayerConstraint)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.form != "proximal"):  # λ has its own step there
            gamma = torch.cat(self.gammas)
        value = gamma
        if self.constraint.measure == "spectral":
            norms = self.operator_norms()
            self.units = norms.detach()
            value = gamma.abs() * norms
        elif not self.constraint.deterministic:
            if self._sizes is None:
                raise AceError("the constraint is measured on the batch: run the model inside problem.observing()")
            units = self.constraint.units(total_sizes(self._sizes))
            self.units = units.detach()
            value = gamma.abs() * units
        elif self.relaxation.constraint_type is ConstraintType.INEQUALITY:
            value = gamma.abs()
        bound: float | Tensor = self.constraint.eps if isinstance(self.constraint, Bounded) else 0.0
        if self.slack is not None:
            bound = self.slack
        violation = value if isinstance(bound, float) and bound == 0 else value - bound
        if violation.shape != self.multiplier.shape:
            raise ShapeMismatch(
                f"violations of shape {tuple(violation.shape)} for multipliers of shape {tuple(self.multiplier.shape)}"
            )
        observed = ConstraintState(violation, contributes_to_primal_update=self.form != "proximal")
        return CMPState(observed_constraints={self.relaxation: observed})

    def operator_norms(self) -> Tensor:
        """Return the largest singular value of each layer's term, shape (layers,), at least 1e-6."""
        norms = []
        for index, relaxation in enumerate(self.relaxations.values()):
            matrix = cast("Tensor", matrix_of(relaxation.term))  # the others were refused
            norm, self._singular[index] = operator_norm(matrix, self._singular[index])
            norms.append(norm.to(relaxation.gamma.dtype))
        return torch.stack(norms).clamp_min(1e-6)

    def _compute_errors(self, watch: Watch) -> CMPState:
        """Return (r/ε)² - 1 for the primal step and log(r/ε), kept within ±1, for the dual step; r under a price."""
        constraint = cast("EquivarianceError", self.constraint)
        squares = []
        for group in constraint.groups.values():
            differences, sizes = watch.squares(group, self.step, self.divided)
            if self.divided:
                differences, sizes = gather(torch.stack((differences, sizes)))
            if constraint.quantile is None:
                squares.append(differences.mean() / sizes.mean())
            else:
                squares.append(torch.quantile(differences, constraint.quantile) / sizes.mean())
        square = torch.stack(squares)
        square = square.clamp_min(torch.finfo(square.dtype).tiny)
        if constraint.rho is not None:
            state = ConstraintState(square.sqrt().to(self.multiplier))
        else:
            aims = [((1 - constraint.margin) * eps) ** 2 for eps in constraint.tolerances.values()]
            excess = (square / square.new_tensor(aims)).to(self.multiplier)
            self.excess = excess.detach()
            state = ConstraintState(excess - 1, strict_violation=0.5 * self.excess.log().clamp(-2, 2))
        return CMPState(observed_constraints={self.relaxation: state})

    def state_of(self, loss: Tensor) -> CMPState:
        """Return Cooper's state of the problem for a task loss that was computed already."""
        state = self.compute_violations()
        state.misc = {"task_loss": loss.detach()}
        state.loss = loss
        if self.slack is not None and isinstance(self.constraint, Resilient):
            state.loss = loss + 0.5 * self.constraint.rho * self.slack.square().sum()
        return state

    def compute_cmp_state(self, batch: Any) -> CMPState:
        """Evaluate loss and violations on a batch."""
        return self.state_of(self.evaluate(batch))

    def evaluate(self, batch: Any) -> Tensor:
        """Return the task loss of a batch, in float32 or better.

        Raises:
            ShapeMismatch: The loss function returns something else than one number.
        """
        with self.observing():
            loss = self.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ShapeMismatch(f"loss(model, batch) must return a tensor without axes, got {found}: take .mean()")
        return loss if loss.dtype == torch.float64 else loss.float()

    def state_dict(self) -> dict[str, Any]:
        """Return multipliers, penalty coefficients, slacks, and where power iteration goes on."""
        slack = None if self.slack is None else self.slack.detach()
        return {**super().state_dict(), "slack": slack, "singular": list(self._singular)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        super().load_state_dict(dict(state_dict))
        self._singular = [v if v is None else v.to(self.multiplier.device) for v in state_dict["singular"]]
        if self.slack is not None:
            with torch.no_grad():
                self.slack.copy_(state_dict["slack"])

    def __getattr__(self, name: str) -> Any:
        if name == "_constraints":  # an object half built by copy or pickle has no constraints yet
            raise AttributeError(name)
        return super().__getattr__(name)


class PrimalDual(ConstrainedOptimizer):
    r"""Primal descent on the weights and γ, dual ascent on the multipliers; all rates from the planned steps.

    ``"proximal"`` (default; dual step first, T = ``steps``, H the steps before polishing, s_i the running root
    mean square of ∂J/∂γ_i):

    .. math::

        \lambda_i &\leftarrow \Big[\lambda_i + \tfrac{\kappa_d}{H - t}\, s_i\, v_i / r_i^2\Big]_+,
        \qquad \kappa_d = 2 \\
        \theta &\leftarrow \text{primal optimizer on } J \\
        \gamma_i &\leftarrow \mathrm{soft}\big(\gamma_i - \tfrac{\kappa_\gamma}{T} \mathrm{clip}(g_i / s_i, -1, 1),\;
        \tfrac{\kappa_\gamma}{T} \lambda_i r_i / s_i\big), \qquad \kappa_\gamma = 50

    With ``Exact``, λ_i is carried along when s_i changes, so λ_i/s_i does not fall. Where the gradient is noise around
    0 a term is let go after about π/(2√(κ_d κ_γ)) = 0.16 of H; where its sign is certain, λ_i/s_i must reach 1 first,
    half of H later: the path depends on what the data say, on no rate to be set.

    With ``Exact``, a term is retired when γ_i = 0 satisfies the optimality condition
    :math:`|\mathrm{E}\,g_i| \le \lambda_i r_i`, or when J without it is less than ``saliency`` higher (see ``probe``);
    those left are retired for the last ``polish`` share of the steps, in which the restored model trains alone. With
    ``Resilient`` the slack is eliminated, λ_i stays in units of the loss,
    :math:`\lambda_i \leftarrow \lambda_i + \tfrac{40}{T}(\rho v_i - \lambda_i)`, and κ_γ = 5.

    With ``EquivarianceError``, γ stays in the primal optimizer, the Lagrangian has the price
    :math:`\lambda\,(r/\varepsilon)^2`, and dual ascent multiplies: :math:`\lambda \leftarrow \lambda\,
    (r/\varepsilon)^{\min(40/T,\, 0.1)}`, with :math:`r/\varepsilon` kept within e and 1/e, and the price at most the
    running root mean square :math:`\bar J` of J. With a price ρ in place of ε it has :math:`\lambda\, r`, the slack is
    eliminated, and :math:`\lambda \leftarrow \lambda + \tfrac{40}{T}(\rho \bar J r - \lambda)`.

    ``"augmented"``: Lagrangian plus :math:`\tfrac{c}{2}\|h\|^2`, γ on SGD with rate 40/(cT), λ on SGD with rate
    10c/T, which is critically damped for every c and T.

    ``preset="paper"``: Algorithms 1 and 2 as published: plain Lagrangian, simultaneous updates, γ and u in the
    primal optimizer with θ, the dual optimizer of the primal's class with rate ``dual_lr``.

    In the first two forms γ is moved from the primal optimizer to one of its own, outside of its weight decay,
    clipping and schedule.

    Args:
        problem: The problem.
        primal_optimizer: Any torch optimizer over ``relaxed.parameters()``, or one that Lightning or Accelerate
            wrapped: its wrapper then makes the step of the weights.
        steps: Planned number of updates T.
        form: ``"proximal"`` or ``"augmented"``.
        preset: ``"paper"`` for the published algorithms; ``form`` is then ignored.
        dual_lr: Rate of the dual optimizer of the preset; the primal optimizer's rate by default.
        penalty: c of the augmented form, in units of the loss.
        polish: Share of the steps, at the end, in which all relaxation is off (``Exact``) or within its bound
            (``Bounded``), in the proximal form.
        saliency: With ``Exact`` in the proximal form, share of the loss that a term must be worth to be kept: one that
            could be taken out for less is let go. 0 leaves it to γ and λ.
        clip: Largest norm of the gradient of θ; γ and u are left out.
        accumulate: Number of ``roll`` calls whose gradients are averaged into one update.
        scaler: A ``torch.amp.GradScaler``; with a wrapped optimizer that of the framework, which then updates it.
        max_skipped: Number of consecutive batches with a non-finite loss that are skipped before
            ``NonFiniteLoss`` is raised.

    Attributes:
        step: Number of updates done.
        skipped: Number of batches skipped because their loss (or, with ``clip``, gradient) was not finite.

    Raises:
        OptimizerMismatch: The primal optimizer misses parameters of the relaxation, or holds one twice.

    Example:
        >>> import torch, ace
        >>> x = torch.randn(64, 3)
        >>> relaxed = ace.relax(torch.nn.Linear(3, 3), layers=torch.nn.Linear, example=x)
        >>> problem = ace.Problem(relaxed, loss=lambda model, batch: (model(batch) - batch).square().mean())
        >>> optimizer = ace.PrimalDual(problem, torch.optim.Adam(relaxed.parameters(), 1e-2), steps=100)
        >>> for _ in range(100):
        ...     rollout = optimizer.roll(x)
        >>> relaxed.relaxation.gamma.item()
        0.0
    """

    cmp: Problem

    def __init__(
        self,
        problem: Problem,
        primal_optimizer: torch.optim.Optimizer,
        steps: int,
        *,
        form: Literal["proximal", "augmented"] = "proximal",
        preset: Literal["paper"] | None = None,
        dual_lr: float | None = None,
        penalty: float = 1.0,
        polish: float = 0.2,
        saliency: float = 0.01,
        clip: float | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        max_skipped: int = 10,
    ) -> None:
        _check_arguments(form, preset, steps, dual_lr, penalty, polish, saliency, accumulate, clip, max_skipped)
        # steps and float16 are the wrapper's; its other methods may be held back, or load a copy
        self._wrapper: torch.optim.Optimizer | None = None
        if _WRAPPERS & {kind.__name__ for kind in type(primal_optimizer).__mro__}:
            self._wrapper, primal_optimizer = primal_optimizer, cast("Any", primal_optimizer).optimizer
        _check_optimizer(problem, primal_optimizer)
        own: Form | None = None
        if isinstance(problem.constraint, EquivarianceError) and preset is None and form == "proximal":
            own = "tolerance" if problem.constraint.rho is None else "price"
        problem.pose(own or preset or form, penalty)
        self.steps = steps
        self.polish = polish
        self.clip = clip
        self.accumulate = accumulate
        self.scaler = scaler
        self.max_skipped = max_skipped
        self.skipped = 0
        self._skipped_in_a_row = 0
        self._micro_step = 0
        self._before: Tensor | None = None
        self._square: Tensor | None = None  # running mean square of the loss
        self._stepped: Tensor | None = None  # γ after the step of this update, to gather it once
        self._layers = tuple(problem.relaxations)
        self._off = torch.zeros(len(problem.relaxations), dtype=torch.bool)
        self._held: list[tuple[Relaxation, nn.Parameter]] = []  # of these layers, with γ
        self._settled: ConstraintState | None = None  # what is observed once all of them are off
        asked = saliency if problem.form == "proximal" and isinstance(problem.constraint, Exact) else 0.0
        self._saliency = Saliency(list(problem.relaxations.values()), asked, steps)
        self._primal, dual = self._optimizers(problem, primal_optimizer, dual_lr, penalty)
        special = {id(p) for p in [*problem.gammas, problem.slack]}
        self._weights = [p for g in primal_optimizer.param_groups for p in g["params"] if id(p) not in special]
        self._known = isinstance(problem.constraint, LayerConstraint) and problem.constraint.deterministic
        super().__init__(problem, self._primal, dual)

    def _optimizers(
        self, problem: Problem, primal: torch.optim.Optimizer, dual_lr: float | None, penalty: float
    ) -> tuple[list[torch.optim.Optimizer], torch.optim.Optimizer]:
        steps, multiplier = self.steps, problem.multiplier
        if problem.form == "tolerance":
            return [primal], ExponentiatedGradient([multiplier], lr=min(TOLERANCE_RATE / steps, FASTEST_TOLERANCE))
        if problem.form == "price":
            return [primal], _resilient(multiplier, cast("Any", problem.constraint).rho, steps)
        if problem.form == "paper":
            rate = primal.param_groups[0]["lr"] if dual_lr is None else dual_lr
            plain: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in primal.defaults else {}
            dual = type(primal)([multiplier], lr=rate, maximize=True, **plain)  # type: ignore[call-arg]
            if problem.slack is not None:
                primal.add_param_group({"params": [problem.slack]})
            return [primal], dual
        _take_out(primal, problem.gammas)
        if problem.form == "augmented":
            gammas: torch.optim.Optimizer = torch.optim.SGD(problem.gammas, lr=4 * AUGMENTED_RATE / (penalty * steps))
            return [primal, gammas], torch.optim.SGD([multiplier], lr=AUGMENTED_RATE * penalty / steps, maximize=True)
        if isinstance(problem.constraint, Resilient):
            gammas = ProximalGradient(problem.gammas, multiplier, lr=PRICED_RATE / steps)
            return [primal, gammas], _resilient(multiplier, problem.constraint.rho, steps)
        # only where λ drives γ to 0: at a bound it must settle at a value in units of the loss
        carry = isinstance(problem.constraint, Exact)
        gammas = ProximalGradient(problem.gammas, multiplier, lr=PRIMAL_RATE / steps, carry=carry)
        return [primal, gammas], torch.optim.SGD([multiplier], lr=DUAL_RATE, maximize=True)

    def roll(self, batch: Any) -> RollOut:
        """Evaluate the loss of a batch and update all variables.

        Args:
            batch: Handed to the loss function.

        Returns:
            Cooper's ``RollOut``. ``loss`` is the task loss, of several processes the mean of theirs; ``cmp_state.misc``
            holds ``step``, ``layers`` and, after the step and detached, ``gamma``, ``violation`` (before it) and
            ``multiplier``, each of shape (layers,); under ``EquivarianceError`` the last two are of shape (groups,),
            named by ``constraints``, and the violation is r/ε - 1, under a price r.

        Raises:
            NonFiniteLoss: After ``max_skipped`` consecutive batches without a finite loss.
            LayerNotCalled: After the first batch, if some relaxed layers did not run.
        """
        self._begin()  # before the forward pass, which can then have the memory of the last gradients
        self.probe(batch)
        return self._update(self.cmp.evaluate(batch))

    def probe(self, batch: Any) -> None:
        """Where it is time to, measure what each term is worth on a batch, and let go of those worth too little.

        ``roll`` begins with it. A loop of your own that calls ``update`` calls it before the forward pass of each;
        if it does not, when a term is let go is up to γ and λ alone. Nearly always it returns at once: each term is
        measured 40 times, less often where 1/5 of the steps would be fewer than the forward passes this takes.

        Args:
            batch: Handed to the loss function, once without each term. Random numbers of torch are the same each time,
                and those of the training are what they would be without the call; so are buffers.
        """
        if self._micro_step > 0 or self._settled is not None or not self._saliency.due(self.step):
            return
        off = self._off | self._saliency.measure(self.cmp.model, lambda: self.cmp.loss(self.cmp.model, batch))
        if not torch.equal(off, self._off):
            with torch.no_grad():
                self._retire(off)

    def update(
        self, loss: Tensor, backward: Callable[[Tensor], Any] | None = None, last: bool | None = None
    ) -> RollOut:
        """Update all variables from a task loss that your own loop computed; ``roll`` is this after the loss.

        Args:
            loss: Task loss with its graph; computed by ``problem.evaluate(batch)``, or inside ``problem.observing()``
                if the constraint is measured on the batch.
            backward: Does the backward pass of what it is given, scaling included, in place of ``Tensor.backward``:
                ``self.manual_backward`` of Lightning, ``accelerator.backward`` of Accelerate.
            last: For a loop that counts the batches of an accumulation itself: whether this is the last one, so that
                the update is made. ``backward`` then takes the average.

        Returns:
            As ``roll``.

        Raises:
            AceError: ``last`` is given to an optimizer that counts itself (``accumulate`` above 1).
        """
        if last is not None and self.accumulate > 1:
            raise AceError(f"update: last={last} with accumulate={self.accumulate}: only one of the two may count")
        self._begin()
        return self._update(loss, backward, last)

    def _begin(self) -> None:
        """Forget the gradients of the last update, once that was made."""
        if self._micro_step == 0:
            self.zero_grad()

    def _update(
        self, loss: Tensor, backward: Callable[[Tensor], Any] | None = None, last: bool | None = None
    ) -> RollOut:
        """Do the rest of what ``update`` does."""
        self._stepped = None if self._settled is None else self._settled.violation
        first = self._micro_step == 0
        last = self._micro_step == self.accumulate - 1 if last is None else last
        # where it needs no batch, or a single one, the violation is known before the primal step
        dual_first = self.cmp.form != "paper" and (self._known or (first and last))
        if first:
            self._before = None
            if self.step == 0:
                check_called(self.cmp.model)
        state = self._state(loss)
        everywhere = loss.detach()
        if (processes := world_size()) > 1:  # not finite on one of them: all of them skip the batch
            everywhere = total(everywhere) / processes
        if not math.isfinite(everywhere.item()):
            return self._skip(state, everywhere, f"loss {everywhere.item()}")
        if self.cmp.form in ("tolerance", "price"):
            self._weigh(everywhere)
        dual = self._dual_gradient(state, first, dual_first)
        if dual_first and first and self._settled is None:
            if self.clip is not None or not last:  # else nothing can go wrong any more
                self._before = self.cmp.multiplier.detach().clone()
            self.dual_step()
        primal = LagrangianStore(loss) if self.cmp.form == "proximal" else state.compute_primal_lagrangian()
        lagrangian = cast("Tensor", primal.lagrangian)
        lagrangian = lagrangian if self.accumulate == 1 else lagrangian / self.accumulate
        if backward is not None:
            backward(lagrangian)
        else:
            (lagrangian if self.scaler is None else self.scaler.scale(lagrangian)).backward()
        batches = self._micro_step + 1
        self._micro_step = 0 if last else batches
        with torch.no_grad():
            if last:
                self._average_gammas()
                if not self._clip():
                    return self._skip(state, everywhere, "gradient not finite")
                if not dual_first and self._settled is None:
                    cast("Tensor", self.cmp.multiplier.grad).div_(batches)
                    self.dual_step()
                self.primal_step()
                self.cmp.step += 1
                self._skipped_in_a_row = 0
            return self._report(RollOut(everywhere, state, primal, dual), skipped=False)

    def _state(self, loss: Tensor) -> CMPState:
        """Evaluate the constraints; where no term is left there is nothing to look at, and γ is 0."""
        if self._settled is None:
            return self.cmp.state_of(loss)
        return CMPState(loss, observed_constraints={self.cmp.relaxation: self._settled})

    def _dual_gradient(self, state: CMPState, first: bool, dual_first: bool) -> LagrangianStore:
        """Return the dual Lagrangian; its gradient is left in the multipliers where this batch is to move them."""
        if self._settled is not None:
            return LagrangianStore(self.cmp.multiplier.new_zeros(()))
        if self.cmp.form == "proximal" and dual_first:  # as below, but the engine of autograd has a price
            violation = state.observed_constraints[self.cmp.relaxation].extract_violations()[1].detach()
            multiplier = self.cmp.multiplier
            if first:
                multiplier.grad = violation
            return LagrangianStore(torch.dot(multiplier.detach(), violation))
        store = state.compute_dual_lagrangian()
        lagrangian = cast("Tensor", store.lagrangian)
        if not dual_first or first:
            lagrangian.backward()
        return store

    @torch.no_grad()
    def _weigh(self, loss: Tensor) -> None:
        """Follow the size of the loss; keep the multipliers of a tolerance between a start and a most in its units."""
        square = loss.square()
        self._square = square if self._square is None else self._square.lerp(square, _SIZE_RATE)
        if self.cmp.excess is None:
            return
        unit = self._square.sqrt() / self.cmp.excess.clamp_min(1.0)  # it may well hold already
        multiplier = self.cmp.multiplier
        start = torch.where(multiplier == 0, TOLERANCE_START * unit, multiplier)
        multiplier.copy_(start.minimum(TOLERANCE_MOST * unit))

    def zero_grad(self) -> None:
        """Forget the gradients of all variables."""
        for optimizer in self._moving:
            optimizer.zero_grad()
        self.cmp.multiplier.grad = None

    @torch.no_grad()
    def dual_step(self) -> None:
        """Ascend on the multipliers, in units of the gradient of γ where the form is proximal."""
        constraint, weight = self.cmp.constraint, self.cmp.multiplier
        if self.cmp.form == "proximal" and not isinstance(constraint, Resilient):
            left = max(math.floor((1 - self.polish) * self.steps) - self.step, 1)
            # what its optimizer would do: gradient ascent, nothing else
            (dual,) = cast("list[torch.optim.Optimizer]", self.dual_optimizers)
            ascent = cast("Tensor", weight.grad) * self._proximal.scale
            if isinstance(units := self._units(), Tensor):
                ascent /= units.square()
            weight.add_(ascent, alpha=dual.param_groups[0]["lr"] / left).relu_()
        else:
            if self.cmp.form == "price":
                cast("Tensor", weight.grad).mul_(cast("Tensor", self._square).sqrt())
            super().dual_step()
        if isinstance(constraint, Bounded):
            # no wind-up: a multiplier that holds γ at 0, well inside of its bound, is too large
            weight.masked_fill_(torch.cat(self.cmp.gammas) == 0, 0.0)

    def primal_step(self) -> None:
        """Descend on γ, then on the weights; retire the terms that have met their constraint for good."""
        if self.cmp.form == "proximal":
            self._proximal.units = self._units()
            for relaxation, gamma in self._held:
                if gamma.grad is not None:  # under a wrapper, or compiled: the term is in the graph still
                    relaxation.zero_grad()
        # the weights last: a wrapper updates the scaler after them
        for optimizer in reversed(self._moving):
            if self._wrapper is not None and optimizer is self._primal[0]:
                self._wrapper.step()
            elif self.scaler is None:
                if isinstance(optimizer, ProximalGradient):
                    self._stepped = optimizer.descend().clone()
                else:
                    optimizer.step()
            elif any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self.scaler.step(optimizer)
        if self.scaler is not None and self._wrapper is None:
            self.scaler.update()
        if self.cmp.form == "proximal":
            self._finish_constraints()

    @property
    def step(self) -> int:
        """Number of updates done."""
        return self.cmp.step

    @property
    def _moving(self) -> list[torch.optim.Optimizer]:
        """The optimizers of what still moves: γ does not once no term is left."""
        return self._primal if self._settled is None else self._primal[:1]

    @property
    def _proximal(self) -> ProximalGradient:
        return cast("ProximalGradient", self._primal[1])

    @property
    def _keep_in_graph(self) -> bool:
        # it expects a gradient of every parameter that had one when the model was wrapped; Lightning wraps out of sight
        sharded = any(hasattr(weight, "full_tensor") for weight in self._weights)
        return self._wrapped or (world_size() > 1 and not sharded)

    @property
    def _wrapped(self) -> bool:
        return isinstance(self.cmp.model, DistributedDataParallel)

    @property
    def _plain(self) -> nn.Module:
        # so that training can go on with another number of processes
        model = self.cmp.model
        return cast("nn.Module", model.module) if self._wrapped else model

    def _units(self) -> Tensor | float:
        return 1.0 if self.cmp.units is None else self.cmp.units

    def _finish_constraints(self) -> None:
        constraint, gammas = self.cmp.constraint, self.cmp.gammas
        polishing = self.step + 1 > math.floor((1 - self.polish) * self.steps)
        if isinstance(constraint, Bounded) and polishing:
            units = self.cmp.operator_norms() if constraint.measure == "spectral" else self._units()
            bound = (constraint.eps / torch.as_tensor(units)).expand(len(gammas))
            for gamma, limit in zip(gammas, bound, strict=True):
                gamma.clamp_(-limit, limit)
            self._stepped = None
        if not isinstance(constraint, Exact) or self._settled is not None:
            return
        done = torch.ones_like(self._off) if polishing else self._done()
        if done is not self._off and not torch.equal(done, self._off):
            self._retire(done)

    def _gamma(self) -> Tensor:
        return torch.cat(self.cmp.gammas) if self._stepped is None else self._stepped

    def _done(self) -> Tensor:
        """Whether γ_i = 0 satisfies the optimality condition, or did so before; shape (layers,)."""
        gamma = self._gamma()
        if gamma.all():
            return self._off
        zero = gamma == 0
        optimal = self._proximal.mean.abs() <= self.cmp.multiplier * self._units()
        return (zero & optimal).cpu() | self._off

    def _retire(self, off: Tensor) -> None:
        """Hold these γ at 0 and take their terms out of the graph; the others are in it."""
        keep, self._held, self._stepped = self._keep_in_graph, [], None
        for relaxation, is_off in zip(self.cmp.relaxations.values(), off.tolist(), strict=True):
            relaxation.retired = relaxation.retired and is_off
            if is_off and not relaxation.retired:
                relaxation.retire(keep)
            if is_off:
                self._held.append((relaxation, relaxation.gamma))
        self._off = off
        self._settled = None
        if off.all():
            self._proximal.zero_grad()  # for the last time
            nothing = torch.zeros_like(self.cmp.multiplier)  # shared by all reports from here on
            self._settled = ConstraintState(nothing, contributes_to_primal_update=False)

    def _average_gammas(self) -> None:
        """Average the gradients of γ over the processes, unless a wrapper of the model has done so."""
        if self._settled is not None or world_size() == 1 or self._wrapped:
            return
        held = [r.gamma for r in self.cmp.relaxations.values() if r.gamma.requires_grad and not r.retired]
        if held:
            means = total(torch.cat([g.new_zeros(1) if g.grad is None else g.grad for g in held])) / world_size()
            for gamma, mean in zip(held, means.split(1), strict=True):
                gamma.grad = mean

    def _clip(self) -> bool:
        """Unscale and clip the gradient of the weights; False if it is not finite."""
        if self.clip is None:
            return True
        if self.scaler is not None:
            self.scaler.unscale_(self._primal[0])
        norm = nn.utils.clip_grad_norm_(self._weights, self.clip)
        return self.scaler is not None or bool(norm.isfinite())  # the scaler skips such a step by itself

    @torch.no_grad()
    def _skip(self, state: CMPState, loss: Tensor, reason: str) -> RollOut:
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._micro_step = 0
        self.zero_grad()
        if self._before is not None:  # the update is dropped whole, its dual step too
            self.cmp.multiplier.copy_(self._before)
        if self._skipped_in_a_row >= self.max_skipped:
            worst = max(self.cmp.relaxations.values(), key=lambda relaxation: relaxation.gamma.abs().item())
            raise NonFiniteLoss(
                f"{self._skipped_in_a_row} batches in a row without a finite loss, the last at step {self.step} "
                f"({reason}; largest |γ| {worst.gamma.item():.3g} at {worst.path!r}): lower the learning rate, clip, "
                "or look at the data"
            )
        empty = state.compute_dual_lagrangian()
        return self._report(RollOut(loss, state, empty, empty), skipped=True)

    def _report(self, rollout: RollOut, skipped: bool) -> RollOut:
        observed = rollout.cmp_state.observed_constraints[self.cmp.relaxation]
        violation = observed.violation if self.cmp.excess is None else self.cmp.excess.sqrt() - 1
        rollout.cmp_state.misc = {
            "task_loss": rollout.loss,
            "step": self.step,
            "layers": self._layers,
            "constraints": self.cmp.names,
            "gamma": self._gamma().cpu(),
            "violation": violation.detach().cpu(),
            "multiplier": self.cmp.multiplier.detach().clone().cpu(),
            "skipped": skipped,
        }
        return rollout

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return everything that training needs to go on: model, multipliers, slacks, optimizers, counters.

        Call it between updates, not in the middle of an accumulation.
        """
        return {
            "form": f"{self.cmp.form}, {type(self.cmp.constraint).__name__}",
            "model": self._plain.state_dict(),
            "problem": self.cmp.state_dict(),
            "optimizers": dict(super().state_dict()),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "off": self._off.clone(),
            "saliency": self._saliency.state_dict(),
            "square": self._square,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Args:
            state: The state of an optimizer of the same form on the same relaxed model.

        Raises:
            CheckpointMismatch: The state belongs to another model or form; all differing keys are listed and nothing is
                loaded.
        """
        _check_state(self, state)
        self._plain.load_state_dict(state["model"])
        self.cmp.load_state_dict(state["problem"])
        super().load_state_dict(state["optimizers"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.cmp.step, self.skipped = state["step"], state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._square = None if state["square"] is None else state["square"].to(self.cmp.multiplier.device)
        self._saliency.load_state_dict(state["saliency"])
        self._micro_step = 0
        with torch.no_grad():
            self._retire(state["off"].clone())


def _resilient(multiplier: nn.Parameter, rho: float, steps: int) -> torch.optim.Optimizer:
    """Return the dual optimizer of a price: gradient ascent, of which λ/ρ is the slack that was eliminated."""
    rate = min(RESILIENT_RATE / steps, 1.0) * rho
    return torch.optim.SGD([multiplier], lr=rate, weight_decay=1 / rho, maximize=True)


def _check_linear(attached: Mapping[str, Relaxation]) -> None:
    """Refuse terms that have no operator norm."""
    found = [
        f"{path or '(root)'} ({'normalised' if relaxation.normalize else type(inner).__name__})"
        for path, relaxation in attached.items()
        for inner in [getattr(relaxation.term, "map", relaxation.term)]
        if relaxation.normalize or matrix_of(relaxation.term) is None
    ]
    if found:
        raise AceError(
            f"measure='spectral' needs terms that are one linear map; these are not: {', '.join(found)}. Use "
            "relax(term='linear', normalize=False), or measure='norm' or 'relative'"
        )


def _check_arguments(
    form: str,
    preset: str | None,
    steps: int,
    dual_lr: float | None,
    penalty: float,
    polish: float,
    saliency: float,
    accumulate: int,
    clip: float | None,
    max_skipped: int,
) -> None:
    problems = []
    if form not in {"proximal", "augmented"}:
        problems.append(f"form={form!r}: choose 'proximal' or 'augmented'")
    if preset not in {None, "paper"}:
        problems.append(f"preset={preset!r}: choose 'paper' or leave it out")
    if dual_lr is not None and preset is None:
        problems.append(f"dual_lr={dual_lr}: the rates follow from steps=; only preset='paper' takes a dual rate")
    if steps < 1:
        problems.append(f"steps={steps}: the planned number of updates, such as len(loader) * epochs")
    if not penalty > 0:
        problems.append(f"penalty={penalty}: must be positive")
    if not 0 <= polish < 1:
        problems.append(f"polish={polish}: a share of the steps, at least 0 and below 1")
    if not 0 <= saliency < math.inf:
        problems.append(f"saliency={saliency}: a share of the loss, such as 0.01; 0 keeps every term that γ and λ keep")
    if accumulate < 1:
        problems.append(f"accumulate={accumulate}: at least 1")
    if clip is not None and not clip > 0:
        problems.append(f"clip={clip}: must be positive, or None")
    if max_skipped < 1:
        problems.append(f"max_skipped={max_skipped}: at least 1")
    if problems:
        raise AceError("PrimalDual: " + "; ".join(problems))


def _check_optimizer(problem: Problem, optimizer: torch.optim.Optimizer) -> None:
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    problems = []
    for path, relaxation in problem.relaxations.items():
        for name, parameter in relaxation.named_parameters():
            count = held.count(id(parameter)) if parameter.requires_grad else 1
            if count != 1:
                where = f"{path}.relaxation.{name}".lstrip(".")
                problems.append(f"{where} is {'missing' if count == 0 else f'held {count} times'}")
    if problems:
        raise OptimizerMismatch(
            "the primal optimizer must hold each parameter of the relaxation once: "
            + "; ".join(problems)
            + ". Build it from relaxed.parameters() after ace.relax"
        )


def _take_out(optimizer: torch.optim.Optimizer, gammas: Iterable[nn.Parameter]) -> None:
    """Remove γ from an optimizer, so that its decay, clipping and schedule do not act on it."""
    special = {id(gamma) for gamma in gammas}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in special]
    for gamma in gammas:
        optimizer.state.pop(gamma, None)


def _check_state(optimizer: PrimalDual, state: Mapping[str, Any]) -> None:
    present = optimizer.state_dict()
    problems = [f"no entry {key!r}" for key in present if key not in state]
    if not problems:
        own, other = present["model"], state["model"]
        problems += [f"missing {key}" for key in own if key not in other]
        problems += [f"unexpected {key}" for key in other if key not in own]
        problems += [
            f"{key} has shape {tuple(other[key].shape)}, not {tuple(own[key].shape)}"
            for key in own
            if key in other and own[key].shape != other[key].shape
        ]
        if state["form"] != present["form"]:
            problems.append(f"it was saved by another form ({state['form']}; here: {present['form']})")
    if problems:
        raise CheckpointMismatch(f"the state belongs to another training, nothing was loaded: {'; '.join(problems)}")
