"""Which layers get a term when nobody says which, and what is said of the others."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from torch import Tensor, nn

import ace
from ace.calls import register_container
from ace.errors import AceError, NoLayerMatched, NotAttachable
from ace.inputs import moved_example
from ace.terms import RANK, WIDE
from benchmarks.models.vn import VNDGCNN

POS = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """An equivariant layer on features and positions."""

    def __init__(self, width=4):
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(width + 1, width), nn.SiLU(), nn.Linear(width, width))
        self.push = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)

    def forward(self, h, pos):
        away = pos - pos.mean(0)
        h = self.norm(h + self.phi(torch.cat((h, away.norm(dim=-1, keepdim=True)), -1)))
        return h, pos + self.push(h) * away


class Network(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.read = nn.Linear(4, 1)

    def forward(self, pos):
        h = self.embed(pos.norm(dim=-1, keepdim=True))
        for layer in self.layers:
            h, pos = layer(h, pos)
        return self.read(h).sum() + pos.norm(dim=-1).sum()


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


def relaxed_paths(model, example, **options):
    return list(ace.relaxations(ace.relax(model, example=example, **options)))


def reasons(model):
    return {row.path: row.status for row in ace.summary(model) if row.gamma is None}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_blocks_are_found_behind_wrappers(depth):
    model, prefix = Network(), ""
    for _ in range(depth):
        model, prefix = Wrapper(model), f"{prefix}inner."
    assert relaxed_paths(model, POS) == [f"{prefix}layers.0", f"{prefix}layers.1"]


def test_layers_of_different_classes_are_found_in_a_wrapper():
    class Other(Layer):
        pass

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Layer(), Other()

        def forward(self, h, pos):
            return self.two(*self.one(h, pos))

    assert relaxed_paths(Wrapper(Both()), (torch.ones(7, 4), POS)) == ["inner.one", "inner.two"]


def test_a_model_that_is_one_layer():
    assert relaxed_paths(Layer(), (torch.ones(7, 4), POS)) == [""]


def test_layers_of_torch_are_the_last_resort_and_read_the_positions():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.read = nn.Linear(1, 4), nn.Linear(4, 1)

        def forward(self, pos):
            return self.read(self.lift(pos.norm(dim=-1, keepdim=True)).tanh()).sum()

    relaxed = ace.relax(Flat(), example=POS)
    assert list(ace.relaxations(relaxed)) == ["lift", "read"]
    assert all(r.term.positions is not None for r in ace.relaxations(relaxed).values())
    report = ace.equivariance_error(relaxed, (POS,), ace.SO3(), inputs={"pos": "vector"})
    assert report.max > 1e-3


class Edges(nn.Module):
    """Node and edge layers; one that sees invariants on the edges, one whose result is not used."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Linear(1, 4)
        self.node = o3.Linear("1x0e+1x1o", "1x0e+1x1o")
        self.edge = o3.Linear("1x0e+1x1o", "1x0e+1x1o")
        self.scalar = o3.Linear("1x0e", "1x0e")
        self.unused = o3.Linear("1x0e+1x1o", "1x0e+1x1o")

    def forward(self, pos):
        source, target = torch.cartesian_prod(torch.arange(len(pos)), torch.arange(len(pos))).T
        apart = pos[source] - pos[target]
        length = apart.norm(dim=-1, keepdim=True)
        messages = self.edge(torch.cat((self.scalar(length), apart), -1)) * self.filter(length)[:, :1]
        nodes = self.node(torch.zeros(len(pos), 4).index_add(0, target, messages))
        self.unused(nodes)
        return nodes


def test_strict_layers_are_listed_with_the_reason():
    relaxed = ace.relax(Edges(), example=POS)
    assert list(ace.relaxations(relaxed)) == ["node"]
    found = reasons(relaxed)
    assert found.keys() == {"edge", "scalar", "unused"}
    assert "rows are not the nodes" in found["edge"]
    assert "sees only invariant features" in found["scalar"]
    assert "not those of the positions" in found["scalar"]
    assert "no output of the model depends" in found["unused"]
    assert "strict: " in str(ace.summary(relaxed))


def test_layers_on_edges_are_relaxed_when_named_and_the_others_refused_with_all_reasons():
    assert relaxed_paths(Edges(), POS, layers="^(node|edge)$") == ["node", "edge"]
    model = Edges()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(NotAttachable, match=r"scalar \(Linear\): it sees only invariant features"):
        ace.relax(model, layers="^(node|scalar)$", example=POS)
    with pytest.raises(NotAttachable, match=r"unused \(Linear\): no output of the model depends"):
        ace.relax(model, layers="^(node|unused)$", example=POS)
    assert [name for name, _ in model.named_modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_excluded_layers_stay_strict():
    model = Network()
    assert relaxed_paths(model, POS, exclude=r"layers\.0") == ["layers.1"]
    with pytest.raises(NoLayerMatched):
        ace.relax(Network(), example=POS, exclude="")


def test_a_gate_that_starts_at_zero_hides_nothing():
    class Gated(Network):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.zeros(1))

        def forward(self, pos):
            return self.alpha * super().forward(pos)

    assert relaxed_paths(Gated(), POS) == ["layers.0", "layers.1"]


