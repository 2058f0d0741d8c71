"""Terms: ports, writes, maps, the registry and the generic fall-back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ace
from ace.errors import AceError, NoLayerMatched, NotAttachable
from ace.terms import MAPS, MLP, DenseTerm, Port, SpectralLinear, Write, registered_factory


def linear(features_in, features_out):
    return nn.Linear(features_in, features_out)


def test_port_reads_by_place_or_by_name():
    port = Port(1, "y", 3)
    y = torch.ones(2, 3)
    assert port((None, y), {}) is y
    assert port((None,), {"y": y}) is y


def test_inputs_are_concatenated_and_broadcast(float64):
    term = DenseTerm([Port(0, "x", 3), Port(1, "y", 2)], [Write(None, 4)], linear)
    x, y = torch.randn(6, 5, 3), torch.randn(5, 2)
    found = term.inputs((x,), {"y": y})
    assert torch.equal(found, torch.cat((x, y.expand(6, 5, 2)), -1))
    assert torch.equal(term(x, y=y), term.map(found))


def test_several_writes_split_the_map(float64):
    term = DenseTerm([Port(0, "x", 3)], [Write(0, 4), Write(2, 1)], linear)
    x = torch.randn(5, 3)
    parts = term(x)
    assert list(parts) == [0, 2]
    assert torch.equal(torch.cat((parts[0], parts[2]), -1), term.map(x))
    assert parts[2].shape == (5, 1)


@pytest.mark.parametrize("name", MAPS)
@given(st.integers(1, 7), st.integers(1, 7))
def test_maps_have_the_sizes_asked_for(name, features_in, features_out):
    assert MAPS[name](features_in, features_out)(torch.zeros(2, features_in)).shape == (2, features_out)


def test_mlp_is_two_layers_as_wide_as_the_wider_end():
    first, activation, second = MLP(3, 8)
    assert (first.in_features, first.out_features, second.in_features, second.out_features) == (3, 8, 8, 8)
    assert isinstance(activation, nn.SiLU)


def operator_norm(layer):
    with torch.no_grad():
        columns = layer(torch.eye(layer.in_features)) - layer.bias
    return torch.linalg.matrix_norm(columns, ord=2).item()


@pytest.mark.parametrize(("features_in", "features_out"), [(5, 3), (3, 5), (1, 4), (6, 6)])
def test_spectral_map_has_operator_norm_one(features_in, features_out, float64):
    layer = SpectralLinear(features_in, features_out)
    assert operator_norm(layer.eval()) == pytest.approx(1.0, abs=1e-12)  # exact from the start
    with torch.no_grad():
        layer.weight.copy_(torch.randn(features_out, features_in) * 7)
    assert abs(operator_norm(layer) - 1.0) > 1e-3  # until power iteration has followed the weights
    layer.train()
    for _ in range(2000):
        layer(torch.zeros(1, features_in))
    assert operator_norm(layer.eval()) == pytest.approx(1.0, abs=1e-10)


def test_spectral_map_has_the_gradient_of_the_quotient(float64):
    layer = SpectralLinear(4, 3)
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    weight = layer.weight.detach().clone().requires_grad_()
    ((x @ weight.T / torch.linalg.matrix_norm(weight, ord=2)) + layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-8, atol=1e-10)


def test_spectral_map_may_run_twice_before_the_backward_pass():
    layer, x = SpectralLinear(4, 4), torch.randn(5, 4)
    layer(layer(x)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_spectral_map_does_not_move_in_eval_mode():
    layer = SpectralLinear(4, 3).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(5, 4))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_terms_take_the_dtype_of_their_layer():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = nn.Linear(3, 2).to(dtype)
        x = torch.randn(4, 3, dtype=dtype)
        relaxed = ace.relax(layer, layers=nn.Linear, example=x)
        assert {p.dtype for p in relaxed.parameters()} == {dtype}
        assert relaxed(x).dtype == dtype


class Registered(nn.Module):
    def forward(self, x):
        return 2 * x


class Child(Registered):
    pass


class Grandchild(Child):
    pass


@pytest.fixture
def registry(monkeypatch):
    """The registry, as it was after the test."""
    import ace.terms

    monkeypatch.setattr(ace.terms, "_FACTORIES", dict(ace.terms._FACTORIES))


@pytest.mark.usefixtures("registry")
def test_registry_follows_the_method_resolution_order():
    @ace.register_term(Registered)
    def for_parent(site):
        return nn.Linear(3, 3)

    assert registered_factory(Grandchild()) is for_parent
    assert registered_factory(nn.Identity()) is None

    @ace.register_term(Child)
    def for_child(site):
        return nn.Linear(3, 3, bias=False)

    assert registered_factory(Grandchild()) is for_child
    assert registered_factory(Registered()) is for_parent
    relaxed = ace.relax(nn.Sequential(Registered(), nn.Tanh(), Grandchild()))  # by default: registered types
    assert list(ace.relaxations(relaxed)) == ["0", "2"]
    assert relaxed[2].relaxation.term.bias is None
    x = torch.randn(4, 3)
    torch.testing.assert_close(relaxed[0](x), 2 * x + relaxed[0].relaxation.term(x))


@pytest.mark.usefixtures("registry")
def test_a_registered_term_sees_its_site():
    seen = []

    @ace.register_term(Registered)
    def factory(site):
        seen.append(site)
        return site.dense([Port(0, "x", 3)], [Write(None, 3)])

    x = torch.randn(4, 3)
    model = nn.Sequential(Registered())
    ace.relax(model, example=x, term="mlp")
    (site,) = seen
    assert (site.path, site.layer, site.make) == ("0", model[0], MLP)
    assert torch.equal(site.call.args[0], x)
    assert torch.equal(site.call.output, 2 * x)


@pytest.mark.usefixtures("registry")
def test_a_registered_term_may_refuse():
    @ace.register_term(Registered)
    def factory(site):
        raise NotAttachable("only on Sundays")

    with pytest.raises(NotAttachable, match=r"0 \(Registered\): only on Sundays"):
        ace.relax(nn.Sequential(Registered()), layers=Registered, example=torch.zeros(1, 3))
    with pytest.raises(NoLayerMatched, match="0: only on Sundays"):
        ace.relax(nn.Sequential(Registered()), example=torch.zeros(1, 3))


class Mixed(nn.Module):
    """Reads rows of nodes and of edges, scalars and integers; returns nodes, edges, a label."""

    def forward(self, nodes, index, edges, *, more, flag=None, scale=1.0):
        return {"nodes": nodes[:, :2], "edges": edges, "label": index, "pooled": nodes.mean(0)}


def test_generic_term_reads_and_writes_the_rows_of_the_first_changed_output(float64):
    nodes, edges, more = torch.randn(4, 3), torch.randn(9, 2), torch.randn(4, 5)
    layer = Mixed()
    kwargs = {"nodes": nodes, "index": torch.arange(4), "edges": edges, "more": more}
    relaxed = ace.relax(nn.Sequential(layer)[0], layers=Mixed, example=kwargs)
    term = relaxed.relaxation.term
    assert [(port.name, port.width) for port in term.reads] == [("nodes", 3), ("more", 5)]
    assert [(write.key, write.width) for write in term.writes] == [("nodes", 2)]
    found = relaxed(nodes, torch.arange(4), edges, more=more)  # called otherwise than recorded
    change = term.map(torch.cat((nodes, more), -1))
    assert torch.equal(found["nodes"], nodes[:, :2] + change)
    assert torch.equal(found["edges"], edges)
    assert torch.equal(found["label"], torch.arange(4))


def test_generic_term_without_an_example():
    with pytest.raises(NotAttachable, match=r"pass relax\(\.\.\., example=batch\)"):
        ace.relax(nn.Sequential(nn.Linear(2, 2)), layers=nn.Linear)


def test_positions_only_where_the_rows_are_theirs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.node, self.edge = nn.Linear(2, 2), nn.Linear(1, 2)

        def forward(self, pos, h, e):
            return self.node(h).sum() + self.edge(e).sum()

    example = {"pos": torch.randn(4, 3), "h": torch.randn(4, 2), "e": torch.randn(9, 1)}
    with pytest.raises(NotAttachable, match=r"edge \(Linear\): it sees only invariant features.*not those of the pos"):
        ace.relax(Model(), layers=nn.Linear, example=example, positions="pos")
    relaxed = ace.relax(Model(), layers=nn.Linear, exclude="edge", example=example, positions="pos")
    assert relaxed.node.relaxation.term.map.in_features == 5


def test_positions_as_an_attribute_of_the_input():
    from torch_geometric.data import Data

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.node = nn.Linear(2, 2)

        def forward(self, data):
            return self.node(data.x)

    data = Data(x=torch.randn(4, 2), pos=torch.randn(4, 3))
    relaxed = ace.relax(Model(), layers=nn.Linear, example=data, positions="pos")
    term = relaxed.node.relaxation.term
    expected = nn.functional.linear(data.x, relaxed.node.weight, relaxed.node.bias)
    torch.testing.assert_close(relaxed(data), expected + term.map(torch.cat((data.x, data.pos), -1)))


def test_a_term_with_positions_needs_the_whole_model():
    relaxed = ace.relax(nn.Sequential(nn.Linear(3, 2)), layers=nn.Linear, example=torch.randn(4, 3), positions=0)
    with pytest.raises(AceError, match="call the whole model"):
        relaxed[0](torch.randn(4, 3))
