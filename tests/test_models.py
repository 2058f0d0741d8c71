"""The benchmark models: symmetries to rounding, and message passing against loops over the edges."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from e3nn import o3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.models import MODELS
from benchmarks.models.egnn import EGNN, EGNNLayer
from benchmarks.models.egno import EGNO, EGNOLayer, TemporalConv
from benchmarks.models.segnn import SEGNN, AttributeProduct, EdgeTensorProduct, Gate, SEGNNLayer, irreps, steerable

CASES = {
    "egnn": {"hidden": 8, "layers": 3},
    "segnn": {"features": 8, "layers": 2},
    "egno": {"hidden": 8, "layers": 2, "steps": 5},
}
D_H, D_E = 2, 1


@functools.cache
def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name].build(D_H, D_E, **CASES[name])
    # The initial weights of the position update are tiny, which would hide an error in it.
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def graphs(sizes: list[int], seed: int) -> dict[str, Tensor]:
    """Random directed graphs; every node but the last of a graph has an edge to its successor."""
    generator = torch.Generator().manual_seed(seed)
    edges, start = [], 0
    for size in sizes:
        pairs = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        different = pairs[:, 0] != pairs[:, 1]
        keep = (torch.rand(len(pairs), generator=generator) < 0.6) | (pairs[:, 1] == pairs[:, 0] + 1)
        edges.append(start + pairs[different & keep].T)
        start += size
    edge_index = torch.cat(edges, 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "pos": normal(start, 3),
        "vel": normal(start, 3),
        "h": normal(start, D_H),
        "edge_index": edge_index,
        "edge_attr": normal(edge_index.shape[1], D_E),
        "batch": torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
    }


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm() / expected.norm()) < tolerance


def rotation(seed: int, sign: float) -> Tensor:
    matrix, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return matrix * torch.sign(torch.linalg.det(matrix)) * sign


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4).filter(lambda value: max(value) > 1)
seeds = st.integers(0, 2**20)
every_model = pytest.mark.parametrize("name", list(CASES))
quick = settings(max_examples=15, deadline=None)


@every_model
@quick
@given(sizes=sizes, seed=seeds, sign=st.sampled_from([1.0, -1.0]), shift=st.floats(-10, 10))
@torch.no_grad()
def test_commutes_with_rotations_reflections_and_translations(name, sizes, seed, sign, shift):
    model, inputs = build(name), graphs(sizes, seed)
    matrix = rotation(seed, sign)
    translation = shift * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = dict(inputs, pos=inputs["pos"] @ matrix.T + translation, vel=inputs["vel"] @ matrix.T)
    assert_equal(model(**moved), model(**inputs) @ matrix.T + translation)


@every_model
@quick
@given(sizes=sizes, seed=seeds)
@torch.no_grad()
def test_commutes_with_node_permutations(name, sizes, seed):
    model, inputs = build(name), graphs(sizes, seed)
    generator, start, parts = torch.Generator().manual_seed(seed), 0, []
    for size in sizes:
        parts.append(start + torch.randperm(size, generator=generator))
        start += size
    order = torch.cat(parts)  # row k of the permuted graph is row order[k]
    place = torch.argsort(order)
    permuted = dict(inputs, edge_index=place[inputs["edge_index"]])
    permuted.update({key: inputs[key][order] for key in ("pos", "vel", "h")})
    assert_equal(model(**permuted), model(**inputs)[order])


@every_model
@quick
@given(sizes=sizes, seed=seeds)
@torch.no_grad()
def test_a_graph_does_not_see_the_rest_of_the_batch(name, sizes, seed):
    model, inputs = build(name), graphs(sizes, seed)
    together = model(**inputs)
    for index in range(len(sizes)):
        rows = torch.nonzero(inputs["batch"] == index)[:, 0]
        edges = torch.isin(inputs["edge_index"][0], rows)
        alone = model(
            pos=inputs["pos"][rows],
            vel=inputs["vel"][rows],
            h=inputs["h"][rows],
            edge_index=inputs["edge_index"][:, edges] - rows[0],
            edge_attr=inputs["edge_attr"][edges],
            batch=torch.zeros(len(rows), dtype=torch.long),
        )
        assert_equal(together[rows], alone)


@every_model
@torch.no_grad()
def test_reads_every_input(name):
    model, inputs = build(name), graphs([4, 5], 1)
    before = model(**inputs)
    for key in ("vel", "h", "edge_attr"):
        assert float((model(**dict(inputs, **{key: 1.5 * inputs[key]})) - before).abs().max()) > 1e-4


@every_model
def test_every_parameter_but_the_last_feature_update_gets_a_gradient(name):
    model = copy.deepcopy(build(name))
    model(**graphs([4, 5], 1)).square().sum().backward()
    without = {key.split(".", 2)[-1] for key, value in model.named_parameters() if value.grad is None}
    # Only positions are predicted, so the features the last EGNN step writes are read by nobody.
    assert all(key.split(".")[-3] == "feature" for key in without)


@torch.no_grad()
def test_egnn_layer_is_its_equations_edge_by_edge():
    torch.manual_seed(1)
    layer, inputs = EGNNLayer(hidden=6, edge_features=D_E).double(), graphs([5, 3], 2)
    torch.nn.init.normal_(layer.position[-1].weight)
    h = torch.randn(8, 6, dtype=torch.float64)
    pos, vel = inputs["pos"], inputs["vel"]
    new_h, new_pos = h.clone(), pos + layer.velocity(h) * vel
    collected, shifts = torch.zeros_like(h), [[] for _ in range(8)]
    # φ_e's first linear map on the concatenation (h_i, h_j, |x_ij|², a_ij).
    to_target, from_source = layer.message_node.weight.chunk(2, 0)
    first = torch.cat((to_target, from_source, layer.message_edge.weight), 1)
    for (j, i), attribute in zip(inputs["edge_index"].T.tolist(), inputs["edge_attr"], strict=True):
        x_ij = pos[i] - pos[j]
        joined = torch.cat((h[i], h[j], (x_ij @ x_ij)[None], attribute))
        hidden = torch.nn.functional.silu(first @ joined + layer.message_edge.bias)
        message = torch.nn.functional.silu(layer.message_out(hidden))
        collected[i] += message
        shifts[i].append(x_ij * layer.position(message))
    for i in range(8):
        new_h[i] = h[i] + layer.feature(torch.cat((h[i], collected[i])))
        if shifts[i]:
            new_pos[i] += sum(shifts[i]) / len(shifts[i])
    out_h, out_pos = layer(h, pos, vel, inputs["edge_index"], inputs["edge_attr"])
    assert_equal(out_h, new_h, 1e-12)
    assert_equal(out_pos, new_pos, 1e-12)


def fully_connected(product: EdgeTensorProduct, edge_scalars: int) -> o3.FullyConnectedTensorProduct:
    """e3nn's tensor product with the weights of ours."""
    m, n = product.multiplicity, 2 * product.multiplicity
    reference = o3.FullyConnectedTensorProduct(
        irreps(n + edge_scalars, n), "1x0e+1x1o", irreps(2 * m, m), path_normalization="none"
    ).double()
    w_s, w_v = product.scalar_weight.T[:, None], product.vector_weight.T[:, None]
    blocks = {
        (0, 0, 0): w_s[..., : 2 * m],
        (1, 1, 0): w_v[..., : 2 * m],
        (0, 1, 1): w_s[..., 2 * m :],
        (1, 0, 1): w_v[..., 2 * m :],
    }
    for instruction, view in zip(reference.instructions, reference.weight_views(), strict=True):
        view.data.copy_(blocks[instruction.i_in1, instruction.i_in2, instruction.i_out])
    return reference