def test_positions_inside_a_nested_batch():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def forward(self, data, factor):
            return self.network(data["atoms"]["positions"]) * factor

    batch = ({"atoms": {"positions": POS, "numbers": torch.ones(7)}}, 2.0)
    model = Nested()
    assert float(ace.equivariance_error(model, batch, ace.O3())) < 1e-5
    assert relaxed_paths(model, batch) == ["network.layers.0", "network.layers.1"]
    assert float(ace.equivariance_error(model, batch, ace.O3())) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_that_rounding_decides_do_not_choose_the_layers(seed):
    torch.manual_seed(seed)
    lattice = torch.cartesian_prod(*3 * [torch.arange(4.0)])
    points = lattice + 1e-6 * torch.randn(2, 64, 3)  # which neighbour is nearer is below what float32 computes
    model = ace.relax(VNDGCNN(classes=10, width=4, k=4, layers=2), example=points)
    head = [f"head.invariant.frame.{number}" for number in range(3)]
    assert list(ace.relaxations(model)) == ["convolutions.0", "convolutions.1", "joint", *head]
    assert all(r.term.reads[0].axes == (-3, -2) for r in ace.relaxations(model).values())


class OnlyFloat32(Network):
    def forward(self, pos):
        return super().forward(pos.float())


class NeverCopied(Network):
    def __deepcopy__(self, memo):
        raise RuntimeError("not to be copied")


@pytest.mark.parametrize("kind", [OnlyFloat32, NeverCopied])
def test_a_model_that_does_not_run_in_float64_is_tried_as_it_is(kind, caplog):
    with caplog.at_level("INFO", logger="ace"):
        assert relaxed_paths(kind(), POS) == ["layers.0", "layers.1"]
    assert "own dtype" in caplog.text


