"""Test your own model: inherit ``HostTests`` and pytest checks that relaxing the model breaks nothing around it.

The one module of ace that imports pytest; ``import ace`` does not import it.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ace
from ace.calls import call, map_tensors, tensors_in
from ace.errors import ConstraintNotMet
from ace.probing import default_dtype, evaluating, is_scripted
from ace.relaxation import Relaxation, base_state_dict, relax, relaxations, restore
from ace.terms import START

BROKEN = 1e-3
"""Least equivariance error of the relaxed model: a relaxation below it relaxes nothing."""
WIDTH = 10.0
"""How far above the plain model's own floor the error of a single term must be."""
STEPS = 20
"""Steps of training."""

Result = TypeVar("Result")
_Gradients = dict[str, Tensor | None]


class HostTests:
    """Checks that a relaxed model does all that the plain model does: inherit it in a test module of yours.

    Say how the model is built, what it is called with and which symmetries it has; each ``test_...`` method below is
    a check. What the plain model itself cannot do (run in bfloat16, be compiled, be pickled, ...) is found out by
    trying, and the check is skipped with the reason. Everything is on the CPU; two checks start processes of their
    own, so the class must be importable and build all it needs inside its methods.

    Attributes:
        dtype: In which ``model()`` and ``batch()`` come.
        tolerance: Largest relative equivariance error of the plain model in that dtype.
        forces: Whether the output holds derivatives with respect to the positions.
        lr: Learning rate of Adam in ``test_training``.
        relax_options: Further arguments of ``ace.relax``; nothing for the default.
        unsupported: Name of a check, without ``test_``, to the reason why the plain model cannot do it; only for
            what the check does not find out by itself.

    Example:
        >>> import torch, ace
        >>> from ace.testing import HostTests
        >>> class Norms(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mix, self.read = torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(8, 1)
        ...     def forward(self, vectors):
        ...         return self.read(self.mix(vectors.mT).square().sum(1))
        >>> class TestNorms(HostTests):
        ...     relax_options = {"layers": "mix"}
        ...     def model(self):
        ...         return Norms()
        ...     def batch(self):
        ...         return torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))
        ...     def symmetries(self):
        ...         return [(ace.O3(), {"inputs": {"vectors": "vector"}, "outputs": "scalar"})]
        >>> TestNorms().test_plain_is_equivariant()
    """

    dtype: ClassVar[torch.dtype] = torch.float32
    tolerance: ClassVar[float] = 1e-5
    forces: ClassVar[bool] = False
    lr: ClassVar[float] = 1e-3
    relax_options: ClassVar[Mapping[str, Any]] = {}
    unsupported: ClassVar[Mapping[str, str]] = {}

    def model(self) -> nn.Module:
        """Return the plain model, freshly built, in train mode; the global seed is 0."""
        raise NotImplementedError(f"{self._name}: define model()")

    def batch(self) -> Any:
        """Return what the model is called with, as ``ace.relax(example=...)`` takes it; the same on every call."""
        raise NotImplementedError(f"{self._name}: define batch()")

    def symmetries(self) -> list[tuple[ace.groups.Group, dict[str, Any]]]:
        """Return the groups that the model claims, each with ``inputs=`` and ``outputs=`` of `equivariance_error`.

        The first is the one that the relaxation must break.
        """
        raise NotImplementedError(f"{self._name}: define symmetries()")

    # -- the symmetry --------------------------------------------------------------------------------------------

    def test_plain_is_equivariant(self) -> None:
        """The plain model has each symmetry that it claims, up to ``tolerance``."""
        plain = self._plain()
        leaves = _leaves(_evaluate(plain, self.batch()))
        assert leaves, f"{self._name}: the output holds no floating-point tensor"
        assert all(bool(leaf.isfinite().all()) for leaf in leaves), f"{self._name}: the output is not finite"
        assert any(bool(leaf.any()) for leaf in leaves), f"{self._name}: the output is 0, which has every symmetry"
        for group, types in self.symmetries():
            error = self._error(plain, self.batch(), group, types)
            assert error <= self.tolerance, (
                f"{self._name}: the plain model has error {error:.2g} under {group}, above {self.tolerance:g}"
            )

    def test_relaxed_breaks_symmetry(self) -> None:
        """With γ = 1 the relaxed model is not equivariant."""
        group, types = self.symmetries()[0]
        relaxed = self._relaxed()
        error = self._error(relaxed, self.batch(), group, types)
        assert error > BROKEN, (
            f"{self._name}: relaxed at {', '.join(relaxations(relaxed))}, it still has {group}: error {error:.2g}"
        )

    def test_every_term_breaks_symmetry(self) -> None:
        """Each term by itself breaks the symmetry: a γ that breaks nothing would be constrained for nothing."""
        group, types = self.symmetries()[0]
        plain, batch = self._plain(), self.batch()
        with self._wide() as (dtype, default), default_dtype(default):
            plain, batch = _cast_module(plain, dtype), _cast(batch, dtype)
            _disturb(plain)  # a weight that starts at 0 would hide the terms behind it
            floor = self._error(plain, batch, group, types)
            relaxed = self._relax(plain, batch)
            errors = {}
            for path, relaxation in relaxations(relaxed).items():
                _set_gamma(relaxed, 0.0)
                _fill(relaxation, 1 / START)
                errors[path] = self._error(relaxed, batch, group, types, elements=2)
        least = max(WIDTH * floor, 1e-6)
        idle = {path: error for path, error in errors.items() if not error > least}
        assert not idle, (
            f"{self._name}: these terms break no symmetry ({group}; error of the plain model {floor:.2g}): "
            + ", ".join(f"{path or '(root)'} {error:.2g}" for path, error in idle.items())
        )

    def test_strength_zero_is_plain(self) -> None:
        """At γ = 0 it is bitwise the plain model, gradients up to rounding; with every term retired, these bitwise too.

        Those of a model of forces up to rounding in both cases: its second backward pass sums in an order of its own.
        """
        plain = self._plain()
        before, again = self._behaviour(plain), self._behaviour(plain)
        if problem := self._difference(again, before):
            pytest.skip(f"the plain model does not reproduce itself bitwise: {problem}")
        keys, names = list(plain.state_dict()), [name for name, _ in plain.named_parameters()]
        relaxed = self._relax(plain, self.batch())
        assert relaxed is plain, f"{self._name}: relax returned another object"
        found = list(base_state_dict(relaxed))
        assert found == keys, f"{self._name}: the keys of the state dict changed: {_changed(found, keys)}"
        ours = {name for name, _ in relaxed.named_parameters()} - set(names)
        assert ours == {name for name, _ in relaxed.named_parameters() if ".relaxation." in f".{name}"}, (
            f"{self._name}: parameters were added outside of the relaxations, or lost"
        )
        _set_gamma(relaxed, 0.0)
        problem = self._difference(self._behaviour(relaxed), before, gradients_exact=False)
        assert not problem, f"{self._name}: at γ = 0 it is not the plain model: {problem}"
        for relaxation in relaxations(relaxed).values():
            relaxation.retire()
        problem = self._difference(self._behaviour(relaxed), before)
        assert not problem, f"{self._name}: with every term retired it is not the plain model: {problem}"

    def test_restored_is_plain(self) -> None:
        """``restore`` gives back the same object: keys, order, outputs bitwise, no hook and no attribute left."""
        plain = self._plain()
        _evaluate(plain, self.batch())  # a module may keep something from its first call
        before, output = _anatomy(plain), _leaves(_evaluate(plain, self.batch()))
        relaxed = self._relax(plain, self.batch())
        _evaluate(relaxed, self.batch())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstraintNotMet)  # γ is 1: the output must not show it
            back = restore(relaxed)
        assert back is plain, f"{self._name}: restore returned another object"
        after = _anatomy(back)
        assert list(after) == list(before), f"{self._name}: modules changed: {_changed(list(after), list(before))}"
        for path, parts in before.items():
            assert after[path] == parts, f"{self._name}: restore left traces in {path or '(root)'}: " + "; ".join(
                f"{what} was {part}, is {after[path][what]}"
                for what, part in parts.items()
                if after[path][what] != part
            )
        problem = _unequal(_leaves(_evaluate(back, self.batch())), output)
        assert not problem, f"{self._name}: the restored model is not the plain one: {problem}"

    # -- training ------------------------------------------------------------------------------------------------

    def test_training(self) -> None:
        """Twenty steps of ``PrimalDual`` on random targets lower the loss and move every γ, forces included."""
        relaxed = self._relaxed()
        _set_gamma(relaxed, 0.5)  # free to go either way: γ is kept within [0, 1]
        distance = self._regression(relaxed)
        if self.forces:
            self._check_forces(relaxed)
        problem = ace.Problem(relaxed, loss=lambda model, batch: distance(call(model, batch)))
        adam = torch.optim.Adam(relaxed.parameters(), self.lr)
        optimizer = ace.PrimalDual(problem, adam, steps=50 * STEPS)  # planned for longer: no polishing in here
        gammas = {path: relaxation.gamma for path, relaxation in relaxations(relaxed).items()}
        reached: set[str] = set()

        def train() -> list[float]:
            losses = []
            for _ in range(STEPS):
                loss = optimizer.roll(self.batch()).loss
                losses.append(float("nan") if loss is None else float(loss))
                reached.update(path for path, gamma in gammas.items() if gamma.grad is not None and gamma.grad.any())
            return losses

        torch.manual_seed(0)
        losses = self._must("be trained", train)
        assert optimizer.skipped == 0, f"{self._name}: the loss was not finite: {losses}"
        assert losses[-1] < losses[0], f"{self._name}: {STEPS} steps did not lower the loss: {losses}"
        idle = [path for path, gamma in gammas.items() if path not in reached or gamma.item() == 0.5]
        assert not idle, f"{self._name}: the loss does not move γ at {', '.join(map(repr, idle))}"

    def test_accumulation(self) -> None:
        """Two half batches accumulated give the gradient of the whole batch."""

        def gradients(parts: list[tuple[int, ...]]) -> _Gradients:
            relaxed = self._relaxed()
            losses = [self._regression(relaxed, seed) for seed in (1, 2)]

            def loss(model: nn.Module, part: tuple[int, ...]) -> Tensor:
                values = []
                for index in part:
                    torch.manual_seed(index)  # dropout must be the same in both runs
                    values.append(losses[index](call(model, self.batch())))
                return torch.stack(values).mean()

            problem = ace.Problem(relaxed, loss)
            sgd = torch.optim.SGD(relaxed.parameters(), 1e-6)
            optimizer = ace.PrimalDual(problem, sgd, steps=50 * STEPS, accumulate=len(parts))
            for part in parts:
                optimizer.roll(part)
            return _gradients_of(relaxed)

        wrong = self._apart(gradients([(0,), (1,)]), gradients([(0, 1)]))
        assert not wrong, f"{self._name}: two accumulated halves are not the whole batch: {wrong}"

    def test_checkpointed_model(self) -> None:
        """Activation checkpointing around the whole model changes no gradient."""
        self._check_recomputed("")

    def test_checkpointed_block(self) -> None:
        """Activation checkpointing around a block that holds relaxed layers changes no gradient."""
        path = _block_of(self._relaxed())
        if path is None:
            pytest.skip("the model itself is the relaxed layer: it has no block to recompute")
        self._check_recomputed(path)

    # -- precision -----------------------------------------------------------------------------------------------

    def test_float32(self) -> None:
        """It runs, forward and backward, in float32."""
        self._check_precision(torch.float32)

    def test_float64(self) -> None:
        """It runs, forward and backward, in float64."""
        self._check_precision(torch.float64)

    def test_bfloat16_autocast(self) -> None:
        """It runs, forward and backward, under autocast to bfloat16."""

        def run(model: nn.Module) -> tuple[list[Tensor], _Gradients]:
            with torch.autocast("cpu", torch.bfloat16):
                return _step(model, self.batch())

        plain = self._plain()
        expected = self._ask("run under bfloat16 autocast", lambda: _finite(run(plain)))[0]
        relaxed = self._relax(plain, self.batch())
        outputs, gradients = self._must("run under bfloat16 autocast", lambda: run(relaxed))
        self._check_finite(outputs, gradients)
        self._check_dtypes(outputs, expected)
        _set_gamma(relaxed, 0.0)
        problem = _unequal(run(relaxed)[0], expected)
        assert not problem, f"{self._name}: under autocast, at γ = 0, it is not the plain model: {problem}"

    # -- copies and files ----------------------------------------------------------------------------------------

    def test_deepcopy(self) -> None:
        """A deep copy shares nothing with the original, and its own γ acts in it."""
        self._ask("be deep-copied", lambda: copy.deepcopy(self._plain()))
        self._check_copy(copy.deepcopy, "a deep copy")

    def test_pickle(self) -> None:
        """The whole model goes through pickle and through ``torch.save``."""

        def pickled(model: nn.Module) -> Any:
            return pickle.loads(pickle.dumps(model))

        def saved(model: nn.Module) -> Any:
            return _through_a_file(model, weights_only=False)

        for duplicate, what in ((pickled, "a pickled copy"), (saved, "a copy from torch.save")):
            self._ask("be pickled", partial(duplicate, self._plain()))
            self._check_copy(duplicate, what)

    def test_state_dict(self) -> None:
        """A saved state dict loads with ``weights_only=True`` into a model relaxed anew."""
        source, target = self._relaxed(), self._relaxed()
        _disturb(source)
        target.load_state_dict(_through_a_file(source.state_dict(), weights_only=True))
        problem = _unequal(_leaves(_evaluate(target, self.batch())), _leaves(_evaluate(source, self.batch())))
        assert not problem, f"{self._name}: its own state dict does not bring it back: {problem}"

    def test_base_state_dict(self) -> None:
        """The plain model's state dict loads into the relaxed one, and comes back exactly."""
        source = self._plain()
        _disturb(source)
        relaxed = self._relaxed()
        ace.load_base_state_dict(relaxed, source.state_dict())
        _set_gamma(relaxed, 0.0)
        expected = _leaves(_evaluate(source, self.batch()))
        problem = _unequal(_leaves(_evaluate(relaxed, self.batch())), expected)
        assert not problem, (
            f"{self._name}: with the plain weights loaded, at γ = 0, it is not the plain model: {problem}"
        )
        target = self._plain()
        target.load_state_dict(base_state_dict(relaxed))
        problem = _unequal(_leaves(_evaluate(target, self.batch())), expected)
        assert not problem, f"{self._name}: base_state_dict is not the plain model's state dict: {problem}"

    # -- compilation and processes -------------------------------------------------------------------------------

    def test_compile(self) -> None:
        """It compiles with no more graph breaks than the plain model, and not again when γ moves or a term retires."""

        def no_change(model: nn.Module) -> list[Callable[[], None]]:
            return [lambda: None] * 4

        def moves(model: nn.Module) -> list[Callable[[], None]]:
            attached = list(relaxations(model).values())
            return [partial(_set_gamma, model, gamma) for gamma in (0.5, 0.0, -0.25)] + [attached[0].retire]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler talks about its own affairs
            for backend in ("aot_eager", "eager"):  # the second where autograd runs inside the model
                try:
                    allowed = _compiled(self._plain(), self.batch, backend, no_change)
                    break
                except Exception as problem:
                    reason = _reason(problem)
            else:
                pytest.skip(f"the plain model cannot be compiled: {reason}")
            found = self._must("be compiled", lambda: _compiled(self._relaxed(), self.batch, backend, moves))
        assert found.breaks <= allowed.breaks, (
            f"{self._name}: {found.breaks} graph breaks where the plain model has {allowed.breaks}: {found.reasons}"
        )
        assert found.later <= allowed.later, (
            f"{self._name}: compiled again ({found.later} graphs; plain {allowed.later}) when γ moved or a term was "
            f"retired: {found.reasons}"
        )
        assert found.error <= max(10 * allowed.error, self._rounding), (
            f"{self._name}: compiled and eager outputs differ by {found.error:.2g} (plain: {allowed.error:.2g})"
        )

    def test_distributed(self) -> None:
        """Two processes agree on gradients and γ, with all terms and with half of them retired."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                start_processes(_rank, (type(self), folder), nprocs=2, start_method=_start_method())
            except ProcessRaisedException as problem:
                raise AssertionError(f"{self._name}: {problem}") from None
            except ProcessExitedException as problem:
                where = f"{type(self).__module__}.{self._name}"
                raise AssertionError(f"{self._name}: {problem}; can a new process import {where}?") from None
            zero, one = (torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2))
        if zero["skip"]:
            pytest.skip(f"the plain model cannot run under DistributedDataParallel: {zero['skip']}")
        for what in ("gradients", "retired", "gamma"):
            differing = [name for name, value in zero[what].items() if not torch.equal(value, one[what][name])]
            assert not differing, f"{self._name}: {what} of two processes differ: {', '.join(differing)}"

    # -- what the user sees --------------------------------------------------------------------------------------

    def test_summary(self) -> None:
        """``summary`` names each relaxed layer, and gives the reason for each layer left strict."""
        relaxed = self._relaxed()
        rows = ace.summary(relaxed, self.batch())
        attached = [row for row in rows if not row.status.startswith("strict")]
        found, paths = [row.path for row in attached], [path or "(root)" for path in relaxations(relaxed)]
        assert found == paths, f"{self._name}: summary lists {found}, relaxed are {paths}"
        idle = [row.path for row in attached if row.ratio == 0]
        assert not idle, f"{self._name}: these terms add nothing: {', '.join(idle)}"
        silent = [row.path for row in rows if not row.status.removeprefix("strict").strip(": ")]
        assert not silent, f"{self._name}: strict without a reason: {', '.join(silent)}"

    # -- helpers -------------------------------------------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _one_check(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Skip what is declared as unsupported; leave the global random state as it was."""
        unknown = [check for check in self.unsupported if not hasattr(self, f"test_{check}")]
        assert not unknown, f"{self._name}: unsupported names no check: {', '.join(unknown)}"
        reason = self.unsupported.get(request.node.name.removeprefix("test_"))
        if reason:
            pytest.skip(f"the plain model cannot: {reason}")
        state = random.getstate()
        with torch.random.fork_rng(devices=[]):
            yield
        random.setstate(state)

    @property
    def _name(self) -> str:
        return type(self).__qualname__

    @property
    def _rounding(self) -> float:
        """Relative difference that the order of operations may make in the host's dtype."""
        return 1e-3 if self.dtype != torch.float64 else 1e-8

    def _plain(self) -> nn.Module:
        torch.manual_seed(0)
        random.seed(0)
        return self.model()

    def _relax(self, plain: nn.Module, batch: Any) -> nn.Module:
        torch.manual_seed(1)
        return relax(plain, example=batch, **self.relax_options)

    def _relaxed(self) -> nn.Module:
        return self._relax(self._plain(), self.batch())

    def _error(
        self, model: nn.Module, batch: Any, group: ace.groups.Group, types: dict[str, Any], elements: int = 8
    ) -> float:
        return ace.equivariance_error(model, batch, group, elements=elements, **types).max

    def _ask(self, what: str, action: Callable[[], Result]) -> Result:
        """Try something on the plain model; skip the check if it cannot do it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return action()
        except Exception as problem:
            pytest.skip(f"the plain model cannot {what}: {_reason(problem)}")

    def _must(self, what: str, action: Callable[[], Result]) -> Result:
        """Do with the relaxed model what the plain model can do; say which model could not."""
        try:
            return action()
        except AssertionError:
            raise
        except Exception as problem:
            message = f"{self._name}: the relaxed model cannot {what}, the plain model can: {_reason(problem)}"
            raise AssertionError(message) from problem

    def _default_for(self, dtype: torch.dtype) -> torch.dtype:
        """The default dtype under which the plain model runs in ``dtype``; raises what it raised."""
        defaults = list(dict.fromkeys((torch.get_default_dtype(), dtype)))
        for default in defaults:
            plain = self._plain()
            try:
                with default_dtype(default), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    _finite(_step(_cast_module(plain, dtype), _cast(self.batch(), dtype)))
                break
            except Exception:
                if default == defaults[-1]:
                    raise
        return default

    @contextmanager
    def _wide(self) -> Iterator[tuple[torch.dtype, torch.dtype]]:
        """Float64 and the default dtype that it needs, or the host's own where it cannot run in float64."""
        try:
            chosen = torch.float64, self._default_for(torch.float64)
        except Exception:
            chosen = self.dtype, torch.get_default_dtype()
        yield chosen

    def _behaviour(self, model: nn.Module) -> tuple[list[Tensor], _Gradients]:
        """Outputs in eval and train mode, and gradients of the plain model's parameters."""
        evaluated = _leaves(_evaluate(model, self.batch()))
        outputs, gradients = _step(model, self.batch())
        return evaluated + outputs, {
            name: gradient for name, gradient in gradients.items() if ".relaxation." not in f".{name}"
        }

    def _regression(self, model: nn.Module, seed: int = 1) -> Callable[[Any], Tensor]:
        """Mean squared distance of an output to random targets, each part in units of its own size."""
        with _unchanged(model):
            parts = [part.detach() for part in _differentiable(call(model, self.batch()))]
        generator = torch.Generator().manual_seed(seed)
        sizes = [
            size if size > 0 else torch.ones_like(size) for size in (part.square().mean().sqrt() for part in parts)
        ]
        targets = [
            part + size * torch.randn(part.shape, generator=generator).to(part)
            for part, size in zip(parts, sizes, strict=True)
        ]

        def loss(output: Any) -> Tensor:
            found = _differentiable(output)
            errors = [((f - t) / s).square().mean() for f, t, s in zip(found, targets, sizes, strict=True)]
            return torch.stack([error.to(errors[0].dtype) for error in errors]).mean()

        return loss

    def _check_forces(self, relaxed: nn.Module) -> None:
        """A loss on the forces alone reaches γ: through the derivative with respect to the positions, and back."""
        batch = self.batch()
        shapes = {t.shape for _, t in tensors_in(batch) if t.is_floating_point() and t.dim() > 1 and t.shape[-1] <= 3}
        with _unchanged(relaxed):
            forces = [part for part in _differentiable(call(relaxed, batch)) if part.shape in shapes]
            assert forces, f"{self._name}: forces = True, but no output of the shape of the positions has a graph"
            gammas = {path: relaxation.gamma for path, relaxation in relaxations(relaxed).items()}
            found = torch.autograd.grad(
                torch.stack([part.square().sum() for part in forces]).sum(), list(gammas.values()), allow_unused=True
            )
        cut = [path for path, g in zip(gammas, found, strict=True) if g is None or not g.isfinite() or g == 0]
        assert not cut, f"{self._name}: a loss on the forces does not reach γ at {', '.join(map(repr, cut))}"

    def _check_precision(self, dtype: torch.dtype) -> None:
        default = self._ask(f"run in {dtype}", lambda: self._default_for(dtype))
        plain = self._plain()
        with default_dtype(default):
            plain, batch = _cast_module(plain, dtype), partial(_cast, self.batch(), dtype)
            expected = _leaves(_evaluate(plain, batch()))
            relaxed = self._relax(plain, batch())
            outputs, gradients = self._must(f"run in {dtype}", lambda: _step(relaxed, batch()))
            self._check_finite(outputs, gradients)
            self._check_dtypes(outputs, expected)
            _set_gamma(relaxed, 0.0)
            problem = _unequal(_leaves(_evaluate(relaxed, batch())), expected)
        assert not problem, f"{self._name}: in {dtype}, at γ = 0, it is not the plain model: {problem}"

    def _check_finite(self, outputs: list[Tensor], gradients: _Gradients) -> None:
        assert all(bool(leaf.isfinite().all()) for leaf in outputs), f"{self._name}: an output is not finite"
        ours = {name: gradient for name, gradient in gradients.items() if name.endswith("relaxation.gamma")}
        bad = [name for name, gradient in ours.items() if gradient is None or not gradient.isfinite().all()]
        assert ours, f"{self._name}: no γ among the parameters"
        assert not bad, f"{self._name}: no finite gradient at {', '.join(bad)}"

    def _check_dtypes(self, outputs: list[Tensor], expected: list[Tensor]) -> None:
        found, wanted = [leaf.dtype for leaf in outputs], [leaf.dtype for leaf in expected]
        assert found == wanted, f"{self._name}: outputs are {found} where the plain model's are {wanted}"

    def _check_copy(self, duplicate: Callable[[nn.Module], Any], what: str) -> None:
        plain_output = _leaves(_evaluate(self._plain(), self.batch()))
        original = self._relaxed()
        output = _leaves(_evaluate(original, self.batch()))
        twin = self._must(f"become {what}", lambda: duplicate(original))
        problem = _unequal(_leaves(_evaluate(twin, self.batch())), output)
        assert not problem, f"{self._name}: {what} computes something else: {problem}"
        ours, theirs = relaxations(original), relaxations(twin)
        assert list(ours) == list(theirs), f"{self._name}: {what} is relaxed at {list(theirs)}, not at {list(ours)}"
        shared = [path for path in ours if ours[path] is theirs[path] or ours[path].gamma is theirs[path].gamma]
        assert not shared, f"{self._name}: {what} shares the relaxation of {', '.join(shared)}"
        _set_gamma(twin, 0.0)
        problem = _unequal(_leaves(_evaluate(twin, self.batch())), plain_output)
        assert not problem, f"{self._name}: {what} with its own γ = 0 is not the plain model: {problem}"
        _disturb(twin)
        problem = _unequal(_leaves(_evaluate(original, self.batch())), output)
        assert not problem, f"{self._name}: changing {what} changed the original: {problem}"

    def _check_recomputed(self, path: str) -> None:
        def both(model: nn.Module) -> str:
            block = model.get_submodule(path)
            straight = _step(model, self.batch())[1]
            # what a module runs instead of itself when it is called: hooks are recomputed with it
            block._compiled_call_impl = partial(checkpoint, block._call_impl, use_reentrant=False)
            try:
                return self._apart(_step(model, self.batch())[1], straight)
            finally:
                block._compiled_call_impl = None

        if wrong := self._ask("be recomputed in the backward pass", lambda: both(self._plain())):
            pytest.skip(f"the plain model recomputed in the backward pass has other gradients: {wrong}")
        wrong = self._must("be recomputed in the backward pass", lambda: both(self._relaxed()))
        assert not wrong, f"{self._name}: recomputed in the backward pass, gradients differ: {wrong}"

    def _difference(
        self,
        found: tuple[list[Tensor], _Gradients],
        expected: tuple[list[Tensor], _Gradients],
        gradients_exact: bool = True,
    ) -> str:
        """What differs between two behaviours: outputs bitwise; gradients bitwise too, or up to rounding."""
        if problem := _unequal(found[0], expected[0]):
            return problem
        if found[1].keys() != expected[1].keys():
            return f"parameters {_changed(list(found[1]), list(expected[1]))}"
        if self.forces or not gradients_exact:  # a sum over branches has an order, which a further branch changes
            return self._apart(found[1], expected[1], 1e3 * torch.finfo(self.dtype).eps)
        names = [f"gradient of {name}" for name in expected[1]]
        return _unequal(list(found[1].values()), list(expected[1].values()), names)

    def _apart(self, found: _Gradients, expected: _Gradients, tolerance: float | None = None) -> str:
        """Names of the gradients that differ by more than rounding."""
        tolerance = self._rounding if tolerance is None else tolerance
        norms = {name: 0.0 if g is None else g.double().norm().item() for name, g in expected.items()}
        whole = sum(norm**2 for norm in norms.values()) ** 0.5
        wrong = []
        for name, gradient in expected.items():
            other = found.get(name)
            zero = torch.zeros((), dtype=torch.float64)
            change = (zero if other is None else other.double()) - (zero if gradient is None else gradient.double())
            if not change.norm().item() <= tolerance * (norms[name] + 1e-2 * whole):
                wrong.append(f"{name} by {change.norm().item():.2g} of {norms[name]:.2g}")
        return ", ".join(wrong)

    def _distributed(self, rank: int) -> dict[str, Any]:
        """What one of two processes finds; each has its own targets."""
        problem = ""
        for find_unused in (False, True):
            problem = self._wrapped_fails(find_unused)
            if not problem:
                break
        if problem:
            return {"skip": problem}
        relaxed = self._relaxed()
        losses = [self._regression(relaxed, seed) for seed in range(2)]

        def loss(model: nn.Module, batch: Any) -> Tensor:
            return losses[rank](call(model, batch))

        def alone() -> _Gradients:
            """The mean over both processes, without them."""
            parts = [_step(relaxed, self.batch(), loss)[1] for loss in losses]
            return {n: None if g is None else (g + _zero_if_none(parts[1][n], g)) / 2 for n, g in parts[0].items()}

        def together() -> _Gradients:
            _step(wrapped, self.batch(), losses[rank])  # an unused parameter shows in the second step only
            _step(wrapped, self.batch(), losses[rank])
            return _gradients_of(relaxed)

        expected = alone()
        wrapped = DistributedDataParallel(relaxed, find_unused_parameters=find_unused)
        found = together()
        wrong = self._apart(found, expected)
        assert not wrong, f"{self._name}: the gradient of two processes is not the mean of theirs: {wrong}"
        problem_of = ace.Problem(wrapped, loss)
        optimizer = ace.PrimalDual(problem_of, torch.optim.SGD(wrapped.parameters(), 1e-6), steps=50 * STEPS)
        for _ in range(3):
            optimizer.roll(self.batch())
        gamma = {path: relaxation.gamma.detach().clone() for path, relaxation in relaxations(wrapped).items()}
        state = optimizer.state_dict()
        state["off"][::2] = True
        optimizer.load_state_dict(state)
        for _ in range(3):
            optimizer.roll(self.batch())
        retired = _gradients_of(relaxed)
        held = [p for p, off in zip(gamma, state["off"].tolist(), strict=True) if off and relaxations(relaxed)[p].gamma]
        assert not held, f"{self._name}: retired γ moved again at {', '.join(held)}"
        return {"skip": "", "gamma": gamma, "gradients": _present(found), "retired": _present(retired)}

    def _wrapped_fails(self, find_unused: bool) -> str:
        """Why the plain model fails under DistributedDataParallel, if it does."""
        plain = self._plain()
        try:
            wrapped = DistributedDataParallel(plain, find_unused_parameters=find_unused)
            for _ in range(2):
                _step(wrapped, self.batch())
        except Exception as problem:
            return _reason(problem)
        return ""


