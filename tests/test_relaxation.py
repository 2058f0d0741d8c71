"""relax and restore: identity, values, terms off, tracing, errors."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import network

import ace
from ace.calls import call
from ace.errors import (
    AceError,
    AlreadyRelaxed,
    ConstraintNotMet,
    LayerNotCalled,
    NoLayerMatched,
    NotAttachable,
    NotRelaxed,
    ShapeMismatch,
)
from ace.metrics import equivariance_error
from ace.relaxation import measuring
from benchmarks.models import MODELS

WIDTH = 4


# Blocks of random architectures: each maps (..., WIDTH) to (..., WIDTH). Module level, so that they can be pickled.


class Affine(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)


class Norm(nn.BatchNorm1d):
    def __init__(self):
        super().__init__(WIDTH)
        self.running_mean.uniform_(-1, 1)
        self.running_var.uniform_(0.5, 2)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Affine(), nn.SiLU(), Affine())

    def forward(self, x):
        return x + self.inner(x)


class TupleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH + 2)

    def forward(self, x, count):
        y = self.dense(x) * count
        return y[:, :WIDTH], y[:, WIDTH:], "not a tensor"


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = TupleLayer()

    def forward(self, x):
        features, extra, _ = self.layer(x, 2)
        return features + extra.sum(-1, keepdim=True)


class DictLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, y):
        return {"features": self.dense(x) * y, "sign": x.sign().long()}


class DictBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = DictLayer()

    def forward(self, x):
        return self.layer(x, y=x.tanh())["features"]


BLOCKS = (Affine, Norm, Residual, TupleBlock, DictBlock)
LAYERS = (Affine, Norm, Residual, TupleLayer, DictLayer, nn.Sequential, nn.SiLU)


class Chain(nn.Module):
    """Blocks in sequence; the last one may run twice; keyword or positional input; any kind of output."""

    def __init__(self, blocks, twice, output):
        super().__init__()
        self.blocks = nn.ModuleList(block() for block in blocks)
        self.twice = twice
        self.output = output

    def forward(self, first, second=None):
        x = first if second is None else first + second
        for block in self.blocks:
            x = block(x)
        if self.twice:
            x = self.blocks[-1](x)
        return {"tensor": x, "tuple": (x, x.sum()), "dict": {"x": x, "label": 3}}[self.output]


@st.composite
def chains(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    blocks = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
    model = Chain(blocks, draw(st.booleans()), draw(st.sampled_from(["tensor", "tuple", "dict"])))
    if draw(st.booleans()):
        model = model.double()
    model.train(draw(st.booleans()))
    present = [kind for kind in LAYERS if any(isinstance(module, kind) for module in model.modules())]
    layers = tuple(draw(st.lists(st.sampled_from(present), min_size=1, unique=True)))
    x = torch.randn(5, WIDTH, dtype=next(model.parameters()).dtype)
    example = draw(st.sampled_from([x, (x,), (x, x.cos()), {"first": x}, {"first": x, "second": x.cos()}]))
    return model, layers, example


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


COPIES = {"same": lambda model: model, "deepcopy": copy.deepcopy, "pickle": through_pickle}


def output(model, example):
    """Output in eval mode, leaving the modes as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        found = call(model, example)
    for module, mode in modes:
        module.training = mode
    return found


def assert_bitwise(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, check_stride=True)


