"""Models of escnn: images and fields on the plane, vectors without a base space."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("escnn")

from escnn import group, gspaces
from escnn import nn as enn

import ace
from ace.calls import parts_of, rebuild
from ace.errors import ConstraintNotMet
from ace.hosts.escnn import CHANNELS, moved
from ace.terms import START, matrix_of
from ace.testing import HostTests

pytestmark = pytest.mark.filterwarnings("ignore:`py3nj` package not found")
SIZE = 9


def images() -> torch.Tensor:
    return torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def scalar_field(space: gspaces.GSpace2D) -> enn.GeometricTensor:
    return enn.GeometricTensor(images(), enn.FieldType(space, [space.trivial_repr]))


class Classifier(enn.EquivariantModule):
    """Two convolutions with batch norm and ReLU, pooling over pixels and over the group, a linear head."""

    def __init__(self, space: gspaces.GSpace2D, fields: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.in_type = enn.FieldType(space, [space.trivial_repr])
        hidden = enn.FieldType(space, fields * [space.regular_repr])
        self.first = enn.SequentialModule(
            enn.R2Conv(self.in_type, hidden, kernel_size=3, padding=1, bias=False),
            enn.InnerBatchNorm(hidden),
            enn.ReLU(hidden, inplace=True),
        )
        self.second = enn.SequentialModule(
            enn.R2Conv(hidden, hidden, kernel_size=3, padding=1, bias=False),
            enn.InnerBatchNorm(hidden),
            enn.ReLU(hidden, inplace=True),
        )
        self.pool = enn.PointwiseAvgPool(hidden, 3)
        self.invariant = enn.GroupPooling(hidden)
        self.head = nn.Linear(fields, classes)

    def forward(self, x: enn.GeometricTensor) -> torch.Tensor:
        x = self.invariant(self.pool(self.second(self.first(x))))
        return self.head(x.tensor.mean((2, 3)))

    def evaluate_output_shape(self, input_shape):
        return input_shape[0], self.head.out_features


class ImageClassifier(Classifier):
    """The same, called with images as escnn's README does: the type is put on inside."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(enn.GeometricTensor(images, self.in_type))


class Segmentation(enn.SequentialModule):
    """From a field to a field: one scalar a pixel."""

    def __init__(self, space: gspaces.GSpace2D) -> None:
        scalar = enn.FieldType(space, [space.trivial_repr])
        hidden = enn.FieldType(space, 2 * [space.regular_repr])
        super().__init__(
            enn.R2Conv(scalar, hidden, kernel_size=3, padding=1),
            enn.ReLU(hidden),
            enn.R2Conv(hidden, scalar, kernel_size=3, padding=1),
        )