def _rank(rank: int, host: type[HostTests], folder: str) -> None:
    """One of two processes under ``test_distributed``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(host()._distributed(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _start_method() -> str:
    """A server that has imported torch already and forks for each host; new interpreters where there is no fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload([__name__])
    return "forkserver"


class _Compiled:
    """What compiling a model gave: graph breaks, graphs compiled after the first call, distance to eager mode."""

    def __init__(self, breaks: int, later: int, error: float, reasons: str) -> None:
        self.breaks, self.later, self.error, self.reasons = breaks, later, error, reasons


def _compiled(
    model: nn.Module,
    batch: Callable[[], Any],
    backend: str,
    changes: Callable[[nn.Module], list[Callable[[], None]]],
) -> _Compiled:
    """Compile a model, run it forward and backward, then again after each change."""
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    try:
        eager = _step(model, batch())[0]
        compiled: Any = torch.compile(model, backend=backend)
        found = _step(compiled, batch())[0]
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        for change in changes(model):
            change()
            _step(compiled, batch())
        return _Compiled(
            breaks=breaks,
            later=counters["stats"]["unique_graphs"] - graphs,
            error=max((_distance(f, e) for f, e in zip(found, eager, strict=True)), default=0.0),
            reasons="; ".join(str(reason).splitlines()[0] for reason in counters["graph_break"]),
        )
    finally:
        torch._dynamo.reset()


