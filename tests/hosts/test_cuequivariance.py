"""Layers of cuequivariance-torch, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("cuequivariance_torch")

import cuequivariance as cue
import cuequivariance_torch as cuet

import ace
from ace.testing import HostTests


def irreps(text):
    return cue.Irreps("O3", text)


class Network(nn.Module):
    """A message of each point's features and of its position's harmonics, and a reading of scalars and vectors."""

    def __init__(self):
        super().__init__()
        hidden, harmonics = irreps("8x0e + 8x1o"), irreps("0e + 1o + 2e")
        options = {"layout": cue.mul_ir, "method": "naive"}
        self.embed = cuet.Linear(irreps("4x0e + 2x1o"), hidden, **options)
        self.harmonics = cuet.SphericalHarmonics([0, 1, 2], normalize=True, method="naive")
        self.channelwise = cuet.ChannelWiseTensorProduct(
            hidden, harmonics, list(hidden), shared_weights=True, internal_weights=True, **options
        )
        self.collect = cuet.Linear(self.channelwise.irreps_out, hidden, **options)
        self.product = cuet.FullyConnectedTensorProduct(hidden, hidden, hidden, **options)
        self.read = cuet.Linear(hidden, irreps("0e + 1o"), **options)

    def forward(self, x, direction):
        x = self.embed(x)
        x = x + self.collect(self.channelwise(x, self.harmonics(direction)))
        return self.read(x + self.product(x, x))


class TestNetwork(HostTests):
    def model(self):
        return Network()

    def batch(self):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(7, 10, generator=generator), torch.randn(7, 3, generator=generator)

    def symmetries(self):
        inputs = {"x": "4x0e+2x1o", "direction": "vector"}
        return [(ace.O3(), {"inputs": inputs, "outputs": "1x0e+1x1o"})]


def test_layers_know_their_sizes():
    relaxed = ace.relax(Network())  # no example
    terms = {path: relaxation.term for path, relaxation in ace.relaxations(relaxed).items()}
    assert list(terms) == ["embed", "channelwise", "collect", "product", "read"]
    assert terms["channelwise"].map.in_features == 32 + 9
    x, direction = TestNetwork().batch()
    assert relaxed(x, direction).shape == (7, 4)


class Convolution(nn.Module):
    """Messages whose weights come from elsewhere, gathered from the nodes or not, and summed at the nodes or not."""

    def __init__(self, gather):
        super().__init__()
        self.gather = gather
        self.product = cuet.ChannelWiseTensorProduct(
            irreps("4x0e + 4x1o"), irreps("0e + 1o"), layout=cue.mul_ir, shared_weights=False, method="naive"
        )
        self.radial = nn.Linear(1, self.product.weight_numel)

    def forward(self, x, y, length, source, target):
        weight = self.radial(length)
        if self.gather:
            return self.product(x, y, weight, indices_1=source, indices_out=target, size_out=len(x))
        return self.product(x[source], y, weight)


@pytest.mark.parametrize("gather", [False, True])
def test_weights_from_elsewhere_are_not_read(gather):
    model = Convolution(gather)
    source, target = (1 - torch.eye(5)).nonzero().T
    inputs = (torch.randn(5, 16), torch.randn(20, 4), torch.rand(20, 1), source, target)
    plain = model(*inputs)
    relaxed = ace.relax(model, layers=cuet.ChannelWiseTensorProduct, example=inputs)
    term = relaxed.product.relaxation.term
    expected = torch.cat((inputs[0][source], inputs[1]), -1) if not gather else inputs[0]
    torch.testing.assert_close(relaxed(*inputs), plain + term.map(expected))