def joined(m: int, left: Tensor, right: Tensor, scalars: Tensor) -> Tensor:
    return torch.cat((left[:m], right[:m], scalars, left[m:], right[m:]))


@torch.no_grad()
def test_edge_tensor_product_is_e3nn_s_edge_by_edge():
    torch.manual_seed(2)
    m, inputs = 3, graphs([4, 5], 3)
    product = EdgeTensorProduct(m, edge_scalars=2).double()
    reference = fully_connected(product, 2)
    edges = inputs["edge_index"]
    f = torch.randn(9, 4 * m, dtype=torch.float64)
    scalars = torch.randn(edges.shape[1], 2, dtype=torch.float64)
    attribute = steerable(torch.randn(edges.shape[1], 3, dtype=torch.float64))
    expected = torch.cat(
        [
            reference(joined(m, f[i], f[j], scalars[e])[None], attribute[e, None])
            for e, (j, i) in enumerate(edges.T.tolist())
        ]
    )
    assert_equal(product(f, scalars, edges, attribute), expected, 1e-12)


@torch.no_grad()
def test_segnn_layer_is_its_equations_edge_by_edge():
    torch.manual_seed(3)
    m, inputs = 3, graphs([4, 3], 4)
    layer = SEGNNLayer(m, edge_scalars=1).double()
    for module in layer.modules():
        if isinstance(module, Gate):
            module.bias.normal_()
    reference = fully_connected(layer.message_in, 1)
    f = torch.randn(7, 4 * m, dtype=torch.float64)
    edges, scalars = inputs["edge_index"], inputs["edge_attr"]
    edge_attribute = steerable(torch.randn(edges.shape[1], 3, dtype=torch.float64))
    node_attribute = steerable(torch.randn(7, 3, dtype=torch.float64))

    def gate(module: Gate, x: Tensor) -> Tensor:
        silu = torch.nn.functional.silu(x[:, :m] + module.bias[:m]) * module.scalar.cst
        sigmoid = torch.sigmoid(x[:, m : 2 * m] + module.bias[m:]) * module.gate.cst
        vectors = [sigmoid[:, [k]] * x[:, 2 * m + 3 * k : 2 * m + 3 * k + 3] for k in range(m)]
        return torch.cat((silu, *vectors), 1)

    collected = torch.zeros_like(f)
    for e, (j, i) in enumerate(edges.T.tolist()):
        attribute = edge_attribute[e, None]
        message = gate(layer.message_in_gate, reference(joined(m, f[i], f[j], scalars[e])[None], attribute))
        collected[i] += gate(layer.message_out_gate, layer.message_out(message, attribute))[0]
    expected = f.clone()
    for i in range(7):
        both = joined(m, f[i], collected[i], scalars.new_empty(0))[None]
        attribute = node_attribute[i, None]
        updated = gate(layer.update_gate, layer.update_in(both, attribute))
        expected[i] += layer.update_out(updated, attribute)[0]
    assert_equal(layer(f, node_attribute, edges, edge_attribute, scalars), expected, 1e-12)


