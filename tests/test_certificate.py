"""Certificates: right numbers, intervals that cover, bounds that hold, and a file that knows its weights."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed
from e3nn import nn as e3nn_nn
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROOT, cache, command  # noqa: F401
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import Batch, Data

import ace
from ace.errors import AceError, CertificateMismatch
from ace.groups import act
from ace.inputs import Input
from ace.intervals import quantile_interval, ratio_interval, share_above_max
from ace.lipschitz import Unbounded, bound_after, local_after
from ace.symmetry import Samples
from benchmarks import train
from benchmarks.config import load_run

VECTORS = {"inputs": {"x": "vector"}, "outputs": "vector"}


class Mix(nn.Module):
    """Linear in the channels: (B, C, 3) -> (B, C', 3), equivariant to rotations and reflections."""

    def __init__(self, channels_in, channels_out):
        super().__init__()
        self.map = nn.Linear(channels_in, channels_out, bias=False)

    def forward(self, x):
        return self.map(x.transpose(1, 2)).transpose(1, 2)


class Matrix(nn.Module):
    """x -> A x."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(torch.as_tensor(matrix))

    def forward(self, x, batch=None):
        return x @ self.matrix.T


class Twice(nn.Module):
    """One layer, run twice."""

    def __init__(self):
        super().__init__()
        self.mix = Mix(2, 2)

    def forward(self, x):
        return self.mix(self.mix(x))


class Residual(nn.Module):
    """Branches, reductions and activations that have a Lipschitz constant."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last = nn.Linear(8, 3)
        self.act = nn.SiLU()

    def forward(self, x):
        y = self.first(x)
        y = y - torch.tanh(self.second(y)) / 2
        y = torch.cat([y, 3 * y], -1).unsqueeze(0).flatten(0, 1)
        return self.act(self.last(y)).mean(0)


def relaxed_chain(channels, gammas, activation=None):
    """Mixing layers, each relaxed with a dense term without bias."""
    layers = []
    for a, b in pairwise(channels):
        layers += [Mix(a, b), *([activation] if activation is not None else [])]
    model = nn.Sequential(*layers)
    ace.relax(model, layers=Mix, example=torch.randn(5, channels[0], 3))
    with torch.no_grad():
        for relaxation, gamma in zip(ace.relaxations(model).values(), gammas, strict=False):
            relaxation.gamma.fill_(gamma)
            relaxation.term.map.weight.mul_(10)
            relaxation.term.map.bias.zero_()
    return model


def batches(count=3, size=7, channels=2):
    return [torch.randn(size, channels, 3) for _ in range(count)]


# ---- what is measured


@pytest.mark.parametrize("layout", ["dense", "graphs", "one sample"])
@torch.no_grad()
def test_the_numbers_are_those_of_a_slow_loop(layout, float64):
    model, elements, seed = Matrix(torch.randn(3, 3)), 3, 5
    graphs = torch.tensor([0, 0, 0, 1, 1, 2])
    if layout == "graphs":
        data = [{"x": torch.randn(6, 3), "batch": graphs} for _ in range(4)]
    else:
        data = list(torch.randn(4, 3, 5, 3)) if layout == "dense" else list(torch.randn(4, 6, 3))
    group = ace.O3()
    found = ace.certify(model, data, group, inputs={"x": "vector"}, outputs="vector", elements=elements, seed=seed)
    errors, sizes = [], []
    for number, batch in enumerate(data):
        x = batch["x"] if isinstance(batch, dict) else batch
        parts = [x] if layout == "one sample" else list(x) if layout == "dense" else [x[graphs == g] for g in range(3)]
        drawn = [group.sample(len(parts), hash((seed, number * elements + k, 0)) & 0x7FFFFFFF) for k in range(elements)]
        for place, part in enumerate(parts):
            sizes.append(float(model(part).square().sum()))
            pairs = [(act(g[place], part, "vector"), act(g[place], model(part), "vector")) for g in drawn]
            errors.append([float((model(moved) - expected).norm()) for moved, expected in pairs])
    unit = math.sqrt(sum(sizes) / len(sizes))
    relative = torch.tensor(errors) / unit
    got = found.groups["O(3)"].errors
    assert (found.samples, found.elements) == (len(sizes), elements)
    assert found.size == pytest.approx(unit)
    assert got.mean == pytest.approx(float(relative.mean()))
    assert got.max == pytest.approx(float(relative.max()))
    assert got.rms == pytest.approx(float(relative.square().mean().sqrt()))
    ordered = relative.flatten().sort().values
    assert got.percentile == pytest.approx(float(ordered[math.ceil(0.95 * len(ordered) - 1e-9) - 1]))
    low, high = got.percentile_interval
    assert low <= got.percentile
    assert high is None  # of so few samples there is none


@pytest.mark.parametrize("seed", range(3))
def test_a_linear_map_has_the_error_of_its_closed_form(seed, float64):
    # with x normal: E |A g x - g A x|² = |A g - g A|² -> 2 |A|² - 2 tr(A)²/3 in the mean over SO(3)
    torch.manual_seed(seed)
    a = torch.eye(3) + 0.3 * torch.randn(3, 3)
    expected = math.sqrt(2 - 2 * float(a.trace()) ** 2 / (3 * float(a.square().sum())))
    data = [torch.randn(500, 1, 3) for _ in range(4)]
    found = ace.certify(Matrix(a), data, ace.SO3(), seed=seed, confidence=0.999, **VECTORS).groups["SO(3)"].errors
    low, high = found.rms_interval
    assert low < expected < high < 1.1 * low
    assert found.rms == pytest.approx(expected, rel=0.05)


class Steerable(nn.Module):
    """A small e3nn network, relaxed and restored in the test."""

    def __init__(self):
        super().__init__()
        self.first = o3.Linear("2x0e+2x1o", "4x0e+4x1o")
        self.norm = e3nn_nn.NormActivation("4x0e+4x1o", torch.tanh)
        self.last = o3.Linear("4x0e+4x1o", "1x0e+2x1o")

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_restored_model_is_exact():
    model = Steerable()
    ace.relax(model, layers=o3.Linear)
    data = [torch.randn(5, 4, 8) for _ in range(3)]
    types = {"inputs": {0: "2x0e+2x1o"}, "outputs": "1x0e+2x1o"}
    before = ace.certify(model, data, ace.O3(), **types)
    with torch.no_grad():
        for relaxation in ace.relaxations(model).values():
            relaxation.gamma.zero_()
    ace.restore(model)
    after = ace.certify(model, data, ace.O3(), **types)
    assert before.groups["O(3)"].float64.rms > 0.01
    assert before.groups["O(3)"].floor.max < 1e-12
    assert after.groups["O(3)"].float64.max < 1e-12
    assert after.groups["O(3)"].errors.max < 1e-5
    assert (after.gammas, after.projection_gap, after.gap_bound) == ({}, 0.0, None)
    assert "no relaxation terms: the projection gap is 0" in str(after)
    assert before.inputs == after.inputs == {"x": "2x0e+2x1o"}
    assert after.outputs == {"the output": "1x0e+2x1o"}


class OnGraphs(nn.Module):
    """Reads a PyG batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, data):
        return self.linear(data.pos)


def test_graphs_of_pyg_are_samples():
    model = OnGraphs()
    graphs = [Data(pos=torch.randn(nodes, 3)) for nodes in (2, 5, 3, 4)]
    joined = ace.certify(model, [Batch.from_data_list(graphs)], ace.SO3(), outputs="vector", elements=2)
    assert joined.samples == 4
    assert joined.inputs["pos"] == "position"
    alone = ace.certify(model, graphs, ace.SO3(), outputs="vector", elements=2)
    assert alone.samples == 4
    assert alone.size == pytest.approx(joined.size)


def test_several_groups_are_measured_on_the_same_data():
    model = Matrix(torch.diag(torch.tensor([1.0, 1.0, 2.0])))
    groups = {"about z": ace.SO2(), "all": ace.SO3()}
    found = ace.certify(model, batches(), groups, **VECTORS).groups
    assert found["about z"].errors.max < 1e-6 < 0.1 < found["all"].errors.rms
    assert [entry.group for entry in found.values()] == ["SO(2)", "SO(3)"]


def test_the_model_and_the_random_state_are_left_alone():
    model = nn.Sequential(Mix(2, 2), nn.Dropout(), Mix(2, 2)).train()
    ace.relax(model, layers=Mix, example=torch.randn(5, 2, 3))
    before = copy.deepcopy(model.state_dict())
    data = batches()
    random = torch.random.get_rng_state()
    first, again = (ace.certify(model, data, ace.SO3(), inputs={0: "vector"}, outputs="vector") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert first == again
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(len(module._forward_hooks) <= 1 for module in model.modules())


def test_a_wrapped_model_is_the_model_inside(monkeypatch):
    model, data = Matrix(torch.randn(3, 3)), batches()
    plain = ace.certify(model, data, ace.SO3(), **VECTORS)
    assert ace.certify(torch.compile(model, backend="eager"), data, ace.SO3(), **VECTORS) == plain
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        assert ace.certify(DistributedDataParallel(model), data, ace.SO3(), **VECTORS) == plain
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"elements": 0, "confidence": 1.0, "path": "no/such/folder.json"}, r"elements=0.*confidence=1.0.*no folder"),
        ({"loader": iter(())}, "generator that has run already"),
        ({"inputs": None}, "moves none of the inputs"),
        ({"inputs": {"y": "vector", "x": "vector"}}, "names 'y'"),
        ({"outputs": None}, "could be of several types"),
        ({"loader": [torch.ones(2, 4, 3), torch.full((2, 4, 3), math.nan)]}, "not finite in batch 1"),
        ({"group": {}}, "names no group"),
    ],
)
def test_what_cannot_be_certified_is_refused(change, message):
    arguments = {"loader": batches(), "group": ace.SO3(), **VECTORS, **change}
    with pytest.raises(AceError, match=message):
        ace.certify(Matrix(torch.randn(3, 3)), **arguments)


def test_an_output_of_zeros_has_no_relative_error():
    with pytest.raises(AceError, match="output is zero"):
        ace.certify(Matrix(torch.zeros(3, 3)), batches(), ace.SO3(), **VECTORS)


def test_a_model_that_cannot_run_in_float64_says_so():
    class Stubborn(Matrix):
        def forward(self, x):
            return torch.ones(3, 3) @ x.transpose(-1, -2)

    with pytest.raises(AceError, match="cannot be measured in float64"):
        ace.certify(Stubborn(torch.eye(3)), [torch.ones(2, 3, 3)], ace.SO3(), **VECTORS)


# ---- intervals


def covered(draw, interval, value, repeats=400):
    torch.manual_seed(1)
    hits = 0
    for _ in range(repeats):
        low, high = interval(draw())
        hits += low <= value <= (math.inf if high is None else high)
    return hits / repeats


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda: torch.empty(60, dtype=torch.float64).exponential_(), 1.0),
        (lambda: torch.randn(60, dtype=torch.float64).mul(0.5).exp(), math.exp(0.125)),
        (lambda: torch.rand(60, dtype=torch.float64), 0.5),
    ],
)
def test_intervals_of_a_mean_cover_it(draw, mean):
    # three standard errors of 400 trials are 0.033
    assert covered(draw, lambda x: ratio_interval(x, torch.ones_like(x), 0.95), mean) > 0.915


def test_intervals_of_a_ratio_cover_it():
    def draw():
        b = torch.empty(60, dtype=torch.float64).exponential_()
        return b * torch.rand(60, dtype=torch.float64).square(), b

    assert covered(draw, lambda pair: ratio_interval(*pair, 0.95), 1 / 3) > 0.915


def test_intervals_shrink_with_confidence_and_samples():
    x = torch.rand(100, dtype=torch.float64)
    ends = [ratio_interval(x, torch.ones_like(x), c) for c in (0.5, 0.9, 0.99)]
    assert ends[2][0] < ends[1][0] < ends[0][0] < ends[0][1] < ends[1][1] < ends[2][1]
    assert ratio_interval(x[:1], torch.ones(1), 0.95) is None
    assert ratio_interval(torch.ones(5), torch.ones(5), 0.95) == (1.0, 1.0)


@given(st.integers(1, 300), st.sampled_from([0.5, 0.9, 0.95]), st.sampled_from([0.8, 0.95, 0.99]))
def test_order_statistics_have_the_confidence_of_their_binomial(n, share, confidence):
    from scipy.stats import binom

    ranks = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None]
    _, low, high = quantile_interval(ranks, share, confidence)
    tail = (1 - confidence) / 2
    assert low == 0 or binom.cdf(low - 1, n, share) <= tail + 1e-12  # P(K < l)
    assert binom.cdf(low, n, share) > tail - 1e-12  # one more would be too many
    if high is None:
        assert binom.sf(n - 1, n, share) > tail - 1e-12
    else:
        assert binom.sf(high - 1, n, share) <= tail + 1e-12  # P(K >= u)
        assert binom.sf(high - 2, n, share) > tail - 1e-12


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_intervals_of_a_quantile_cover_it_however_dependent_the_elements(shared):
    def draw():
        of_sample = torch.empty(100, 1, dtype=torch.float64).exponential_()
        of_element = torch.empty(100, 4, dtype=torch.float64).exponential_()
        return torch.where(torch.rand(100, 4) < shared, of_sample, of_element)

    quantile = -math.log(0.1)
    rate = covered(draw, lambda x: quantile_interval(x, 0.9, 0.95)[1:], quantile, repeats=600)
    assert rate > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 600)


def test_the_share_above_the_maximum():
    # it is exact for a continuous distribution: the maximum of n uniform numbers is below 1 - p with chance 1 - c
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(20_000, 50, generator=generator).max(1).values
    for confidence in (0.5, 0.9, 0.95):
        share = share_above_max(50, confidence)
        assert float((1 - largest <= share).float().mean()) == pytest.approx(confidence, abs=0.01)


# ---- bounds


CHANNELS = st.lists(st.sampled_from([2, 4, 6]), min_size=2, max_size=5)
chains = st.tuples(
    CHANNELS,
    st.lists(st.floats(-1, 1), min_size=4, max_size=4),
    st.sampled_from([None, nn.Tanh(), nn.LeakyReLU(0.2), nn.SiLU(), nn.Softplus()]),
)


@settings(max_examples=15)
@given(chains, st.integers(0, 10_000))
def test_the_bound_is_one(chain, seed):
    torch.manual_seed(seed)
    model = relaxed_chain(*chain)
    data = batches(2, 4, chain[0][0])
    found = ace.certify(model, data, ace.O3(), inputs={0: "vector"}, outputs="vector", elements=2)
    assert (found.no_bound, found.no_estimate) == ("", "")
    measured, bound = found.groups["O(3)"].float64, found.groups["O(3)"].bound
    assert bound.samples == found.samples == 8
    assert measured.rms <= bound.rms * (1 + 1e-9) + 1e-12
    assert measured.max <= bound.max * (1 + 1e-9) + 1e-12
    assert found.projection_gap <= found.gap_bound.rms * (1 + 1e-9) + 1e-12


@settings(max_examples=10)
@given(CHANNELS, st.floats(0.01, 1), st.integers(0, 10_000))
def test_the_bound_is_no_larger_than_that_of_theorem_4_1(channels, gamma, seed):
    # with γ̄ ≥ |γ_i|, B ≥ |f_neq,i|, M ≥ B and the norms of the layers: [Σ_{k<L} (1 + γ̄)^k] γ̄ B M^{L-1} |x|
    torch.manual_seed(seed)
    model = relaxed_chain(channels, [gamma] * 4)
    depth, data = len(channels) - 1, batches(2, 4, channels[0])
    norms = [norm(layer.map.weight) for layer in model]
    terms = [norm(layer.relaxation.term.map.weight) for layer in model]
    theorem = sum((1 + gamma) ** k for k in range(depth)) * gamma * max(terms) * max(norms + terms) ** (depth - 1)
    found = ace.certify(model, data, ace.O3(), inputs={0: "vector"}, outputs="vector", elements=1)
    with torch.no_grad(), ace.restored(model):
        strict = torch.cat([model(x) for x in data]).square().sum((1, 2)).mean().sqrt()
    size = torch.cat(data).square().sum((1, 2)).mean().sqrt()
    assert found.gap_bound.rms * float(strict) <= theorem * float(size) * (1 + 1e-5)


@torch.no_grad()
def test_the_bound_of_a_last_layer_is_the_gap(float64):
    model, data = relaxed_chain([2, 3, 2], [0.0, 0.7]), batches()
    found = ace.certify(model, data, ace.O3(), inputs={0: "vector"}, outputs="vector")
    assert found.gap_bound.rms == pytest.approx(found.projection_gap, rel=1e-12)
    assert found.gap_bound.looseness == pytest.approx(1.0, rel=1e-12)
    assert found.projection_gap == pytest.approx(ace.projection_gap(model, torch.cat(data)), rel=1e-12)


@torch.no_grad()
def test_the_bound_is_attained(float64):
    # half a turn about z takes the term x -> z e_x to its negative, and what follows stretches by 5
    model = nn.Sequential(Matrix(torch.eye(3)), nn.Linear(3, 3, bias=False))
    ace.relax(model, layers=Matrix, example=torch.randn(4, 5, 3))
    term = model[0].relaxation
    term.gamma.fill_(0.3)
    term.term.map.weight.zero_()
    term.term.map.bias.zero_()
    assert term.term.map.weight.shape == (3, 3)
    term.term.map.weight[0, 2] = 1.0
    model[1].weight.copy_(5 * torch.eye(3))
    x = torch.randn(40, 5, 3)
    x[..., 2] = 0.7
    found = ace.certify(model, [x], ace.Cyclic(2), inputs={0: "vector"}, outputs="vector").groups["C_2"]
    size = model(x).square().sum((1, 2)).mean().sqrt()
    assert found.float64.max == pytest.approx(2 * 5 * 0.3 * 0.7 * math.sqrt(5) / float(size), rel=1e-12)
    assert found.bound.max == pytest.approx(found.float64.max, rel=1e-12)


def norm(matrix):
    """Largest singular value."""
    return float(torch.linalg.matrix_norm(matrix.detach(), 2))


def jacobian_norm(model, layer, x):
    """Norm of the derivative of the output with respect to the output of a layer, by brute force."""

    def moved(change):
        handle = layer.register_forward_hook(lambda layer, args, output: output + change)
        try:
            return model(x)
        finally:
            handle.remove()

    with torch.no_grad():
        seen = []
        handle = layer.register_forward_hook(lambda layer, args, output: seen.append(output))
        model(x)
        handle.remove()
    dense = torch.autograd.functional.jacobian(moved, torch.zeros_like(seen[0]))
    return norm(dense.reshape(-1, seen[0].numel()))


@pytest.mark.parametrize(
    ("model", "shape", "linear"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (5, 3), True),
        (nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2), nn.ELU(2.0)), (5, 3), False),
        (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2), nn.SiLU()), (5, 3), False),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Flatten()), (2, 1, 6, 6), False),
        (nn.Sequential(nn.Conv1d(1, 2, 1), nn.Conv1d(2, 2, 3, stride=2, dilation=2)), (2, 1, 9), False),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()), (5, 3), True),
        (nn.Sequential(o3.Linear("3x0e+2x1o", "2x0e+3x1o"), o3.Linear("2x0e+3x1o", "1x0e+1x1o")), (4, 9), True),
    ],
)
def test_constants_are_bounds_of_the_jacobian(model, shape, linear, float64):
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    model.eval()
    x = torch.randn(shape)
    bound, there = bound_after(model, "0", (x,), {}), jacobian_norm(model, model[0], x)
    assert there <= bound * (1 + 1e-9)
    if linear:
        assert bound == pytest.approx(there, rel=1e-9)


def test_constants_go_through_branches(float64):
    model, x = Residual().eval(), torch.randn(6, 4)
    for path in ("first", "second", "last"):
        assert 0 < jacobian_norm(model, model.get_submodule(path), x) <= bound_after(model, path, (x,), {})


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.a(x) * self.b(x), "operation 'mul'"),
        (lambda self, x: self.b(self.a(x)).softmax(-1), "operation 'softmax'"),
        (lambda self, x: self.act(self.a(x)), r"operation 'mish' in act \(Mish\)"),
        (lambda self, x: self.a(self.a(x)), "called more than once"),
        (lambda self, x: self.a(x)[[0, 0]], "operation 'getitem'"),
        (lambda self, x: x + self.a(x)[:1], "repeats a tensor"),
        (
            lambda self, x: x if self.a(x).sum() > 0 else self.a(x),
            r"the forward of the model itself \(Odd\) cannot be traced",
        ),
        (lambda self, x: self.b(x) if isinstance(x, torch.Tensor) else self.a(x), "takes another branch"),
        (lambda self, x: torch.relu_(self.a(x)), "operation 'relu_'"),
        (lambda self, x: self.bad(self.a(x)), r"the forward of bad \(Odd\) cannot be traced"),
    ],
)
def test_what_has_no_constant_is_named(forward, message):
    kind = type("Odd", (nn.Module,), {"forward": forward})
    model = kind()
    model.a, model.b, model.act = nn.Linear(3, 3), nn.Linear(3, 3), nn.Mish()
    model.bad = type("Odd", (nn.Module,), {"forward": lambda self, x: x if x.sum() > 0 else -x})()
    with pytest.raises(Unbounded, match=message):
        bound_after(model.eval(), "a", (torch.randn(4, 3),), {})


class Optional(nn.Module):
    """Reads an argument that may be left out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, batch=None, scale=2.0):
        y = self.a(x)
        return self.b(y) if batch is None else scale * y