def _leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, detached."""
    return [tensor.detach() for _, tensor in tensors_in(output) if tensor.is_floating_point()]


def _differentiable(output: Any) -> list[Tensor]:
    """The tensors of an output that were computed from something with a gradient."""
    return [tensor for _, tensor in tensors_in(output) if tensor.grad_fn is not None]


def _evaluate(model: nn.Module, batch: Any) -> Any:
    """Run a model in eval mode, with a fixed seed; gradients stay enabled for models of forces."""
    torch.manual_seed(2)
    with evaluating(model):
        return call(model, batch)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Put the buffers back as they were: the statistics of a BatchNorm move in every call in train mode."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _step(model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None) -> tuple[list[Tensor], _Gradients]:
    """Run a model forward and backward with a fixed seed: its outputs and gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with _unchanged(model):
        output = call(model, batch)
        parts = _differentiable(output)
        if not parts:
            raise AssertionError(f"no output of {type(model).__name__} depends on a parameter")
        generator = torch.Generator().manual_seed(3)
        terms = [(part * torch.randn(part.shape, generator=generator).to(part)).sum() for part in parts]
        (
            loss(output) if loss is not None else torch.stack([term.to(terms[0].dtype) for term in terms]).sum()
        ).backward()
    return _leaves(output), _gradients_of(model)