def trace(model):
    """Everything about a model that relax could leave changed."""
    return {
        path: (
            type(module).__qualname__,  # a GraphModule makes a new class for every copy
            dir(module),
            list(vars(module)),
            {name: len(value) for name, value in vars(module).items() if "hooks" in name},
            module.training,
            [(name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in module.named_parameters(recurse=False)],
        )
        for path, module in model.named_modules()
    }


def randomize_gammas(model):
    with torch.no_grad():
        for relaxation in ace.relaxations(model).values():
            relaxation.gamma.uniform_(0.2, 2.0)


def restore_quietly(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        return ace.restore(model, *args, **kwargs)


@given(
    chains(),
    st.sampled_from(sorted(COPIES)),
    st.sampled_from(["linear", "mlp", "spectral"]),
    st.booleans(),
)
def test_restore_after_relax_is_the_identity(chain, copying, term, normalize):
    model, layers, example = chain
    before, plain, ids = trace(model), output(model, example), [id(m) for m in model.modules()]
    keys = {key: value.clone() for key, value in model.state_dict().items()}

    relaxed = ace.relax(model, layers=layers, example=example, term=term, normalize=normalize)
    assert relaxed is model
    assert set(keys) < set(relaxed.state_dict())
    assert_bitwise(ace.base_state_dict(relaxed), keys)
    randomize_gammas(relaxed)
    output(relaxed, example)
    carried = COPIES[copying](relaxed)
    result = restore_quietly(carried)

    assert result is carried
    if copying == "same":
        assert [id(m) for m in result.modules()] == ids
    assert trace(result) == before
    assert list(result.state_dict()) == list(keys)
    assert_bitwise(dict(result.state_dict()), keys)
    assert_bitwise(output(result, example), plain)


@given(chains(), st.sampled_from(["linear", "mlp", "spectral"]), st.booleans())
def test_gamma_zero_is_bitwise_the_plain_model(chain, term, normalize):
    model, layers, example = chain
    plain = output(model, example)
    ace.relax(model, layers=layers, example=example, term=term, normalize=normalize)
    with ace.restored(model):
        assert_bitwise(output(model, example), plain)
        assert all(r.gamma.item() == 0 for r in ace.relaxations(model).values())
    assert all(r.gamma.item() == 1 for r in ace.relaxations(model).values())
    for relaxation in ace.relaxations(model).values():
        relaxation.retire()
    assert_bitwise(output(model, example), plain)


def graphs(dtype=torch.float32):
    """Three fully connected graphs of 4, 5 and 3 nodes."""
    generator = torch.Generator().manual_seed(3)
    sizes, edges, offset = [4, 5, 3], [], 0
    for size in sizes:
        edges += [(offset + i, offset + j) for i in range(size) for j in range(size) if i != j]
        offset += size
    edge_index = torch.tensor(edges).T

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "pos": random(offset, 3),
        "vel": random(offset, 3),
        "h": random(offset, 2),
        "edge_index": edge_index,
        "edge_attr": random(edge_index.shape[1], 1),
        "batch": torch.repeat_interleave(torch.arange(3), torch.tensor(sizes)),
    }


def benchmark_model(name, dtype=torch.float32):
    sizes = {"features": 8} if name == "segnn" else {"hidden": 8}
    return MODELS[name].build(node_features=2, edge_features=1, layers=2, **sizes).to(dtype)


def chosen(name):
    return lambda path, module: type(module).__name__ in MODELS[name].layers


@pytest.mark.parametrize("copying", sorted(COPIES))
@pytest.mark.parametrize("name", ["egnn", "egno", "segnn"])
def test_benchmark_models_come_back(name, copying):
    model, example = benchmark_model(name), graphs()
    before = trace(COPIES[copying](model))  # e3nn rebuilds its layers when it is copied
    plain, keys = output(model, example), list(model.state_dict())
    relaxed = ace.relax(model, layers=chosen(name), example=example)
    assert len(ace.relaxations(relaxed)) == 2
    with ace.restored(relaxed):
        assert_bitwise(output(relaxed, example), plain)
    randomize_gammas(relaxed)
    assert not torch.equal(output(relaxed, example), plain)
    result = restore_quietly(COPIES[copying](relaxed))
    assert trace(result) == before
    assert list(result.state_dict()) == keys
    assert_bitwise(output(result, example), plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", ["egnn", "egno", "segnn"])
def test_restored_models_are_equivariant_and_relaxed_ones_are_not(name, dtype, tolerance):
    model, example = benchmark_model(name, dtype), graphs(dtype)
    relaxed = ace.relax(model, layers=chosen(name), example=example)
    types = {"outputs": "position", "inputs": {"h": "scalar", "edge_attr": "invariant", "batch": "invariant"}}
    assert equivariance_error(relaxed, example, ace.O3(), **types).max > 1e-3
    restore_quietly(relaxed)
    assert equivariance_error(relaxed, example, ace.E3(), **types).max <= tolerance


# Values


def test_relaxed_layer_is_f_eq_plus_gamma_f_neq(float64):
    layer, x = nn.Linear(3, 2), torch.randn(7, 3)
    plain = layer(x)
    relaxed = ace.relax(layer, layers=nn.Linear, example=x, term="mlp")
    for gamma in (0.0, 0.3, 0.7, -1.0):
        with torch.no_grad():
            relaxed.relaxation.gamma.fill_(gamma)
        first, _, second = relaxed.relaxation.term.map
        expected = plain + gamma * second(nn.functional.silu(first(x)))
        torch.testing.assert_close(relaxed(x), expected, rtol=0, atol=1e-15)


def test_whole_network_at_intermediate_gamma(float64):
    model, x = network(), torch.randn(5, 4)
    copied = copy.deepcopy(model)
    relaxed = ace.relax(model, layers=nn.Linear, example=x)
    randomize_gammas(relaxed)
    value = x
    for index, stage in enumerate(copied):
        new = stage(value)
        if isinstance(stage, nn.Linear):
            relaxation = ace.relaxations(relaxed)[str(index)]
            new = new + relaxation.gamma * relaxation.term.map(value)
        value = new
    torch.testing.assert_close(relaxed(x), value, rtol=0, atol=1e-14)


def test_tuple_and_dict_outputs_change_where_a_term_writes(float64):
    x = torch.randn(5, WIDTH)
    layer = TupleLayer()
    plain = layer(x, 3)
    relaxed = ace.relax(layer, layers=TupleLayer, example=(x, 3))
    change = relaxed.relaxation.term.map(x)
    features, extra, text = relaxed(x, 3)
    assert_bitwise((features, extra), (plain[0] + change[:, :WIDTH], plain[1] + change[:, WIDTH:]))
    assert text == "not a tensor"

    layer = DictLayer()
    plain = layer(x, y=x.cos())
    relaxed = ace.relax(layer, layers=DictLayer, example=({"x": x, "y": x.cos()}))
    found = relaxed(x=x, y=x.cos())
    assert_bitwise(found["features"], plain["features"] + relaxed.relaxation.term.map(torch.cat((x, x.cos()), -1)))
    assert_bitwise(found["sign"], plain["sign"])
    assert_bitwise(relaxed(x, y=x.cos()), found)  # positional or by keyword is the same


def test_gradients_reach_gamma_term_and_layer(float64):
    x = torch.randn(5, 3)
    relaxed = ace.relax(nn.Linear(3, 2), layers=nn.Linear, example=x)
    with torch.no_grad():
        relaxed.relaxation.gamma.fill_(0.3)
    relaxed(x).sum().backward()
    term = relaxed.relaxation.term
    torch.testing.assert_close(relaxed.relaxation.gamma.grad, term.map(x).sum().reshape(1).detach())
    torch.testing.assert_close(term.map.weight.grad, 0.3 * relaxed.weight.grad)


@pytest.mark.parametrize("gamma", [0.3, -0.6])
def test_normalized_term_has_relative_norm_gamma(gamma, float64):
    x = torch.randn(6, 3) * torch.logspace(-3, 3, 6)[:, None]  # rows of very different size
    layer = nn.Linear(3, 4)
    plain = layer(x)
    relaxed = ace.relax(layer, layers=nn.Linear, example=x, normalize=True)
    with torch.no_grad():
        relaxed.relaxation.gamma.fill_(gamma)
    change = torch.linalg.vector_norm(relaxed(x) - plain, dim=-1)
    torch.testing.assert_close(change / torch.linalg.vector_norm(plain, dim=-1), torch.full((6,), abs(gamma)))


def test_normalized_term_survives_rows_of_zeros():
    x = torch.zeros(4, 3)
    x[0] = 1.0
    layer = nn.Linear(3, 4)
    nn.init.constant_(layer.bias, 100.0)
    relaxed = ace.relax(
        layer, layers=nn.Linear, example=x, normalize=True, term=lambda i, o: nn.Linear(i, o, bias=False)
    )
    found = relaxed(x)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(p.grad.isfinite().all() for p in relaxed.parameters())

    silent = nn.Linear(3, 4)
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    relaxed = ace.relax(silent, layers=nn.Linear, example=x, normalize=True)
    assert torch.equal(relaxed(x), torch.zeros(4, 4))  # a relative change of nothing is nothing


def test_shared_layer_runs_its_term_at_every_use(float64):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.alias = self.layer

        def forward(self, x):
            return self.alias(self.layer(x).tanh())

    model, x = Twice(), torch.randn(5, 3)
    relaxed = ace.relax(model, layers=nn.Linear, example=x)
    (relaxation,) = ace.relaxations(relaxed).values()

    def once(value):
        linear = nn.functional.linear(value, model.layer.weight, model.layer.bias)
        return linear + relaxation.gamma * relaxation.term.map(value)

    torch.testing.assert_close(relaxed(x), once(once(x).tanh()), rtol=0, atol=1e-15)
    with measuring([relaxation]) as sizes:
        relaxed(x)
        assert sizes()[0][2] == 30  # both uses are measured
    restore_quietly(relaxed)
    assert ace.relaxations(model) == {}
    assert "layer.weight" in model.state_dict()


def test_sequential_can_be_a_relaxed_layer(float64):
    x = torch.randn(5, 3)
    stage = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    model = nn.Sequential(stage, nn.Linear(4, 2))
    plain = stage(x)
    relaxed = ace.relax(model, layers=nn.Sequential, example=x, exclude=r"^$")
    assert list(ace.relaxations(relaxed)) == ["0"]
    torch.testing.assert_close(stage(x), plain + stage.relaxation.term.map(x))
    restore_quietly(relaxed)
    assert len(stage) == 2


def test_example_leaves_batchnorm_and_modes_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    x = torch.randn(6, 3)
    ace.relax(model, layers=nn.Linear, example=x)
    ace.projection_gap(model, x)
    ace.summary(model, x)
    assert_bitwise(ace.base_state_dict(model), before)
    restore_quietly(model, example=x)
    assert [m.training for m in model.modules()] == modes
    assert_bitwise(dict(model.state_dict()), before)


# Positions


class Invariants(nn.Module):
    """Sees distances only; its inner layer sees invariant features only."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(1, 3)

    def forward(self, pos, scale=1.0):
        return self.inner(torch.linalg.vector_norm(pos, dim=-1, keepdim=True)) * scale


@pytest.mark.parametrize(
    ("select", "example"),
    [
        ("pos", {"pos": torch.randn(5, 3)}),
        (0, (torch.randn(5, 3), 2.0)),
        (lambda pos, scale=1.0: pos[:, :2], (torch.randn(5, 3),)),
    ],
    ids=["keyword", "index", "function"],
)
def test_positions_reach_the_term(select, example):
    pos = example["pos"] if isinstance(example, dict) else example[0]
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    model = Invariants()
    plain = model(pos)
    keys = list(model.state_dict())
    relaxed = ace.relax(model, layers=nn.Linear, example=example, positions=select)
    found = call(relaxed, example)
    term = relaxed.inner.relaxation.term
    read = pos[:, :2] if callable(select) else pos
    features = torch.cat((torch.linalg.vector_norm(pos, dim=-1, keepdim=True), read), -1)
    scale = 2.0 if select == 0 else 1.0
    torch.testing.assert_close(found, scale * (plain + term.map(features)))
    turned = {"pos": pos @ rotation} if isinstance(example, dict) else (pos @ rotation, *example[1:])
    assert not torch.allclose(call(relaxed, turned), found, atol=1e-2)
    restore_quietly(relaxed)
    assert list(model.state_dict()) == keys
    assert_bitwise(model(pos), plain)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_invariant_layers_get_the_positions_unasked():
    pos = torch.randn(5, 3)
    relaxed = ace.relax(Invariants(), layers=nn.Linear, example=pos)
    assert relaxed.inner.relaxation.term.map.in_features == 4
    rotation, _ = torch.linalg.qr(torch.randn(3, 3))
    assert not torch.allclose(relaxed(pos @ rotation), relaxed(pos), atol=1e-2)
    with ace.restored(relaxed):
        torch.testing.assert_close(relaxed(pos @ rotation), relaxed(pos))


def test_positions_are_those_of_a_pass_of_the_whole_model():
    relaxed = ace.relax(Invariants(), layers=nn.Linear, example=torch.randn(5, 3), positions=0)
    with pytest.raises(AceError, match="outside of the model"):
        relaxed.inner(torch.randn(5, 1))


def test_positions_under_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    pos = torch.randn(5, 3)
    relaxed = ace.relax(Invariants(), layers=nn.Linear, example=pos, positions=0)
    relaxed(pos).sum().backward()
    plain = {name: parameter.grad.clone() for name, parameter in relaxed.named_parameters()}
    relaxed.zero_grad()
    inner = relaxed.inner
    run = type(inner).__call__
    relaxed._modules["inner"] = wrapped = nn.Identity()
    wrapped.forward = lambda x: checkpoint(lambda y: run(inner, y), x, use_reentrant=False)
    relaxed(pos).sum().backward()
    relaxed._modules["inner"] = inner
    for name, parameter in relaxed.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@pytest.mark.parametrize("copying", ["deepcopy", "pickle"])
def test_copies_capture_their_own_positions(copying):
    example = torch.randn(5, 3)
    relaxed = ace.relax(Invariants(), layers=nn.Linear, example=example, positions=0).eval()
    twin = COPIES[copying](relaxed)
    expected = relaxed(example)
    with torch.no_grad():
        for parameter in relaxed.parameters():
            parameter.zero_()
    assert torch.equal(twin(example), expected)
    assert twin.inner.relaxation.term.positions is twin.relaxation_positions
    assert twin.relaxation_positions is not relaxed.relaxation_positions


def test_strength_has_the_dtype_of_its_layer_whatever_the_term():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.Linear(4, 2).double())
    x = torch.randn(3, 4).double()
    relaxed = ace.relax(model, layers="0", example=x, term=lambda features_in, features_out: nn.Softmax(-1))
    assert [r.gamma.dtype for r in ace.relaxations(relaxed).values()] == [torch.float64]
    assert relaxed(x).dtype == torch.float64


def test_positions_name_no_tensor():
    with pytest.raises(AceError, match=r"positions='where' names no tensor"):
        ace.relax(Invariants(), layers=nn.Linear, example=torch.randn(5, 3), positions="where")
    with pytest.raises(AceError, match="needs example"):
        ace.relax(Invariants(), layers=nn.Linear, positions=0)


# Tools of torch


def test_compiled_whole_and_once_while_gamma_moves():
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x)
    torch._dynamo.reset()
    compiled = torch.compile(relaxed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), relaxed(x))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gamma in (0.5, 0.0, -0.25, 1e-3):
            with torch.no_grad():
                for relaxation in ace.relaxations(relaxed).values():
                    relaxation.gamma.fill_(gamma)
            torch.testing.assert_close(compiled(x), relaxed(x))
            compiled(x).sum().backward()
    assert list(ace.relaxations(compiled)) == ["0", "2", "4"]


def test_compiled_model_follows_retire_and_restore():
    x = torch.randn(5, 4)
    model = network()
    plain = model(x)
    relaxed = ace.relax(model, layers=nn.Linear, example=x)
    torch._dynamo.reset()
    compiled = torch.compile(relaxed, fullgraph=True, backend="aot_eager")
    assert not torch.allclose(compiled(x), plain)
    assert restore_quietly(compiled) is compiled
    assert ace.relaxations(model) == {}
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(compiled(x), plain)


@pytest.mark.parametrize("first", ["plain", "relaxed"])
def test_compiled_code_of_a_plain_copy_is_not_run_in_place_of_the_relaxed_one(first):
    x = torch.randn(5, 4)
    plain = network()
    relaxed = ace.relax(copy.deepcopy(plain), layers=nn.Linear, example=x)
    expected = {"plain": plain(x), "relaxed": relaxed(x)}
    torch._dynamo.reset()
    compiled = {
        name: torch.compile(model, fullgraph=True, backend="aot_eager")
        for name, model in (("plain", plain), ("relaxed", relaxed))
    }
    for name in (first, "relaxed", "plain", "relaxed"):
        torch.testing.assert_close(compiled[name](x), expected[name])
    assert not torch.allclose(expected["plain"], expected["relaxed"])
    for again in (copy.deepcopy(relaxed), pickle.loads(pickle.dumps(relaxed))):
        torch.testing.assert_close(again(x), expected["relaxed"], rtol=0, atol=0)
        assert all(m.forward.__self__ is m for m in again.modules())
    assert not any("forward" in vars(m) for m in restore_quietly(relaxed).modules())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler looks at .grad
def test_positions_are_traced_by_the_compiler():
    x = torch.randn(5, 3)
    relaxed = ace.relax(Invariants(), layers=nn.Linear, example=x, positions=0)
    torch._dynamo.reset()
    compiled = torch.compile(relaxed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), relaxed(x))
    torch.testing.assert_close(compiled(2 * x), relaxed(2 * x))


def test_functional_call_takes_gamma():
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x)
    with ace.restored(relaxed):
        plain = relaxed(x)
    zeros = {name: torch.zeros(1) for name, _ in relaxed.named_parameters() if name.endswith("gamma")}
    assert len(zeros) == 3
    torch.testing.assert_close(torch.func.functional_call(relaxed, zeros, (x,)), plain, rtol=0, atol=0)

    def output_of(gamma):
        return torch.func.functional_call(relaxed, dict.fromkeys(zeros, gamma), (x,)).sum()

    assert torch.func.grad(output_of)(torch.ones(1)).abs() > 0


def test_export_carries_the_term():
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x).eval()
    exported = torch.export.export(relaxed, (x,))
    torch.testing.assert_close(exported.module()(x), relaxed(x))
    assert "0.relaxation.gamma" in exported.state_dict


def test_state_dict_loads_with_weights_only():
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x, term="spectral")
    randomize_gammas(relaxed)
    file = io.BytesIO()
    torch.save(relaxed.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert tuple(state["0.relaxation.gamma"].shape) == (1,)
    twin = ace.relax(network(), layers=nn.Linear, example=x, term="spectral")
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(x), relaxed.eval()(x))


def test_base_state_dict_loads_into_the_plain_model():
    relaxed = ace.relax(network(), layers=nn.Linear, example=torch.zeros(1, 4))
    plain = network()
    plain.load_state_dict(ace.base_state_dict(relaxed))
    x = torch.randn(3, 4)
    with ace.restored(relaxed):
        assert torch.equal(plain(x), relaxed(x))


class Owner(nn.Module):
    """A model that happens to use our names."""

    def __init__(self):
        super().__init__()
        self.relaxation = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relaxation(x))


def test_a_model_with_a_module_of_our_name():
    model = Owner()
    keys = list(model.state_dict())
    relaxed = ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 4))
    assert list(ace.relaxations(relaxed)) == ["relaxation", "head"]
    assert list(ace.base_state_dict(relaxed)) == keys
    assert [row.path for row in ace.summary(relaxed)] == ["relaxation", "head"]
    assert list(restore_quietly(relaxed).state_dict()) == keys
    with pytest.raises(NotAttachable, match="relaxation"):
        ace.relax(model, layers=Owner, example=torch.zeros(1, 4))
    assert list(model.state_dict()) == keys


# Gap, summary, warning, recalibration


def test_projection_gap_is_the_relative_change(float64):
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x)
    randomize_gammas(relaxed)
    with_terms = relaxed(x)
    with ace.restored(relaxed):
        without = relaxed(x)
    expected = ((with_terms - without).square().sum() / without.square().sum()).sqrt().item()
    assert ace.projection_gap(relaxed, x) == pytest.approx(expected, rel=1e-13)
    with ace.restored(relaxed):
        assert ace.projection_gap(relaxed, x) == 0.0


def test_projection_gap_over_all_outputs(float64):
    x = torch.randn(5, WIDTH)
    relaxed = ace.relax(TupleLayer(), layers=TupleLayer, example=(x, 1))
    change = relaxed.relaxation.term.map(x).norm()
    with ace.restored(relaxed):
        plain = torch.cat(relaxed(x, 1)[:2], -1).norm()
    assert ace.projection_gap(relaxed, (x, 1)) == pytest.approx((change / plain).item(), rel=1e-12)


def test_restore_warns_and_logs_the_gap(caplog):
    x = torch.randn(5, 4)
    relaxed = ace.relax(network(), layers=nn.Linear, example=x)
    with torch.no_grad():
        ace.relaxations(relaxed)["2"].gamma.fill_(-3.0)
    gap = ace.projection_gap(relaxed, x)
    with caplog.at_level(logging.INFO, logger="ace"), pytest.warns(ConstraintNotMet, match=r"3 at '2'") as caught:
        ace.restore(relaxed, example=x)
    assert f"projection gap {gap:.3g}" in caplog.text
    assert f"projection gap {gap:.3g}" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_restore_is_silent_when_the_constraint_is_met(caplog):
    relaxed = ace.relax(network(), layers=nn.Linear, example=torch.zeros(1, 4))
    for relaxation in ace.relaxations(relaxed).values():
        relaxation.retire()
    with caplog.at_level(logging.INFO, logger="ace"):
        ace.restore(relaxed)  # warnings are errors
    assert "projection gap 0" in caplog.text


def test_restore_without_example_says_the_gap_was_not_measured():
    relaxed = ace.relax(network(), layers=nn.Linear, example=torch.zeros(1, 4))
    with pytest.warns(ConstraintNotMet, match="not measured"):
        ace.restore(relaxed)


def test_recalibration_is_the_average_over_the_batches(float64):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.37), nn.Linear(4, 2), nn.Dropout(0.5))
    data = torch.randn(6, 8, 3)
    ace.relax(model, layers=nn.Linear, example=data[0])
    for batch in data:
        model(batch)  # statistics of the relaxed pass
    wrong = model[1].running_mean.clone()
    modes = [m.training for m in model.modules() if not isinstance(m, ace.Relaxation)]
    restore_quietly(model, recalibrate=iter(data))
    hidden = torch.stack([model[0](batch) for batch in data])
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(model[1].running_var, hidden.var(1, unbiased=True).mean(0))
    assert not torch.allclose(model[1].running_mean, wrong, atol=1e-2)
    assert model[1].momentum == 0.37
    assert len(modes) > len([m.training for m in model.modules()])
    assert all(m.training for m in model.modules())


def test_recalibration_puts_momentum_back_when_a_batch_fails():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.37))
    ace.relax(model, layers=nn.Linear, example=torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="shape"):
        restore_quietly(model, recalibrate=[torch.randn(5, 3), torch.randn(5, 9)])
    assert model[1].momentum == 0.37


def test_summary_rows(float64):
    x = torch.randn(5, 4)
    model = network()
    relaxed = ace.relax(model, layers=nn.Linear, example=x)
    assert {row.status for row in ace.summary(relaxed)} == {"not called yet"}
    relaxed(x)
    terms = ace.relaxations(relaxed)
    with torch.no_grad():
        terms["0"].gamma.fill_(-0.5)
        terms["2"].gamma.fill_(0.0)
    terms["4"].retire()
    rows = ace.summary(relaxed, x)
    term = terms["0"].term.map(x)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert [row.path for row in rows] == ["0", "2", "4"]
    assert [row.type for row in rows] == ["Linear"] * 3
    assert [row.gamma for row in rows] == [-0.5, 0.0, 0.0]
    assert [row.status for row in rows] == ["relaxed", "met", "retired"]
    assert [row.multiplier for row in rows] == [None] * 3
    assert rows[0].ratio == pytest.approx((0.5 * term.norm() / plain.norm()).item(), rel=1e-6)
    assert rows[1].ratio == 0.0
    problem = ace.Problem(relaxed, lambda model, batch: model(batch).sum())
    ace.PrimalDual(problem, torch.optim.SGD(relaxed.parameters(), lr=0.1), steps=10)
    with torch.no_grad():
        problem.multiplier.copy_(torch.tensor([0.25, 1.5, 2.0]))
    assert [row.multiplier for row in ace.summary(relaxed)] == [0.25, 1.5, 2.0]
    table = str(ace.summary(relaxed)).splitlines()
    assert len(table) == 4
    assert table[1].split() == ["0", "Linear", "-0.5", "–", "0.25", "relaxed"]


# Choosing layers, and errors


def test_layers_by_type_tuple_regex_predicate_and_exclude():
    made = ace.relax(network(), layers=nn.Linear, exclude=r"^2$", example=torch.zeros(1, 4))
    assert list(ace.relaxations(made)) == ["0", "4"]
    made = ace.relax(network(), layers=(nn.Linear, nn.Tanh), exclude=nn.Tanh, example=torch.zeros(1, 4))
    assert list(ace.relaxations(made)) == ["0", "2", "4"]
    made = ace.relax(network(), layers=r"^[02]$", example=torch.zeros(1, 4))
    assert list(ace.relaxations(made)) == ["0", "2"]
    late = ace.relax(
        network(), layers=lambda path, m: isinstance(m, nn.Linear) and path > "1", example=torch.zeros(1, 4)
    )
    assert list(ace.relaxations(late)) == ["2", "4"]
    with pytest.raises(NotAttachable, match=r"pass relax\(\.\.\., example=batch\)"):
        ace.relax(network(), layers=nn.Linear)


def assert_untouched(model, before):
    assert trace(model) == before


def test_no_layer_matches_lists_the_five_nearest_types():
    stages = nn.Linear(4, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.SiLU(), nn.LayerNorm(4), nn.Bilinear(4, 4, 4)
    model = nn.Sequential(*stages)
    before = trace(model)
    with pytest.raises(NoLayerMatched) as caught:
        ace.relax(model, layers=nn.LazyLinear, example=torch.zeros(2, 4))
    listed = str(caught.value).rsplit(": ", 1)[1].split(", ")
    assert len(listed) == 5
    assert listed[:2] == ["Linear", "Bilinear"]
    with pytest.raises(NoLayerMatched, match=r"Nearest layer types in the model: .*Linear"):
        ace.relax(model, layers="linaer", example=torch.zeros(2, 4))
    with pytest.raises(NoLayerMatched, match="exclude"):
        ace.relax(model, layers=nn.Linear, exclude=nn.Linear, example=torch.zeros(2, 4))
    with pytest.raises(NoLayerMatched, match="no layer of the model can carry a relaxation term"):
        ace.relax(nn.Sequential(nn.ReLU()), example=torch.zeros(2, 4))
    assert_untouched(model, before)


class Sneaky(nn.Module):
    """Runs one of its layers through ``forward``, another never."""

    def __init__(self):
        super().__init__()
        self.good, self.hidden, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.hidden.forward(self.good(x))


def test_a_layer_that_is_never_called():
    model = Sneaky()
    before = trace(model)
    with pytest.raises(LayerNotCalled, match="hidden, idle"):
        ace.relax(model, layers=nn.Linear, example=torch.randn(2, 3))
    assert_untouched(model, before)


def test_all_layers_that_cannot_carry_a_term_are_listed_at_once():
    class Pool(nn.Module):
        def forward(self, x):
            return x.mean(0)

    class Label(nn.Module):
        def forward(self, x):
            return x.argmax(-1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.pool, self.label = nn.Linear(3, 3), Pool(), Label()

        def forward(self, x):
            x = self.dense(x)
            return self.pool(x), self.label(x)

    model = Model()
    before = trace(model)
    with pytest.raises(NotAttachable) as caught:
        ace.relax(model, layers=(nn.Linear, Pool, Label), example=torch.randn(2, 3))
    message = str(caught.value)
    assert "pool (Pool)" in message
    assert "label (Label)" in message
    assert "dense" not in message
    assert "exclude=" in message
    assert_untouched(model, before)


def test_scripted_layers_are_refused():
    class Box(nn.Module):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.inside = torch.jit.script(nn.Linear(3, 3))

        def forward(self, x):
            return self.inside(x)

    with pytest.raises(
        NotAttachable,
        match=r"inside .*: a scripted module takes no hooks; relax before .*the whole model",
    ):
        ace.relax(Box(), layers="inside", example=torch.randn(2, 3))


def test_relaxing_twice_and_restoring_nothing():
    relaxed = ace.relax(network(), layers=nn.Linear, example=torch.zeros(1, 4))
    before = trace(relaxed)
    with pytest.raises(AlreadyRelaxed, match="0, 2, 4"):
        ace.relax(relaxed, layers=nn.Linear, example=torch.zeros(1, 4))
    assert_untouched(relaxed, before)
    plain = network()
    for function in (ace.restore, ace.summary, lambda m: ace.projection_gap(m, torch.zeros(1, 4))):
        with pytest.raises(NotRelaxed):
            function(plain)
    with pytest.raises(NotRelaxed):
        ace.Problem(plain, lambda model, batch: model(batch).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"term": "cubic"}, "unknown term 'cubic'"),
        ({"layers": [nn.Linear]}, "layers="),
        ({"layers": "("}, "regular expression"),
        ({"exclude": 3}, "exclude="),
    ],
)
def test_bad_arguments(arguments, message):
    model = network()
    before = trace(model)
    with pytest.raises(AceError, match=message):
        ace.relax(model, **{"layers": nn.Linear, "example": torch.zeros(1, 4), **arguments})
    assert_untouched(model, before)


def test_a_failing_example_leaves_no_hooks():
    model = network()
    before = trace(model)
    with pytest.raises(RuntimeError):
        ace.relax(model, layers=nn.Linear, example=torch.zeros(1, 7))
    assert_untouched(model, before)


def test_a_term_of_the_wrong_shape():
    relaxed = ace.relax(
        nn.Sequential(nn.Linear(3, 2)), layers=nn.Linear, example=torch.zeros(1, 3), term=lambda i, o: nn.Linear(i, 1)
    )
    with pytest.raises(ShapeMismatch, match=r"^0: the term returns shape \(5, 1\) for an output of shape \(5, 2\)"):
        relaxed(torch.zeros(5, 3))