def test_inputs_whose_names_do_not_tell():
    class Momenta(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = o3.Linear("2x1o", "2x1o")
            self.read = nn.Linear(2, 1)

        def forward(self, p):
            return self.read(self.mix(p).unflatten(-1, (2, 3)).norm(dim=-1))

    p = torch.randn(5, 6)
    relaxed = ace.relax(Momenta(), example=p, inputs={"p": "2x1o"})
    assert list(ace.relaxations(relaxed)) == ["mix"]
    with pytest.raises(AceError, match="inputs= names 'q'"):
        ace.relax(Momenta(), example=p, inputs={"q": "2x1o"})


class Upright(nn.Module):
    """Knows the vertical: invariant under rotations about an axis only, by the heights and the distances from it."""

    def __init__(self, axis):
        super().__init__()
        self.up = torch.eye(3)["xyz".index(axis)]
        self.inner = nn.Linear(2, 3)

    def forward(self, pos):
        up = self.up.to(pos)
        height = pos @ up
        around = pos - height[:, None] * up
        return self.inner(torch.stack((height, torch.linalg.vector_norm(around, dim=-1)), -1))


@pytest.mark.parametrize("axis", ["x", "z"])
def test_a_model_that_knows_the_vertical_has_its_group_named(axis):
    group = ace.SO2(axis=tuple(torch.eye(3)["xyz".index(axis)].tolist()))

    def error(model):
        moves = {"inputs": {"pos": "position"}, "outputs": "invariant", "seed": 0}
        return float(ace.equivariance_error(model.double(), {"pos": POS.double()}, group, **moves))

    assert error(Upright(axis)) < 1e-12
    # to other rotations its heights look as if they moved, so the term is put on them, where it breaks nothing
    assert error(ace.relax(Upright(axis), nn.Linear, {"pos": POS})) < 1e-12
    relaxed = ace.relax(Upright(axis), nn.Linear, {"pos": POS}, group=group)
    assert relaxed.inner.relaxation.term.map.in_features == 2 + 3
    assert error(relaxed) > 1e-2


def test_a_finite_group_moves_all_inputs_alike():
    terms = [ace.relax(Network(), example=POS, group=group) for group in (ace.Octahedral(), ace.O3(), None)]
    assert all(list(ace.relaxations(relaxed)) == ["layers.0", "layers.1"] for relaxed in terms)
    inputs, flat = {"a": "vector", "b": "vector"}, POS * torch.tensor([1.0, 0.0, 1.0])
    moved = moved_example(lambda a, b: a, (POS, flat), inputs, ace.Reflections((0, 1, 0)))
    torch.testing.assert_close(moved[0], POS * torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(moved[1], flat)  # it lies in the mirror


def test_a_group_that_moves_nothing_is_refused():
    with pytest.raises(AceError, match=r"moves no input of the example: pos \(vector\)"):
        ace.relax(Network(), example={"pos": POS}, group=ace.Translations(), inputs={"pos": "vector"})
    with pytest.raises(AceError, match="group= needs example="):
        ace.relax(Network(), group=ace.SO2())


def test_a_gate_of_e3nn_is_relaxed_on_request_only():
    gate = e3nn_nn.Gate("2x0e", [torch.tanh], "1x0e", [torch.sigmoid], "1x1o")

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gate = o3.Linear("3x0e+1x1o", gate.irreps_in), gate

        def forward(self, x):
            return self.gate(self.linear(x))

    x = o3.Irreps("3x0e+1x1o").randn(5, -1)
    options = {"inputs": {"x": "3x0e+1x1o"}}
    relaxed = ace.relax(Gated(), example=x, **options)
    assert list(ace.relaxations(relaxed)) == ["linear"]
    assert "only if layers= names it" in reasons(relaxed)["gate"]
    chosen = ace.relax(Gated(), layers=e3nn_nn.Gate, example=x, **options)
    assert list(ace.relaxations(chosen)) == ["gate"]


def test_scripted_parts_are_named_with_what_to_attach_to():
    model = Network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.layers[0].phi = torch.jit.script(model.layers[0].phi)
    relaxed = ace.relax(model, example=POS)
    assert list(ace.relaxations(relaxed)) == ["layers.0", "layers.1"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(NotAttachable, match="the model is scripted"):
        ace.relax(whole, example=POS)
    model = Wrapper(whole)
    with pytest.raises(NotAttachable, match=r"attach to the whole model \(Wrapper\)"):
        ace.relax(model, layers=r"inner", example=POS)


def test_the_same_seed_gives_the_same_terms_in_every_process():
    code = """
import torch, sys
sys.path.insert(0, "tests")
from test_planning import Network, POS
import ace
torch.manual_seed(0)
model = ace.relax(Network(3), example=POS)
print([float(p.double().sum()) for p in model.parameters()])
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


# What layers return


@dataclasses.dataclass(frozen=True)
class Frozen:
    vectors: Tensor
    label: str = "kept"


class Pair(NamedTuple):
    vectors: Tensor
    label: str


class Box:
    def __init__(self, inside):
        self.inside = inside


register_container(Box, lambda box: {"inside": box.inside}, lambda box, parts: Box(parts["inside"]))

RETURNS = {
    "dataclass": (lambda v: Frozen(v), lambda out: out.vectors),
    "named tuple": (lambda v: Pair(v, "kept"), lambda out: out.vectors),
    "registered class": (Box, lambda out: out.inside),
    "nested": (lambda v: {"a": [v, None]}, lambda out: out["a"][0]),
}


class Returning(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.dense, self.kind = nn.Linear(1, 1), kind

    def forward(self, *, pos):
        return RETURNS[self.kind][0](pos * self.dense(pos.norm(dim=-1, keepdim=True)))


class Reading(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = Returning(kind)

    def forward(self, pos):
        out = self.layer(pos=pos)
        assert getattr(out, "label", "kept") == "kept"
        return RETURNS[self.layer.kind][1](out)


@pytest.mark.parametrize("kind", RETURNS)
def test_outputs_of_any_structure(kind):
    model = Reading(kind)
    plain = model(POS)
    relaxed = ace.relax(model, example=POS)
    assert list(ace.relaxations(relaxed)) == ["layer"]
    term = relaxed.layer.relaxation.term
    torch.testing.assert_close(relaxed(POS), plain + term.map(POS))
    with ace.restored(relaxed):
        assert torch.equal(relaxed(POS), plain)


# Wide layers


def test_wide_layers_get_terms_of_low_rank():
    width = 2 * int(WIDE**0.5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, width), nn.Linear(width, width))
    relaxed = ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 3))
    full, wide = relaxed[0].relaxation.term.map, relaxed[2].relaxation.term.map
    assert isinstance(full, nn.Linear)
    assert [tuple(layer.weight.shape) for layer in wide] == [(RANK, width), (width, RANK)]


def test_rank():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 2))
    relaxed = ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 20), rank=3)
    first, second = (relaxed[i].relaxation.term.map for i in range(2))
    weight = first[1].weight @ first[0].weight
    assert torch.linalg.matrix_rank(weight) == 3
    assert isinstance(second, nn.Linear)  # a full matrix is smaller
    for wrong in ({"rank": 0}, {"rank": 2, "term": "mlp"}):
        with pytest.raises(AceError, match="rank="):
            ace.relax(nn.Linear(2, 2), layers=nn.Linear, example=torch.zeros(1, 2), **wrong)


def test_base_state_dict_goes_back():
    model = Network()
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    relaxed = ace.relax(model, example=POS)
    gammas = [r.gamma.clone() for r in ace.relaxations(relaxed).values()]
    ace.load_base_state_dict(relaxed, state)
    assert all(torch.equal(value, state[key]) for key, value in ace.base_state_dict(relaxed).items())
    assert all(torch.equal(a, r.gamma) for a, r in zip(gammas, ace.relaxations(relaxed).values(), strict=True))
    wrong = {**state, "other": torch.ones(1), "embed.weight": torch.ones(2, 2)}
    del wrong["read.bias"]
    with pytest.raises(ace.errors.CheckpointMismatch, match=r"missing read.bias.*unexpected other.*embed.weight"):
        ace.load_base_state_dict(relaxed, wrong)