@torch.no_grad()
def test_steerable_attributes_are_spherical_harmonics():
    vectors = torch.randn(20, 3, dtype=torch.float64)
    expected = o3.spherical_harmonics([0, 1], vectors, normalize=True, normalization="component")
    assert_equal(steerable(vectors), expected, 1e-12)


def slow_convolution(rows: Tensor, weight: Tensor, steps: int) -> Tensor:
    """The truncated Fourier sum written out; ``weight`` is (modes, c, c) complex."""
    frames = rows.unflatten(0, (steps, -1)).to(torch.complex128)
    out = torch.zeros_like(frames)
    for k in range(len(weight)):
        waves = [
            complex(math.cos(2 * math.pi * k * t / steps), -math.sin(2 * math.pi * k * t / steps)) for t in range(steps)
        ]
        mode = sum(wave * frame for wave, frame in zip(waves, frames, strict=True)) @ weight[k]
        if k == 0:
            mode = mode.real  # the inverse transform of a real signal drops the imaginary part of the mean
        alone = 1 if k == 0 or 2 * k == steps else 2  # the other modes come with their conjugate
        for t in range(steps):
            out[t] += alone * (waves[t].conjugate() * mode).real / steps
    return out.real.flatten(0, 1)


@pytest.mark.parametrize(("steps", "modes"), [(5, 2), (5, 3), (4, 2), (1, 1)])
@torch.no_grad()
def test_temporal_convolution_is_its_fourier_sum(steps, modes):
    torch.manual_seed(4)
    conv = TemporalConv(hidden=4, steps=steps, modes=modes).double()
    h = torch.randn(steps * 3, 4, dtype=torch.float64)
    pos, vel = torch.randn(2, steps * 3, 3, dtype=torch.float64)
    weight_h, weight_x = (torch.view_as_complex(w) for w in (conv.feature_weight, conv.vector_weight))
    expected_h = h + torch.nn.functional.silu(slow_convolution(h, weight_h, steps))
    pairs = torch.stack((pos, vel), 2)
    expected = pairs + slow_convolution(pairs, weight_x, steps)
    out_h, out_pos, out_vel = conv(h, pos, vel)
    assert_equal(out_h, expected_h, 1e-12)
    assert_equal(torch.stack((out_pos, out_vel), 2), expected, 1e-12)