class Vectors(nn.Module):
    """An MLP on lists of vectors, equivariant to rotations."""

    def __init__(self) -> None:
        super().__init__()
        rotations = group.so3_group(1)
        space = gspaces.no_base_space(rotations)
        scalar, vector = rotations.irrep(0), rotations.irrep(1)
        self.in_type = enn.FieldType(space, 4 * [vector])
        hidden = enn.FieldType(space, 4 * [scalar] + 4 * [vector])
        self.first = enn.Linear(self.in_type, hidden)
        self.gate = enn.NormNonLinearity(hidden)
        self.last = enn.Linear(hidden, enn.FieldType(space, [vector]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.gate(self.first(enn.GeometricTensor(x, self.in_type)))).tensor


def rotations():
    return gspaces.rot2dOnR2(4)


def rotations_and_mirrors():
    return gspaces.flipRot2dOnR2(4)


# Models come after .train(), as in any training loop: only then has escnn dropped the filters of __init__ from the
# state dict.


class TestC4(HostTests):
    def model(self):
        return ImageClassifier(rotations()).train()

    def batch(self):
        return images()

    def symmetries(self):
        return [(ace.Cyclic(4), {"inputs": {"images": "image"}, "outputs": "scalar"})]


class TestD4(HostTests):
    def model(self):
        return Classifier(rotations_and_mirrors()).train()

    def batch(self):
        return scalar_field(rotations_and_mirrors())

    def symmetries(self):
        return [(ace.Dihedral(4), {"inputs": {"x": "image"}, "outputs": "scalar"})]


class TestFields(HostTests):
    def model(self):
        return Segmentation(rotations()).train()

    def batch(self):
        return scalar_field(rotations())

    def symmetries(self):
        return [(ace.Cyclic(4), {"inputs": {"input": "image"}, "outputs": {"tensor": "image"}})]


class TestVectors(HostTests):
    def model(self):
        return Vectors().train()

    def batch(self):
        return torch.randn(8, 12, generator=torch.Generator().manual_seed(0))

    def symmetries(self):
        return [(ace.SO3(), {"inputs": {"x": "4x1o"}, "outputs": "1x1o"})]


def quietly(relaxed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstraintNotMet)  # γ is 1 in here
        return ace.restore(relaxed)


def convolution(dimensions: int = 2, **options) -> nn.Module:
    space = gspaces.rot2dOnR2(4) if dimensions == 2 else gspaces.invOnR3()
    read = enn.FieldType(space, [space.trivial_repr, space.regular_repr])
    write = enn.FieldType(space, [space.regular_repr])
    kind = enn.R2Conv if dimensions == 2 else enn.R3Conv
    return kind(read, write, kernel_size=3, **options)


CONVOLUTIONS = [
    {},
    {"padding": 1},
    {"padding": 2, "stride": 2, "dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
]


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("name", ["linear", "spectral", "mlp"])
def test_term_is_an_ordinary_convolution(dimensions, options, name):
    layer = convolution(dimensions, **options).train()
    read, write = layer.in_type.size, layer.out_type.size
    x = layer.in_type(torch.randn(2, read, *[7] * dimensions))
    plain = layer(x).tensor
    ace.relax(layer, term=name)
    dense = layer.relaxation.eval().term.map
    ordinary = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(
        read, dense[0].out_features if name == "mlp" else write, **{"kernel_size": 3, **options, "bias": True}
    )
    first = dense[0] if name == "mlp" else dense
    weight = first.weight.detach()
    if name == "spectral":
        weight = weight / torch.linalg.matrix_norm(weight, ord=2)
    ordinary.weight.data = weight.reshape(ordinary.weight.shape)
    ordinary.bias.data = first.bias.detach()
    expected = ordinary(x.tensor)
    if name == "mlp":
        expected = torch.einsum("oi,bi...->bo...", dense[2].weight, nn.functional.silu(expected))
        expected = expected + dense[2].bias.view(-1, *[1] * dimensions)
    result = layer(x)
    assert result.type == layer.out_type
    torch.testing.assert_close(result.tensor - plain, expected, rtol=1e-4, atol=1e-5)


def test_term_of_low_rank():
    layer = convolution(padding=1).train()
    x = layer.in_type(torch.randn(2, layer.in_type.size, 7, 7))
    plain = layer(x).tensor
    narrow, wide = ace.relax(layer, rank=2).relaxation.term.map
    kernel = (wide.weight @ narrow.weight).reshape(layer.out_type.size, layer.in_type.size, 3, 3)
    assert torch.linalg.matrix_rank(kernel.flatten(1)) == 2
    expected = plain + nn.functional.conv2d(x.tensor, kernel, wide.bias, padding=1)
    torch.testing.assert_close(layer(x).tensor, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "dilation": 2, "padding_mode": "circular"}])
@pytest.mark.parametrize("sizes", [(16, 16), (1, 16), (16, 1)])
def test_term_of_a_wide_convolution_is_a_bottleneck_that_breaks_every_turn(options, sizes):
    space = gspaces.rot2dOnR2(4)
    reads, fields = (enn.FieldType(space, count * [space.regular_repr]) for count in sizes)
    layer = enn.R2Conv(reads, fields, kernel_size=3, **options).train()
    x = reads(torch.randn(2, reads.size, 9, 9))
    term = ace.relax(layer).relaxation.term
    assert sum(p.numel() for p in term.parameters()) < 9 * reads.size * fields.size
    assert len(term.map) == sum(4 * count > CHANNELS for count in sizes) + 1
    kernel = matrix_of(term).unflatten(1, (reads.size, 3, 3))
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    expected = nn.functional.conv2d(
        x.tensor, kernel, term.map[-1].bias, stride=layer.stride, dilation=layer.dilation, padding=padding
    )
    torch.testing.assert_close(term(x)["tensor"], expected, rtol=1e-4, atol=1e-5)
    for turn in (1, 2, 3):
        turned = space.fibergroup.element(turn)
        there = enn.GeometricTensor(term(x)["tensor"], fields).transform(turned).tensor
        here = term(x.transform(turned))["tensor"]
        assert (here - there).norm() > 0.3 * here.norm()


