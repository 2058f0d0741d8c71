"""Layers of e3nn and torch-geometric: the term that each gets, and the way back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from torch import nn
from torch_geometric.nn import GCNConv, MessagePassing, PointNetConv

import ace
from ace.errors import ConstraintNotMet, NoLayerMatched
from ace.metrics import equivariance_error
from ace.terms import DenseTerm

IN, SH, OUT = o3.Irreps("4x0e+2x1o"), o3.Irreps("1x0e+1x1o"), o3.Irreps("3x0e+2x1o+1x1e")


class Steerable(nn.Module):
    """The layers of a steerable network."""

    def __init__(self):
        super().__init__()
        self.linear = o3.Linear(IN, IN)
        self.product = o3.FullyConnectedTensorProduct(IN, SH, OUT)
        self.norm = e3nn_nn.BatchNorm(OUT, affine=True)

    def forward(self, x, y):
        return self.norm(self.product(self.linear(x), y))


@pytest.fixture(autouse=True)
def _float64(float64):
    """Everything here is exact."""


def example():
    return IN.randn(7, -1), SH.randn(7, -1)


def quietly(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)
        return ace.restore(model, **kwargs)


def test_e3nn_layers_are_known_without_an_example():
    relaxed = ace.relax(Steerable())
    assert list(ace.relaxations(relaxed)) == ["linear", "product"]
    linear, product = (relaxation.term for relaxation in ace.relaxations(relaxed).values())
    assert [(p.index, p.width) for p in linear.reads] == [(0, IN.dim)]
    assert [(p.index, p.width) for p in product.reads] == [(0, IN.dim), (1, SH.dim)]
    assert product.map.in_features == IN.dim + SH.dim
    assert product.map.out_features == OUT.dim
    x, y = example()
    assert relaxed(x, y).shape == (7, OUT.dim)


@pytest.mark.parametrize("name", ["linear", "product"])
def test_e3nn_layer_at_intermediate_gamma(name):
    model = Steerable()
    layer = getattr(model, name)
    inputs = example() if name == "product" else example()[:1]
    plain = layer(*inputs)
    ace.relax(model)
    with torch.no_grad():
        layer.relaxation.gamma.fill_(0.4)
    expected = plain + 0.4 * layer.relaxation.term.map(torch.cat(inputs, -1))
    torch.testing.assert_close(layer(*inputs), expected, rtol=0, atol=1e-14)


def test_tensor_product_with_external_weights():
    product = o3.FullyConnectedTensorProduct(IN, SH, OUT, shared_weights=False, internal_weights=False)
    x, y = example()
    weight = torch.randn(7, product.weight_numel)
    plain = product(x, y, weight)
    relaxed = ace.relax(product)
    term = relaxed.relaxation.term
    torch.testing.assert_close(relaxed(x, y, weight), plain + term.map(torch.cat((x, y), -1)))
    torch.testing.assert_close(relaxed(x, y, weight=weight), relaxed(x, y, weight))


@pytest.mark.parametrize(
    "make",
    [
        lambda: o3.FullTensorProduct(IN, SH),
        lambda: o3.ElementwiseTensorProduct("2x0e+1x1o", "2x0e+1x1o"),
        lambda: o3.TensorSquare("2x0e+1x1o"),
    ],
    ids=["full", "elementwise", "square"],
)
def test_other_tensor_products_are_subclasses(make):
    product = make()
    square = isinstance(product, o3.TensorSquare)
    irreps = [product.irreps_in] if square else [product.irreps_in1, product.irreps_in2]
    inputs = [factor.randn(5, -1) for factor in irreps]
    plain = product(*inputs)
    relaxed = ace.relax(product)
    torch.testing.assert_close(relaxed(*inputs), plain + relaxed.relaxation.term.map(torch.cat(inputs, -1)))


@pytest.mark.parametrize("copying", ["same", "deepcopy", "pickle"])
def test_e3nn_models_come_back_equivariant(copying):
    model = Steerable().eval()
    x, y = example()
    plain, keys = model(x, y), list(model.state_dict())
    types = {"inputs": {0: str(IN), 1: str(SH)}, "outputs": str(OUT)}
    relaxed = ace.relax(model)
    assert equivariance_error(relaxed, (x, y), ace.O3(), **types).max > 1e-2
    if copying != "same":
        relaxed = copy.deepcopy(relaxed) if copying == "deepcopy" else pickle.loads(pickle.dumps(relaxed))
    result = quietly(relaxed)
    assert list(result.state_dict()) == keys
    assert torch.equal(result(x, y), plain)
    assert equivariance_error(result, (x, y), ace.O3(), **types).max <= 1e-11


def test_e3nn_batchnorm_is_recalibrated():
    model = Steerable()
    data = [example() for _ in range(4)]
    ace.relax(model)
    for batch in data:
        model(*batch)
    quietly(model, recalibrate=data)
    scalars = [model.product(model.linear(x), y)[:, :3] for x, y in data]
    means = torch.stack([value.mean(0) for value in scalars]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, means.detach())


class ToTensor(MessagePassing):
    """Sums of a function of both ends."""

    def __init__(self, width):
        super().__init__(aggr="add")
        self.dense = nn.Linear(2 * width, width)

    def forward(self, x, edge_index):
        return self.propagate(edge_index, x=x)

    def message(self, x_i, x_j):
        return self.dense(torch.cat((x_i, x_j), -1)).tanh()


class ToTuple(MessagePassing):
    """Features and positions, invariant and equivariant."""

    def __init__(self, width):
        super().__init__(aggr="mean")
        self.dense = nn.Linear(width + 1, width)
        self.scale = nn.Linear(width + 1, 1)

    def forward(self, x, pos, edge_index):
        relative = pos[edge_index[0]] - pos[edge_index[1]]
        length = relative.norm(dim=-1, keepdim=True)
        both = self.propagate(edge_index, x=x, length=length, relative=relative)
        return x + both[:, : x.shape[1]], pos + both[:, x.shape[1] :]

    def message(self, x_j, length, relative):
        inputs = torch.cat((x_j, length), -1)
        return torch.cat((self.dense(inputs).tanh(), relative * self.scale(inputs)), -1)


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = ToTensor(4), ToTuple(4)

    def forward(self, x, pos, edge_index):
        return self.second(self.first(x, edge_index), pos, edge_index)


def graph():
    edge_index = torch.tensor([[i, j] for i in range(6) for j in range(6) if (i + j) % 3 and i != j]).T
    return torch.randn(6, 4), torch.randn(6, 3), edge_index


def test_message_passing_to_a_tensor_and_to_a_tuple():
    model, inputs = Graph(), graph()
    x, pos, edge_index = inputs
    first = model.first(x, edge_index)
    relaxed = ace.relax(model, example=inputs)  # found by default, subclasses included
    assert list(ace.relaxations(relaxed)) == ["first", "second"]
    one, two = (relaxation.term for relaxation in ace.relaxations(relaxed).values())
    assert isinstance(one, DenseTerm)
    assert one.positions is not None  # the first layer sees only invariants
    assert [(port.name, port.width) for port in two.reads] == [("x", 4), ("pos", 3)]
    assert [(write.key, write.width) for write in two.writes] == [(0, 4), (1, 3)]
    features, positions = relaxed(*inputs)
    hidden = model.first(x, edge_index)
    torch.testing.assert_close(hidden, first + one.map(torch.cat((x, pos), -1)))
    with ace.restored(relaxed):
        plain_features, plain_positions = model.second(hidden, pos, edge_index)
    change = two.map(torch.cat((hidden, pos), -1))
    torch.testing.assert_close(features, plain_features + change[:, :4])
    torch.testing.assert_close(positions, plain_positions + change[:, 4:])


@pytest.mark.parametrize("copying", ["same", "deepcopy", "pickle"])
def test_message_passing_comes_back_equivariant(copying):
    model, inputs = Graph(), graph()
    plain, keys = model(*inputs), list(model.state_dict())
    types = {"inputs": {"x": "scalar", "pos": "position"}, "outputs": ("scalar", "position")}
    relaxed = ace.relax(model, example=inputs)
    assert equivariance_error(relaxed, inputs, ace.E3(), **types).max > 1e-2
    if copying != "same":
        relaxed = copy.deepcopy(relaxed) if copying == "deepcopy" else pickle.loads(pickle.dumps(relaxed))
    result = quietly(relaxed)
    assert list(result.state_dict()) == keys
    found = result(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert equivariance_error(result, inputs, ace.E3(), **types).max <= 1e-11


def test_layers_that_torch_geometric_ships():
    x, pos, edge_index = graph()
    convolution = GCNConv(4, 5)
    plain = convolution(x, edge_index)
    relaxed = ace.relax(convolution, example=(x, edge_index))
    torch.testing.assert_close(relaxed(x, edge_index), plain + relaxed.relaxation.term.map(x))
    point = PointNetConv(nn.Linear(7, 5))
    relaxed = ace.relax(point, example={"x": x, "pos": pos, "edge_index": edge_index}, exclude="^local_nn$")
    assert relaxed.relaxation.term.map.in_features == 7
    assert relaxed(x, pos, edge_index).shape == (6, 5)


def test_default_layers_of_a_model_without_any():
    with pytest.raises(NoLayerMatched, match=r"MessagePassing.*pass example="):
        ace.relax(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NoLayerMatched, match="no layer with parameters ran"):
        ace.relax(nn.Sequential(nn.ReLU()), example=torch.zeros(1, 2))