def test_too_many_modes_are_refused():
    with pytest.raises(ValueError, match="modes is 4; 5 time steps have 1 to 3"):
        TemporalConv(hidden=4, steps=5, modes=4)


@torch.no_grad()
def test_egno_layer_runs_egnn_in_each_frame():
    torch.manual_seed(5)
    inputs, steps = graphs([4, 3], 6), 3
    layer = EGNOLayer(6, D_E, steps, 2).double()
    torch.nn.init.normal_(layer.spatial.position[-1].weight)
    h = torch.randn(steps * 7, 6, dtype=torch.float64)
    pos, vel = torch.randn(2, steps * 7, 3, dtype=torch.float64)
    edges = torch.cat([inputs["edge_index"] + 7 * t for t in range(steps)], 1)
    out = layer(h, pos, vel, edges, inputs["edge_attr"].repeat(steps, 1))
    h, pos, vel = layer.temporal(h, pos, vel)
    for t in range(steps):
        rows = slice(7 * t, 7 * t + 7)
        features, moved = layer.spatial(h[rows], pos[rows], vel[rows], inputs["edge_index"], inputs["edge_attr"])
        for actual, expected in zip(out, (features, moved, moved - pos[rows]), strict=True):
            assert_equal(actual[rows], expected, 1e-12)


@torch.no_grad()
def test_egno_frames_differ():
    model = build("egno")
    frames = model(**graphs([5], 7)).unbind(1)
    assert len(frames) == CASES["egno"]["steps"]
    assert all(float((frames[0] - frame).abs().max()) > 1e-3 for frame in frames[1:])


@pytest.mark.parametrize("name", list(CASES))
def test_entry_describes_the_calls_of_its_layers(name):
    """read_types and write_types have the widths of the node tensors that go in and out."""
    model, inputs, entry = build(name), graphs([4, 5], 8), MODELS[name]
    seen = []

    def record(layer, arguments, output):
        nodes = len(arguments[0])
        outputs = output if isinstance(output, tuple) else (output,)
        reads = [a for a in arguments if a.is_floating_point() and len(a) == nodes]
        assert all(len(out) == nodes for out in outputs)
        seen.append(
            (
                sum(a.shape[1] for a in reads) == o3.Irreps(entry.read_types(layer)).dim,
                sum(a.shape[1] for a in outputs) == o3.Irreps(entry.write_types(layer)).dim,
            )
        )

    for module in model.modules():
        if type(module).__name__ in entry.layers:
            module.register_forward_hook(record)
    model(**inputs)
    assert seen == [(True, True)] * CASES[name]["layers"]


@pytest.mark.parametrize(("model", "steps"), [(EGNN, None), (SEGNN, None), (EGNO, 5)])
@torch.no_grad()
def test_shapes_and_dtype(model, steps):
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in graphs([5, 5], 9).items()}
    out = model(D_H, D_E)(**inputs)
    assert out.shape == ((10, 3) if steps is None else (10, steps, 3))
    assert out.dtype == torch.float32


@quick
@given(st.tuples(*[st.integers(0, 4)] * 4).filter(lambda n: n[0] + n[1] and n[2] + n[3]), st.integers(0, 100))
def test_the_product_with_an_attribute_is_that_of_e3nn(sizes, seed):
    scalars, vectors, scalars_out, vectors_out = sizes
    torch.manual_seed(seed)
    product = AttributeProduct(irreps(scalars, vectors), irreps(scalars_out, vectors_out))
    features, attribute = torch.randn(3, scalars + 3 * vectors), steerable(torch.randn(3, 3))
    slow = o3.FullyConnectedTensorProduct.forward(product, features, attribute)
    torch.testing.assert_close(product(features, attribute), slow, rtol=1e-5, atol=1e-5)