def test_an_argument_left_out_is_left_out_of_the_trace():
    model, x = Optional().eval(), torch.randn(4, 3)
    assert bound_after(model, "a", (x,), {}) == pytest.approx(norm(model.b.weight), rel=1e-6)
    assert bound_after(model, "a", (x,), {"batch": x, "scale": -4.0}) == 4.0


def test_the_estimate_is_the_norm_of_the_jacobian(float64):
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x = torch.randn(4, 3, 3)
    samples = Samples([Input((0,), "x", x, "vector")], 1.0)
    estimated = local_after(model[0], lambda: model(x), samples, iterations=200)
    for number in range(4):
        exact = jacobian_norm(model, model[0], x[number])
        assert 0.99 * exact < float(estimated[number]) < exact * (1 + 1e-9)


def test_a_certificate_says_which_layer_prevents_the_bound():
    model = nn.Sequential(Mix(2, 2), nn.Mish(), Mix(2, 2))
    ace.relax(model, layers=Mix, example=torch.randn(5, 2, 3))
    found = ace.certify(model, batches(), ace.O3(), inputs={0: "vector"}, outputs="vector")
    assert found.no_bound == "behind 0: no Lipschitz constant is known of the operation 'mish' in 1 (Mish)"
    assert found.groups["O(3)"].bound is found.gap_bound is None
    assert found.groups["O(3)"].estimate.samples == 7  # of the first batch
    assert found.groups["O(3)"].estimate.rms > found.groups["O(3)"].float64.rms
    assert "no bound: behind 0" in str(found)