def _gradients_of(model: nn.Module) -> _Gradients:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def _present(gradients: _Gradients) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _zero_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _finite(outputs: tuple[list[Tensor], _Gradients]) -> tuple[list[Tensor], _Gradients]:
    if not all(bool(leaf.isfinite().all()) for leaf in outputs[0]):
        raise ArithmeticError("its output is not finite")
    return outputs


def _set_gamma(relaxed: nn.Module, value: float) -> None:
    for relaxation in relaxations(relaxed).values():
        _fill(relaxation, value)


@torch.no_grad()
def _fill(relaxation: Relaxation, value: float) -> None:
    relaxation.gamma.fill_(value)


@torch.no_grad()
def _disturb(model: nn.Module) -> None:
    """Move every parameter a little, in place."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)


def _cast_module(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model if it has the dtype already; else a copy, since some libraries share buffers between models."""
    floating = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return model if floating <= {dtype} else copy.deepcopy(model).to(dtype)


def _through_a_file(value: Any, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def _anatomy(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What each module of a model is made of, by path: class, mode, attributes, children, tensors, hooks."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        found[path] = {"class": type(module), "training": module.training}
        if not is_scripted(module):  # compiled: nothing can be added to it
            found[path] |= {
                "attributes": sorted(vars(module)),
                "children": list(module._modules),
                "parameters": [(name, id(parameter)) for name, parameter in module._parameters.items()],
                "buffers": list(module._buffers),
                **{name: len(value) for name, value in vars(module).items() if "hooks" in name and value is not None},
            }
    return found


def _block_of(relaxed: nn.Module) -> str | None:
    """Path of the outermost module below the root that is called and holds, or is, a relaxed layer."""
    for path in relaxations(relaxed):
        names = path.split(".") if path else []
        for depth in range(1, len(names) + 1):
            inside = ".".join(names[:depth])
            if type(relaxed.get_submodule(inside)).forward is not nn.Module.forward:
                return inside
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors."""
    change = (found.double() - expected.double()).norm().item()
    return change / expected.double().norm().item() if change else 0.0


def _unequal(found: list[Any], expected: list[Any], names: list[str] | None = None) -> str:
    """Which tensors differ bitwise, and by how much."""
    if len(found) != len(expected):
        return f"{len(found)} tensors instead of {len(expected)}"
    names = names or [f"output {number}" for number in range(len(expected))]
    problems = []
    for name, one, other in zip(names, found, expected, strict=True):
        if one is None or other is None:
            if one is not other:
                problems.append(f"{name} is missing" if one is None else f"{name} is new")
        elif one.shape != other.shape or one.dtype != other.dtype:
            problems.append(f"{name} is {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}")
        elif not torch.equal(one, other):
            problems.append(f"{name} differs by {_distance(one, other):.2g}")
    return ", ".join(problems)


def _changed(found: list[str], expected: list[str]) -> str:
    new = [name for name in found if name not in expected]
    gone = [name for name in expected if name not in found]
    return f"new {new}, gone {gone}" if new or gone else f"order {found}, was {expected}"


def _reason(problem: Exception) -> str:
    """The first line of an exception."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:300].rstrip(": ")
