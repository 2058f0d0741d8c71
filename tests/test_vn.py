"""Vector neurons: symmetries to rounding, and each layer against its equations one vector at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.models.vn import (
    EPS,
    VNDGCNN,
    EdgeConv,
    VNBatchNorm,
    VNBlock,
    VNLeakyReLU,
    VNLinear,
    VNMaxPool,
    VNMeanPool,
    VNPointNet,
    VNStdFeature,
    edge_features,
)

C = 5
POINTWISE = {
    "linear": lambda: VNLinear(C, 4),
    "leaky relu": lambda: VNLeakyReLU(C),
    "relu": lambda: VNLeakyReLU(C, slope=0.0),
    "batch norm": lambda: VNBatchNorm(C),
    "block": lambda: VNBlock(C, 4),
}
POOLS = {"max": lambda: VNMaxPool(C), "mean": VNMeanPool}
MODELS = {
    "pointnet": lambda **options: VNPointNet(classes=4, width=3, k=4, **options),
    "dgcnn": lambda **options: VNDGCNN(classes=4, width=3, k=4, layers=2, **options),
}


def build(make, seed: int = 0, **options) -> nn.Module:
    """A module in float64 with no parameter or statistic at a value that hides a mistake."""
    torch.manual_seed(seed)
    module = make(**options).double()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.uniform_(0.5, 1.5)
            part.running_mean.uniform_(0.5, 1.5)
            part.running_var.uniform_(0.5, 1.5)
        elif isinstance(part, nn.Linear) and part.bias is not None:
            part.bias.data.zero_()  # scores of the bias alone would make any error look small
    return module


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, sign: float) -> Tensor:
    matrix, _ = torch.linalg.qr(vectors(3, 3, seed=seed))
    return matrix * torch.sign(torch.linalg.det(matrix)) * sign


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("vw,bcw...->bcv...", matrix, x)


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


def order(seed: int, size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 2**20)
signs = st.sampled_from([1.0, -1.0])
axes = st.lists(st.integers(1, 5), max_size=2).map(tuple)
quick = settings(max_examples=15, deadline=None)
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("name", POINTWISE)
@quick
@given(axes=axes, seed=seeds, sign=signs, training=st.booleans())
@torch.no_grad()
def test_layers_commute_with_rotations_reflections_and_permutations(name, axes, seed, sign, training):
    layer, x, matrix = (
        build(POINTWISE[name]).train(training),
        vectors(3, C, 3, *axes, seed=seed),
        orthogonal(seed, sign),
    )
    plain = layer(x)
    assert_equal(layer(turned(x, matrix)), turned(plain, matrix))
    for axis in range(3, x.ndim):
        mixed = order(seed, x.shape[axis])
        assert_equal(layer(x.index_select(axis, mixed)), plain.index_select(axis, mixed))


@pytest.mark.parametrize("name", POOLS)
@quick
@given(axes=axes, size=st.integers(1, 6), seed=seeds, sign=signs)
@torch.no_grad()
def test_pools_commute_with_rotations_and_reflections_and_ignore_the_order(name, axes, size, seed, sign):
    pool, x, matrix = build(POOLS[name]), vectors(2, C, 3, *axes, size, seed=seed), orthogonal(seed, sign)
    plain = pool(x)
    assert plain.shape == x.shape[:-1]
    assert_equal(pool(turned(x, matrix)), turned(plain, matrix))
    assert_equal(pool(x[..., order(seed, size)]), plain)


@quick
@given(axes=axes, seed=seeds, sign=signs)
@torch.no_grad()
def test_invariant_features_are_invariant(axes, seed, sign):
    layer, x = build(lambda: VNStdFeature(C)), vectors(3, C, 3, *axes, seed=seed)
    assert_equal(layer(turned(x, orthogonal(seed, sign))), layer(x), 1e-11)


@every_model
@pytest.mark.parametrize("pool", POOLS)
@quick
@given(points=st.integers(2, 9), seed=seeds, sign=signs, cross=st.booleans(), training=st.booleans())
@torch.no_grad()
def test_models_are_invariant(name, pool, points, seed, sign, cross, training):
    model, x = build(MODELS[name], cross=cross, pool=pool).train(training), vectors(2, points, 3, seed=seed)
    plain, matrix = model(x), orthogonal(seed, 1.0 if cross else sign)
    assert plain.shape == (2, 4)
    assert_equal(model(x @ matrix.T), plain, 1e-10)
    assert_equal(model(x[:, order(seed, points)]), plain, 1e-10)


@every_model
@torch.no_grad()
def test_cross_products_tell_a_cloud_from_its_mirror_image(name):
    x = vectors(2, 8, 3)
    for cross in (True, False):
        model = build(MODELS[name], cross=cross).eval()
        apart = float((model(-x) - model(x)).norm() / model(x).norm())
        assert apart > 0.01 if cross else apart < 1e-12


@every_model
@torch.no_grad()
def test_clouds_of_a_batch_do_not_see_each_other(name):
    model, x = build(MODELS[name]).eval(), vectors(3, 8, 3)
    together = model(x)
    for index in range(3):
        assert_equal(model(x[index : index + 1]), together[index : index + 1])
    assert float((together[0] - together[1]).norm() / together.norm()) > 0.01


@every_model
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cloud", ["random", "coincident", "zero", "few"])
def test_gradients_are_finite(name, pool, dtype, cloud):
    model = build(MODELS[name], pool=pool).to(dtype)
    x = vectors(2, 2 if cloud == "few" else 8, 3).to(dtype)
    if cloud == "coincident":
        x = x[:, [0, 0, 0, 1, 1, 2, 2, 2]]
    x = (x * (cloud != "zero")).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad.isfinite().all()
    for key, parameter in model.named_parameters():
        if "pool.direction" in key:
            assert parameter.grad is None  # no gradient passes an argmax
        else:
            assert parameter.grad.isfinite().all()
            assert bool(parameter.grad.any()) or cloud == "zero"


@torch.no_grad()
def test_linear_is_its_sum():
    layer, x = build(lambda: VNLinear(C, 4)), vectors(2, C, 3, 6)
    expected = torch.zeros(2, 4, 3, 6, dtype=torch.float64)
    for out in range(4):
        for c in range(C):
            expected[:, out] += layer.map.weight[out, c] * x[:, c]
    assert_equal(layer(x), expected, 1e-14)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@torch.no_grad()
def test_leaky_relu_is_its_equation_vector_by_vector(slope):
    layer, x = build(lambda: VNLeakyReLU(C, slope)), vectors(2, C, 3, 6)
    k, out, cut = layer.direction(x), layer(x), 0
    for b in range(2):
        for c in range(C):
            for n in range(6):
                v, direction = x[b, c, :, n], k[b, c, :, n]
                along = float(v @ direction)
                relu = v
                if along < 0:
                    cut += 1
                    relu = v - along / float(direction @ direction + EPS) * direction
                    assert abs(float(relu @ direction)) < 1e-4 * float(v.norm() * direction.norm())  # VN-ReLU projects
                assert_equal(out[b, c, :, n], slope * v + (1 - slope) * relu)
    assert 0 < cut < 2 * C * 6


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_batch_norm_is_its_equation_channel_by_channel(training):
    layer, x = build(lambda: VNBatchNorm(C)).train(training), vectors(2, C, 3, 4, 3)
    norm = layer.norm
    means, variances = norm.running_mean.clone(), norm.running_var.clone()
    out = layer(x)
    for c in range(C):
        lengths = (x[:, c].square().sum(1) + EPS).sqrt()
        mean, variance = (lengths.mean(), lengths.var(unbiased=False)) if training else (means[c], variances[c])
        normed = (lengths - mean) / math.sqrt(float(variance) + norm.eps) * norm.weight[c] + norm.bias[c]
        assert_equal(out[:, c], x[:, c] / lengths[:, None] * normed[:, None])


@torch.no_grad()
def test_max_pool_picks_the_furthest_along_its_direction():
    pool, x = build(lambda: VNMaxPool(C)), vectors(2, C, 3, 4, 6)
    out, picked = pool(x), set()
    for b in range(2):
        for c in range(C):
            for n in range(4):
                scores = [float(x[b, c, :, n, j] @ (pool.direction.map.weight[c] @ x[b, :, :, n, j])) for j in range(6)]
                best = max(range(6), key=scores.__getitem__)
                picked.add(best)
                assert torch.equal(out[b, c, :, n], x[b, c, :, n, best])
    assert len(picked) > 1


@torch.no_grad()
def test_invariant_features_are_coordinates_in_the_frame():
    layer, x = build(lambda: VNStdFeature(C)).eval(), vectors(2, C, 3, 6)
    frame, out = layer.frame(x), layer(x)
    for b in range(2):
        for n in range(6):
            assert_equal(out[b, :, :, n], x[b, :, :, n] @ frame[b, :, :, n].T)


@pytest.mark.parametrize("cross", [True, False])
@torch.no_grad()
def test_edge_features_are_those_of_the_nearest_points(cross):
    x, k = vectors(2, C, 3, 7), 3
    out = edge_features(x, k, cross)
    assert out.shape == (2, (3 if cross else 2) * C, 3, 7, k)
    for b in range(2):
        for i in range(7):
            own = x[b, :, :, i]
            nearest = sorted(range(7), key=lambda j: float((x[b, :, :, j] - own).square().sum()))[:k]
            assert nearest[0] == i
            for place, j in enumerate(nearest):
                other = x[b, :, :, j]
                parts = [other - own, own]
                if cross:
                    parts.append(torch.stack([torch.linalg.cross(other[c], own[c]) for c in range(C)]))
                assert torch.equal(out[b, :, :, i, place], torch.cat(parts))


@torch.no_grad()
def test_edge_convolution_takes_all_points_where_there_are_few():
    layer = build(lambda: EdgeConv(2, 4, k=20)).eval()
    x = vectors(2, 2, 3, 5)
    assert_equal(layer(x), layer.block(edge_features(x, 5, cross=False)).mean(-1))