def test_a_layer_that_runs_twice_has_no_bound():
    model = Twice()
    ace.relax(model, layers=Mix, example=torch.randn(5, 2, 3))
    found = ace.certify(model, batches(), ace.O3(), **VECTORS)
    assert (found.no_bound, found.no_estimate) == ("mix is called 2 times",) * 2
    assert found.projection_gap > 0


class Sets(nn.Module):
    """Sum of a set's elements, each mapped: (B, n, 3) -> (B, n, 4), equivariant to permutations."""

    def __init__(self):
        super().__init__()
        self.own, self.all, self.last = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.last(torch.relu(self.own(x)))


def test_permutations_and_several_outputs():
    model = Sets()
    found = ace.certify(model, [torch.randn(3, 5, 3)], ace.Permutations(), elements=2)
    assert found.groups["S_n"].float64.max < 1e-12

    class Two(Sets):
        def forward(self, x):
            return {"pos": self.own(x)[..., :3], "force": self.all(x)[..., :3]}

    two = Two()
    ace.relax(two, layers=nn.Linear, example=torch.randn(3, 5, 3), exclude="last")
    found = ace.certify(two, [torch.randn(3, 5, 3)], ace.SO3(), inputs={0: "vector"})
    assert found.outputs == {"output 'pos'": "position", "output 'force'": "vector"}
    assert found.size == pytest.approx(math.sqrt(2))
    assert found.no_bound.startswith("it is for one output")
    assert found.no_estimate