def test_term_starts_small():
    layer = ace.relax(convolution())
    fan_in = layer.in_type.size * 9
    assert float(layer.relaxation.term.map.weight.detach().abs().max()) <= START / fan_in**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_container_is_looked_into_and_moved(dtype):
    for space, turned in ((rotations(), True), (rotations_and_mirrors(), True), (gspaces.trivialOnR2(), False)):
        kind = enn.FieldType(space, [space.regular_repr])
        value = kind(torch.randn(2, kind.size, 5, 5, dtype=dtype))
        doubled = rebuild(value, {**parts_of(value), "tensor": 2 * value.tensor})
        assert doubled.type == kind
        assert torch.equal(doubled.tensor, 2 * value.tensor)
        other = moved(value)
        assert other.type == kind
        assert other.tensor.dtype == dtype
        torch.testing.assert_close(other.tensor.norm(), value.tensor.norm())
        assert torch.allclose(other.tensor, value.tensor) is not turned


def test_points_keep_their_coordinates():
    space = rotations()
    value = enn.GeometricTensor(torch.randn(6, 1), enn.FieldType(space, [space.trivial_repr]), torch.randn(6, 2))
    assert list(parts_of(value)) == ["tensor", "coords"]
    again = rebuild(value, {"tensor": value.tensor, "coords": -value.coords})
    assert torch.equal(again.coords, -value.coords)
    torch.testing.assert_close(moved(value).coords.norm(), value.coords.norm())


@pytest.mark.parametrize("make", [lambda: Segmentation(rotations()), lambda: Segmentation(rotations_and_mirrors())])
def test_a_restored_model_is_exported(make):
    torch.manual_seed(0)
    model = make().train()
    x = model.in_type(images())
    relaxed = ace.relax(model, example=x)
    assert list(ace.relaxations(relaxed)) == ["0", "2"]
    exported = quietly(relaxed).export()
    assert not any(isinstance(module, enn.EquivariantModule | ace.Relaxation) for module in exported.modules())
    torch.testing.assert_close(exported(x.tensor), model(x).tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_relaxing_leaves_the_mode_and_the_state_dict(training):
    model = Segmentation(rotations()).train()
    with torch.no_grad():
        model.train(training)
    keys, x = list(model.state_dict()), model.in_type(images())
    relaxed = ace.relax(model, example=x)
    ace.summary(relaxed, example=x)
    ace.projection_gap(relaxed, x)
    ace.equivariance_error(relaxed, x, ace.Cyclic(4), inputs={"input": "image"}, outputs={"tensor": "image"})
    assert list(ace.base_state_dict(relaxed)) == keys
    assert all(module.training is training for module in relaxed.modules())
    with torch.no_grad():
        model[0].weights.mul_(2)
    relaxed.train().eval()
    assert torch.equal(model[0].filter, model[0].expand_parameters()[0])


@pytest.mark.parametrize("host", [TestC4, TestVectors])
def test_weights_kept_in_eval_mode_carry_no_graph(host):
    model, x = host().model(), host().batch()
    with torch.no_grad():
        model.eval()
    relaxed = ace.relax(model, example=x)
    ace.summary(relaxed, example=x)
    copy.deepcopy(relaxed)
    for _ in range(2):
        relaxed(x).sum().backward()
    assert not any(buffer.requires_grad for buffer in relaxed.buffers())


def test_two_models_share_the_basis_and_nothing_else():
    one, other = Segmentation(rotations()).train(), Segmentation(rotations()).train()
    x = one.in_type(images())
    before = other(x).tensor
    types = {"inputs": {"input": "image"}, "outputs": {"tensor": "image"}}
    ace.relax(one, example=x)
    assert ace.equivariance_error(one, x, ace.Cyclic(4), dtype=torch.float64, **types).max > 1e-3
    quietly(one)
    assert ace.equivariance_error(one, x, ace.Cyclic(4), **types).max < 1e-5
    assert torch.equal(other(x).tensor, before)
