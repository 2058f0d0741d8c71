"""``ace.testing.HostTests``: a sound model passes every check, and each defect is caught by the check for it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import ace
from ace.testing import HostTests

pytest_plugins = ["pytester"]


class Layer(nn.Module):
    """Equivariant message passing between all pairs of points."""

    def __init__(self, features):
        super().__init__()
        self.message = nn.Linear(2 * features + 1, features)
        self.update = nn.Linear(2 * features, features)
        self.push = nn.Linear(features, 1)

    def forward(self, h, x):
        away = x[:, None] - x
        shape = (len(h), len(h), h.shape[-1])
        pairs = torch.cat((h[:, None].expand(shape), h.expand(shape), away.square().sum(-1, keepdim=True)), -1)
        message = self.message(pairs).tanh()
        pushed = x + (away * self.push(message).tanh()).mean(1)
        return h + self.update(torch.cat((h, message.sum(1)), -1)).tanh(), pushed


class Points(nn.Module):
    def __init__(self, features=4, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(features) for _ in range(layers))

    def forward(self, h, pos):
        for layer in self.layers:
            h, pos = layer(h, pos)
        return h, pos


class Energy(Points):
    """Energy and its derivative with respect to the positions."""

    def forward(self, h, pos):
        pos = pos.detach().requires_grad_()
        features, moved = super().forward(h, pos)
        energy = features.square().sum() + (moved - pos).square().sum()
        (slope,) = torch.autograd.grad(energy, pos, create_graph=True)
        return {"energy": energy, "forces": -slope}


class TestPoints(HostTests):
    """A sound model."""

    relax_options = {"layers": Layer}

    def model(self):
        return Points()

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)

    def symmetries(self):
        types = {"inputs": {"h": "scalar", "pos": "position"}, "outputs": ("scalar", "position")}
        return [(ace.E3(), types), (ace.Permutations(), types)]


class TestEnergy(TestPoints):
    """A sound model whose output holds a derivative with respect to the positions."""

    forces = True

    def model(self):
        return Energy()

    def symmetries(self):
        inputs = {"h": "scalar", "pos": "position"}
        return [
            (ace.E3(), {"inputs": inputs, "outputs": {"energy": "scalar", "forces": "vector"}}),
            (ace.Permutations(), {"inputs": inputs, "outputs": {"energy": "invariant", "forces": "vector"}}),
        ]


class Unrelaxable(TestPoints):
    def _relax(self, plain, batch):
        raise ValueError("cannot be relaxed")


def failure(host, check):
    """Message with which a check fails."""
    with pytest.raises(AssertionError, match=f"^{host.__qualname__}: ") as failed:
        getattr(host(), f"test_{check}")()
    return str(failed.value)


# -- plain models that do not keep their promise --------------------------------------------------------------------


class Lopsided(TestPoints):
    def model(self):
        class Model(Points):
            def forward(self, h, pos):
                return super().forward(h + 0.1 * pos[:, :1], pos)

        return Model()


class Ordered(TestPoints):
    def model(self):
        class Model(Points):
            def forward(self, h, pos):
                return super().forward(h + torch.arange(len(h))[:, None], pos)

        return Model()


class Nothing(TestPoints):
    def model(self):
        class Model(Points):
            def forward(self, h, pos):
                h, pos = super().forward(h, pos)
                return 0 * h, 0 * pos

        return Model()

    def symmetries(self):
        return [(ace.O3(), {"inputs": {"h": "scalar", "pos": "vector"}, "outputs": ("scalar", "vector")})]


@pytest.mark.parametrize(
    ("host", "message"), [(Lopsided, r"under E\(3\)"), (Ordered, "under S_n"), (Nothing, "the output is 0")]
)
def test_a_plain_model_without_the_symmetry_is_caught(host, message):
    failed = failure(host, "plain_is_equivariant")
    assert message.replace("\\", "") in failed


def test_methods_that_are_not_defined_are_named():
    for name in ("model", "batch", "symmetries"):
        with pytest.raises(NotImplementedError, match=rf"HostTests: define {name}\(\)"):
            getattr(HostTests(), name)()


# -- relaxations with a defect --------------------------------------------------------------------------------------


def attached(relaxed):
    return list(ace.relaxations(relaxed).values())


class Same(nn.Module):
    """A term that commutes with every rotation, but not with translations of h, which there are none of."""

    def forward(self, h, x):
        return h, x - x.mean(0)


def idle(relaxed):
    attached(relaxed)[1].term = Same()


def all_idle(relaxed):
    for relaxation in attached(relaxed):
        relaxation.term = Same()


def rest(layer, args, output):
    return output[0] + 1e-6, output[1]


def a_rest(relaxed):
    """Something stays of the relaxation at γ = 0."""
    relaxed.layers[0].register_forward_hook(rest)


def retired_rest(layer, args, output):
    return (output[0] + 1e-6, output[1]) if layer.relaxation.retired else output


def a_rest_of_the_retired(relaxed):
    relaxed.layers[0].register_forward_hook(retired_rest)


def scaled_gradient(relaxed):
    relaxed.layers[0].push.weight.register_hook(lambda gradient: 1.001 * gradient)


class Zero(nn.Module):
    def forward(self, h, x):
        return 0 * h, 0 * x


def no_gradient(relaxed):
    attached(relaxed)[1].term = Zero()


class Cut(nn.Module):
    """A term that does not let a derivative with respect to the positions through."""

    def __init__(self, term):
        super().__init__()
        self.term = term

    def forward(self, h, x):
        return {0: self.term(h, x)[0].detach()}


def cut(relaxed):
    attached(relaxed)[1].term = Cut(attached(relaxed)[1].term)


def a_parameter(relaxed):
    relaxed.added = nn.Parameter(torch.zeros(1))


def an_attribute(relaxed):
    relaxed.layers[1].called_by_ace = True


def a_hook(relaxed):
    relaxed.layers[1].message.register_forward_pre_hook(lambda layer, args: None)


def another_mode(relaxed):
    relaxed.layers[0].message.eval()


def other_weights(relaxed):
    with torch.no_grad():
        relaxed.layers[0].push.bias += 1e-3


def not_finite(relaxed):
    with torch.no_grad():
        attached(relaxed)[0].term.map.weight[0, 0] = torch.nan


class Counting(nn.Module):
    """A term whose size depends on how often it ran."""

    def __init__(self, term):
        super().__init__()
        self.term = term
        self.count = 0

    def forward(self, h, x):
        self.count += 1
        return {key: part * self.count for key, part in self.term(h, x).items()}


def counting(relaxed):
    for relaxation in attached(relaxed):
        relaxation.term = Counting(relaxation.term)


def first_backward_only(relaxed):
    """γ gets a gradient from the first backward pass only."""
    passes = itertools.count()
    attached(relaxed)[0].gamma.register_hook(lambda gradient: gradient * (next(passes) == 0))


def single(relaxed):
    attached(relaxed)[0].term.float()


def widened(relaxed):
    relaxed.register_forward_hook(lambda model, args, output: tuple(part.double() for part in output))


def closure(relaxed):
    """A hook that keeps the γ of the original, whatever is copied."""
    gamma = attached(relaxed)[0].gamma
    relaxed.register_forward_hook(lambda model, args, output: (output[0] + gamma, output[1]))


draws = itertools.count()


def unsaved(relaxed):
    """A value that no state dict holds."""
    attached(relaxed)[0].term.register_buffer("unsaved", torch.tensor(float(next(draws))), persistent=False)
    relaxed.layers[0].register_forward_hook(add_unsaved)


def add_unsaved(layer, args, output):
    return output[0] + layer.relaxation.gamma * layer.relaxation.term.unsaved, output[1]


def item(layer, args, output):
    return (output[0] + 1, output[1]) if layer.relaxation.gamma.item() > 0.7 else output


def graph_break(relaxed):
    relaxed.layers[0].register_forward_hook(item)


class Numbered(nn.Module):
    """Python state that a compiler must guard on."""

    def __init__(self):
        super().__init__()
        self.value = 1.0

    def hook(self, layer, args, output):
        return output[0] * self.value, output[1]


def recompiled(relaxed):
    state = Numbered()
    relaxed.layers[0].register_forward_hook(state.hook)
    relaxation, retire = attached(relaxed)[0], attached(relaxed)[0].retire

    def and_more():
        retire()
        state.value = 2.0

    relaxation.retire = and_more


DEFECTS = [
    (idle, "every_term_breaks_symmetry", r"layers\.1 "),
    (all_idle, "relaxed_breaks_symmetry", "still has E(3)"),
    (a_rest, "strength_zero_is_plain", "at γ = 0 it is not the plain model: output 0 differs"),
    (a_rest_of_the_retired, "strength_zero_is_plain", "with every term retired it is not the plain model"),
    (scaled_gradient, "strength_zero_is_plain", "layers.0.push.weight by"),
    (a_rest, "float32", "in torch.float32, at γ = 0"),
    (a_rest, "base_state_dict", "with the plain weights loaded"),
    (a_rest, "restored_is_plain", "_forward_hooks was 0, is 1"),
    (other_weights, "strength_zero_is_plain", "not the plain model"),
    (other_weights, "restored_is_plain", "the restored model is not the plain one"),
    (a_parameter, "strength_zero_is_plain", "the keys of the state dict changed: new ['added']"),
    (an_attribute, "restored_is_plain", "traces in layers.1: attributes"),
    (a_hook, "restored_is_plain", "_forward_pre_hooks was 0, is 1"),
    (another_mode, "restored_is_plain", "training was True, is False"),
    (no_gradient, "training", "does not move γ at 'layers.1'"),
    (no_gradient, "summary", "these terms add nothing: layers.1"),
    (not_finite, "training", "cannot be trained, the plain model can: NonFiniteLoss"),
    (not_finite, "float32", "an output is not finite"),
    (first_backward_only, "accumulation", "are not the whole batch"),
    (counting, "checkpointed_model", "recomputed"),
    (counting, "checkpointed_block", "recomputed"),
    (single, "float64", "the relaxed model cannot run in torch.float64"),
    (widened, "float32", "outputs are"),
    (widened, "bfloat16_autocast", "outputs are"),
    (closure, "deepcopy", "with its own γ = 0"),
    (closure, "pickle", "the relaxed model cannot become a pickled copy"),
    (unsaved, "state_dict", "does not bring it back"),
    (graph_break, "compile", "graph breaks where the plain model has 0"),
    (recompiled, "compile", "compiled again (1 graphs; plain 0)"),
]


@pytest.mark.parametrize(("defect", "check", "message"), DEFECTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_defect_of_the_relaxation_is_caught(defect, check, message):
    class Host(TestPoints):
        def _relax(self, plain, batch):
            relaxed = super()._relax(plain, batch)
            defect(relaxed)
            return relaxed

    assert message.replace("\\", "") in failure(Host, check)


def test_every_check_is_shown_to_fail():
    shown = {check for _, check, _ in DEFECTS} | {"plain_is_equivariant", "distributed"}
    assert {name for name in dir(HostTests) if name.startswith("test_")} == {f"test_{check}" for check in shown}


def test_a_strict_layer_without_a_reason_is_caught(monkeypatch):
    summary = ace.summary

    def silent(relaxed, example):
        rows = summary(relaxed, example)
        return type(rows)((*rows, dataclasses.replace(rows[0], path="layers.0.push", status="strict: ")))

    monkeypatch.setattr(ace, "summary", silent)
    assert "strict without a reason: layers.0.push" in failure(TestPoints, "summary")


class ScaledGradient(TestEnergy):
    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        scaled_gradient(relaxed)
        return relaxed


def test_gradients_of_forces_may_differ_by_rounding_only():
    assert "layers.0.push.weight by " in failure(ScaledGradient, "strength_zero_is_plain")


class CutForces(TestEnergy):
    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        relaxed.register_forward_hook(lambda model, args, output: {**output, "forces": output["forces"].detach()})
        return relaxed


class NoForces(TestPoints):
    forces = True

    def model(self):
        class Model(Points):
            def forward(self, h, pos):
                return super().forward(h, pos)[0]

        return Model()


@pytest.mark.parametrize("host", [CutForces, NoForces])
def test_forces_without_a_graph_are_caught(host):
    assert "no output of the shape of the positions has a graph" in failure(host, "training")


class DetachedSlope(TestEnergy):
    """The slope is right, its own derivative is cut: γ gets no gradient from the forces."""

    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        relaxed.register_forward_hook(
            lambda model, args, output: {**output, "forces": output["forces"].detach() * relaxed.layers[0].push.bias}
        )
        return relaxed


def test_forces_that_do_not_reach_gamma_are_caught():
    assert "does not reach γ at 'layers.0', 'layers.1'" in failure(DetachedSlope, "training")


class Rises(TestPoints):
    lr = 10.0


def test_a_loss_that_rises_is_caught():
    assert "did not lower the loss" in failure(Rises, "training")


class Unused(TestPoints):
    """One parameter of a term takes no part: DistributedDataParallel refuses the second step."""

    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        attached(relaxed)[0].term.unused = nn.Parameter(torch.zeros(1))
        return relaxed


def apart(layer, args, output):
    """Something that differs from one process to the other."""
    return (output[0] * (1 + torch.distributed.get_rank()), output[1]) if torch.distributed.is_initialized() else output


class Leaving(nn.Module):
    """A term that leaves the graph by itself at γ = 0, where another process still expects its gradient."""

    def __init__(self, relaxation):
        super().__init__()
        self.term = relaxation.term
        self.gamma = [relaxation.gamma]

    def forward(self, h, x):
        return self.term(h, x) if self.gamma[0] else {}


class Leaves(TestPoints):
    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        for relaxation in attached(relaxed):
            relaxation.term = Leaving(relaxation)
        return relaxed


class Apart(TestPoints):
    def _relax(self, plain, batch):
        relaxed = super()._relax(plain, batch)
        relaxed.layers[0].register_forward_hook(apart)
        return relaxed


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (Unused, "have finished reduction"),
        (Leaves, "have finished reduction"),
        (Apart, "the gradient of two processes is not the mean"),
    ],
)
def test_a_defect_between_processes_is_caught(host, message):
    assert message in failure(host, "distributed")


def dies(layer, args):
    if torch.distributed.is_initialized():
        os._exit(3)


class Dies(TestPoints):
    def model(self):
        model = super().model()
        model.layers[0].register_forward_pre_hook(dies)
        return model


def test_a_process_that_dies_is_reported():
    assert "exit code 3; can a new process import test_testing.Dies?" in failure(Dies, "distributed")


# -- what the plain model cannot do ---------------------------------------------------------------------------------


class Awkward(Points):
    """Cannot be copied, cast or pickled, nor run under autocast."""

    def __deepcopy__(self, memo):
        raise TypeError("no copies")

    def __reduce_ex__(self, protocol):
        raise TypeError("no pickles")

    def forward(self, h, pos):
        if torch.is_autocast_enabled("cpu"):
            raise TypeError("no autocast")
        return super().forward(h, pos)


class AwkwardHost(TestPoints):
    def model(self):
        return Awkward()


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ("deepcopy", "cannot be deep-copied: TypeError: no copies"),
        ("pickle", "cannot be pickled: TypeError: no pickles"),
        ("float64", "cannot run in torch.float64: TypeError: no copies"),
        ("bfloat16_autocast", "cannot run under bfloat16 autocast: TypeError: no autocast"),
    ],
)
def test_what_the_plain_model_cannot_do_is_skipped_with_the_reason(check, reason):
    with pytest.raises(pytest.skip.Exception) as skipped:
        getattr(AwkwardHost(), f"test_{check}")()
    assert f"the plain model cannot {reason.removeprefix('cannot ')}" in str(skipped.value)


class Random(TestPoints):
    def model(self):
        class Model(Points):
            def forward(self, h, pos):
                return super().forward(h + 1e-6 * next(draws), pos)

        return Model()


def test_a_plain_model_that_does_not_reproduce_itself_is_skipped():
    with pytest.raises(pytest.skip.Exception, match="does not reproduce itself bitwise: output 0"):
        Random().test_strength_zero_is_plain()


def test_a_plain_model_that_does_not_compile_is_skipped(monkeypatch):
    def refuse(model, **options):
        raise NotImplementedError("no compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(pytest.skip.Exception, match="plain model cannot be compiled: NotImplementedError: no compiler"):
        TestPoints().test_compile()


MODULE = """
from test_testing import TestPoints

class TestDeclared(TestPoints):
    unsupported = {UNSUPPORTED}

del TestPoints
"""


@pytest.mark.parametrize(
    ("unsupported", "outcomes"),
    [({"summary": "it is shy"}, {"passed": 1, "skipped": 1}), ({"sumary": "it is shy"}, {"errors": 2})],
)
def test_unsupported_checks_are_skipped_and_must_exist(pytester, unsupported, outcomes):
    pytester.syspathinsert(Path(__file__).parent)
    pytester.makepyfile(MODULE.replace("{UNSUPPORTED}", repr(unsupported)))
    result = pytester.runpytest("-k", "summary or state_dict and not base", "-rs")
    result.assert_outcomes(**outcomes)
    if "skipped" in outcomes:
        result.stdout.fnmatch_lines("*the plain model cannot: it is shy*")