# ---- the file


@pytest.fixture
def certified(tmp_path):
    model = relaxed_chain([2, 3, 2], [0.3, 0.5])
    path = tmp_path / "certificate.json"
    types = {"inputs": {0: "vector"}, "outputs": "vector"}
    groups = {"turns": ace.SO3(), "mirrors": ace.O3()}
    return model, path, ace.certify(model, batches(), groups, elements=2, path=path, **types)


def test_a_certificate_comes_back_from_its_file(certified, tmp_path):
    model, path, certificate = certified
    assert ace.load_certificate(path, model) == certificate
    assert ace.load_certificate(path, torch.compile(model, backend="eager")) == certificate
    content = json.loads(path.read_bytes())
    assert content["format"] == 1
    assert content["digest"] == certificate.digest
    assert content["versions"] == {"ace": ace.__version__, "torch": torch.__version__}
    text = str(certificate)
    assert all(
        word in text for word in ("error under turns", "21 samples", "2 random elements", "95 %", "bound", "max")
    )


def next_up(model):
    weight = model[0].map.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))


def renamed(model):
    model[0].mapping = model[0].map
    del model[0].map


def halved(model):
    model[2 - 1].map.half()


class Chain(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (next_up, r"other values of 0\.map\.weight\b"),
        (renamed, r"missing here 0\.map\.weight.*only here 0\.mapping\.weight"),
        (halved, r"another dtype or shape 1\.map\.weight \(float16 \(2, 3\) here, float32 \(2, 3\) certified\)"),
        (lambda model: model.double(), r"another dtype or shape 0\.map\.weight \(float64"),
        (lambda model: Chain(*model), "it is of a Sequential, this is a Chain"),
        (lambda model: model[0].relaxation.gamma.data.fill_(0.3 + 1e-7), r"other values of 0\.relaxation\.gamma"),
        (lambda model: ace.restore(model) and None, r"missing here 0\.relaxation\.gamma.* and 1 more"),
    ],
)
@pytest.mark.filterwarnings("ignore::ace.errors.ConstraintNotMet")
def test_other_weights_are_refused(certified, change, message):
    model, path, _ = certified
    other = change(model)
    other = other if isinstance(other, nn.Module) else model
    with pytest.raises(CertificateMismatch, match=message):
        ace.load_certificate(path, other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "truncated or altered"),
        (lambda text: "", "truncated or altered"),
        (lambda text: "[]", "no format"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "certificate of format 2"),
        (lambda text: text.replace('"samples": 21,\n "elements"', '"elements"'), "samples is missing"),
        (lambda text: text.replace('"seed": 0', '"seed": 0, "sede": 1'), "sede is unknown"),
        (lambda text: text.replace('"confidence": 0.95', '"confidence": NaN'), "holds NaN"),
        (lambda text: text.replace('"confidence": 0.95', '"confidence": "high"'), "confidence is 'high'"),
        (lambda text: text.replace('"group": "SO(3)"', '"group": 3'), r"groups\.turns\.group is 3"),
        (lambda text: text.replace('"elements": 2', '"elements": 2.5'), "elements is 2.5"),
    ],
)
def test_a_damaged_file_is_refused(certified, damage, message):
    model, path, _ = certified
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(AceError, match=message):
        ace.load_certificate(path, model)


def test_a_missing_file_is_named(certified, tmp_path):
    with pytest.raises(AceError, match=r"none\.json does not exist"):
        ace.load_certificate(tmp_path / "none.json", certified[0])


def test_killed_in_the_middle_of_writing_leaves_the_old_file(certified):
    model, path, certificate = certified
    code = """if True:
        import os, signal, sys
        import ace.history
        from ace.certificate import _from_json
        from pathlib import Path

        def half(file, data):
            os.write(file.fileno(), data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        ace.history._write = half
        path = Path(sys.argv[1])
        _from_json(path).save(path)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert len(list(path.parent.glob(".certificate.json*"))) == 1  # the half that was written
    assert ace.load_certificate(path, model) == certificate


def test_the_command_certifies_a_finished_run(cache, tmp_path):  # noqa: F811
    words = ("task.train=64", "task.valid=32", "task.test=130", "steps=12", "eval_every=4", "checkpoint_every=12")
    config = load_run("broken", ("method=ace-resilient", *words))
    folder = tmp_path / "run"
    train.run(config, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = command("certify", str(folder), "--elements", "2", "--confidence", "0.9")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("VectorNet")
    assert "130 samples, each moved by 2 random elements; intervals of 90 %" in done.stdout
    model, _ = train.shipped_model(folder)
    found = ace.load_certificate(folder / "certificate.json", model)
    assert (found.samples, found.elements, len(found.gammas)) == (130, 2, 3)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before

    (folder / "summary.json").unlink()
    with pytest.raises(AceError, match=r"is no run that is done: it has no summary\.json"):
        train.shipped_model(folder)
