"""Equivariance error and Lie derivative: closed forms, finite differences, real e3nn and PyG models, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ace.errors import AceError, ShapeMismatch
from ace.groups import E3, O3, SO2, SO3, Cyclic, Dihedral, Group, Permutations, act, act_generator
from ace.metrics import ErrorReport, equivariance_error, lie_derivative
from ace.probing import default_dtype

# torch's and e3nn's own use of torch.jit.script, which torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

GEOMETRIC = [SO2(), SO3(), O3(), E3(), Cyclic(5), Dihedral(3)]
F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Pairwise(nn.Module):
    """An E(3)- and permutation-equivariant layer on a complete graph, with a dose of broken symmetry."""

    def __init__(self, broken: float = 0.0) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 1)).to(F64)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=number))
        self.broken = broken

    def forward(self, pos: Tensor, h: Tensor, edge_index: Tensor) -> dict[str, Tensor]:
        source, target = edge_index
        apart = pos[source] - pos[target]
        weight = self.mix(
            torch.cat([apart.square().sum(-1, keepdim=True), h[source] + h[target], h[source] * h[target]], -1)
        )
        force = torch.zeros_like(pos).index_add(0, target, apart * weight)
        force = force + self.broken * pos.square()
        energy = h + torch.zeros_like(h).index_add(0, target, weight)
        return {"pos": pos + force, "forces": force, "energy": energy}


def graph(nodes: int = 5) -> dict[str, Tensor]:
    source, target = torch.meshgrid(torch.arange(nodes), torch.arange(nodes), indexing="ij")
    edges = torch.stack([source.flatten(), target.flatten()])[:, source.flatten() != target.flatten()]
    return {"pos": normal(nodes, 3), "h": normal(nodes, 1, seed=1), "edge_index": edges}


OUTPUTS = {"pos": "position", "forces": "vector", "energy": "scalar"}


# ---------------------------------------------------------------- zero for equivariant functions


@pytest.mark.parametrize("group", [*GEOMETRIC, Permutations()], ids=str)
def test_equivariant_model_has_no_error(group: Group) -> None:
    report = equivariance_error(Pairwise(), graph(), group)
    assert report.max < 1e-12
    assert equivariance_error(Pairwise(0.3), graph(), SO2()).mean > 1e-3


@pytest.mark.parametrize("group", [SO2(), SO3(), O3(), E3()], ids=str)
def test_equivariant_model_has_no_lie_derivative(group: Group) -> None:
    assert lie_derivative(Pairwise(), graph(), group).max < 1e-12
    assert lie_derivative(Pairwise(0.3), graph(), group).max > 1e-3


def test_reflections_are_seen() -> None:
    def cross(x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.cross(x, y)

    batch, types = (normal(9, 3), normal(9, 3, seed=1)), {"x": "vector", 1: "vector"}
    assert equivariance_error(cross, batch, SO3(), inputs=types, outputs="vector").max < 1e-12
    assert equivariance_error(cross, batch, O3(), inputs=types, outputs="pseudovector").max < 1e-12
    as_vector = equivariance_error(cross, batch, O3(), inputs=types, outputs="vector", elements=32)
    assert sorted({round(error, 9) for error in as_vector.samples}) == [0.0, 2.0]  # a mirror flips the sign


def test_translations_are_seen() -> None:
    def centred(pos: Tensor) -> Tensor:
        return pos - pos.mean(0)

    x = normal(6, 3)
    assert equivariance_error(centred, x, E3(100.0), outputs="vector").max < 1e-12
    [g] = E3(2.0).sample(1, seed=9)
    report = equivariance_error(centred, x, E3(2.0), outputs="position", elements=1, seed=9)
    expected = math.sqrt(6) * float(g.translation.norm() / centred(x).norm())
    assert float(report) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- closed forms


@given(st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_error_of_a_linear_map_is_its_commutator(seed: int) -> None:
    """f(x) = W x on the orthonormal batch x = I: the error is ‖W g - g W‖_F / ‖W‖_F."""
    weight = normal(3, 3, seed=seed)
    report = equivariance_error(
        lambda x: x @ weight.T, torch.eye(3, dtype=F64), SO3(), inputs={0: "vector"}, outputs="vector", seed=seed
    )
    for g, error in zip(SO3().sample(8, seed), report.samples, strict=True):
        commutator = weight @ g.matrix - g.matrix @ weight
        assert error == pytest.approx(float(commutator.norm() / weight.norm()), rel=1e-10)
    assert report.mean == pytest.approx(sum(report.samples) / 8)
    assert report.max == max(report.samples)


def test_error_of_a_projection_in_the_mean() -> None:
    """f(x) = P x keeps the first axis: E‖Pg - gP‖² = 2 - 2 E[g_11²] = 4/3, and ‖P‖ = 1."""
    report = equivariance_error(
        lambda x: x * torch.tensor([1.0, 0.0, 0.0]),
        torch.eye(3, dtype=F64),
        SO3(),
        inputs={"x": "vector"},
        outputs="vector",
        elements=2000,
    )
    assert sum(error**2 for error in report.samples) / 2000 == pytest.approx(4 / 3, abs=0.06)


def test_lie_derivative_of_a_linear_map_is_its_commutator() -> None:
    weight = normal(3, 3)
    report = lie_derivative(lambda x: x @ weight.T, torch.eye(3, dtype=F64), SO3(), inputs={0: "1o"}, outputs="vector")
    for generator, error in zip(SO3().generators(), report.samples, strict=True):
        commutator = weight @ generator.matrix - generator.matrix @ weight
        assert error == pytest.approx(float(commutator.norm() / weight.norm()), rel=1e-12)


@pytest.mark.parametrize("group", [SO3(), E3(), SO2(axis=(1.0, 2.0, 3.0))], ids=str)
@torch.no_grad()
def test_lie_derivative_against_finite_differences(group: Group) -> None:
    """Oracle: central differences of f(exp(tX) x), and of exp(tX) f(x), without forward mode."""
    model, batch, h = Pairwise(0.2).eval(), graph(), 1e-5
    report = lie_derivative(model, batch, group)
    value = model(**batch)
    for generator, error in zip(group.generators(), report.samples, strict=True):
        step = h * act_generator(generator, batch["pos"], "position")
        ahead, behind = model(**{**batch, "pos": batch["pos"] + step}), model(**{**batch, "pos": batch["pos"] - step})
        errors = []
        for name, kind in OUTPUTS.items():
            slope = (ahead[name] - behind[name]) / (2 * h)
            errors.append((slope - act_generator(generator, value[name], kind)).norm() / value[name].norm())
        assert error == pytest.approx(max(errors).item(), rel=1e-6, abs=1e-8)


@torch.no_grad()
def test_small_rotations_cost_the_lie_derivative() -> None:
    """To first order the equivariance error of exp(tX) is t times the Lie derivative."""
    model, batch, t = Pairwise(0.2).eval(), graph(), 1e-5
    [generator] = SO2().generators()
    turn = torch.linalg.matrix_exp(t * generator.matrix)
    value, moved = model(**batch)["forces"], model(**{**batch, "pos": batch["pos"] @ turn.T})["forces"]
    slope = float((moved - value @ turn.T).norm() / value.norm()) / t
    only_forces = lie_derivative(model, batch, SO2(), outputs={"forces": "vector"})
    assert float(only_forces) == pytest.approx(slope, rel=1e-4)


# ---------------------------------------------------------------- real libraries


def e3nn_network() -> nn.Module:
    from e3nn import o3
    from e3nn.nn import Gate

    class Network(nn.Module):
        """Two gated tensor-product layers that see the point cloud through spherical harmonics."""

        def __init__(self) -> None:
            super().__init__()
            harmonics = o3.Irreps("0e+1o+2e")
            gate = Gate("8x0e", [torch.tanh], "6x0e", [torch.sigmoid], "4x1o+2x2e")
            self.first = o3.FullyConnectedTensorProduct("4x0e", harmonics, gate.irreps_in)
            self.gate = gate
            self.second = o3.FullyConnectedTensorProduct(gate.irreps_out, harmonics, "3x0e+2x1o+1x2e")
            self.harmonics = harmonics

        def forward(self, x: Tensor, pos: Tensor) -> Tensor:
            from e3nn import o3

            sh = o3.spherical_harmonics(self.harmonics, pos - pos.mean(0), normalize=True)
            return self.second(self.gate(self.first(x, sh)), sh)

    generator = torch.Generator().manual_seed(0)
    network = Network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def test_e3nn_network() -> None:
    network, batch = e3nn_network(), (normal(7, 4).float(), normal(7, 3).float())
    outputs = "3x0e+2x1o+1x2e"
    for group in (SO3(), O3(), E3()):
        single = equivariance_error(network, batch, group, outputs=outputs)
        assert 0 < single.max < 1e-5
        double = equivariance_error(network, batch, group, outputs=outputs, dtype=F64)
        assert double.max < 1e-8  # e3nn rounded its Wigner symbols to float32 when the network was built
        assert lie_derivative(network, batch, group, outputs=outputs).max < 1e-5
    assert next(network.parameters()).dtype == torch.float32
    with default_dtype(F64):
        built_in_double = e3nn_network().double()
    assert equivariance_error(built_in_double, batch, E3(), outputs=outputs, dtype=F64).max < 1e-12
    assert lie_derivative(built_in_double, batch, E3(), outputs=outputs, dtype=F64).max < 1e-12
    wrong = equivariance_error(network, batch, SO3(), outputs="3x0e+2x1o+5x0e")
    assert wrong.mean > 0.1
    assert lie_derivative(network, batch, SO3(), outputs="3x0e+2x1o+5x0e").mean > 0.1


class ReadsData(nn.Module):
    """A PyG layer that reads (and writes to) the attributes of a ``Data``."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import PointNetConv

        self.conv = PointNetConv(nn.Linear(2 + 3, 4), add_self_loops=False)

    def forward(self, data):  # type: ignore[no-untyped-def]
        from torch_geometric.nn import global_add_pool

        assert "seen" not in data
        data.seen = True
        relative = data.pos[data.edge_index[0]] - data.pos[data.edge_index[1]]
        data.x = data.x + torch.zeros_like(data.x).index_add(
            0, data.edge_index[1], relative.square().sum(-1, keepdim=True).expand(-1, 2)
        )
        data.pos.mul_(0.5)
        return data.x, global_add_pool(data.x, data.batch), self.conv(data.x, data.pos, data.edge_index)


def test_torch_geometric_data() -> None:
    from torch_geometric.data import Batch, Data

    one = Data(x=normal(4, 2).float(), pos=normal(4, 3).float(), edge_index=torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))
    two = Data(x=normal(3, 2, seed=1).float(), pos=normal(3, 3).float(), edge_index=torch.tensor([[0, 2], [1, 0]]))
    batch = Batch.from_data_list([one, two])
    before = batch.clone()
    model = ReadsData()
    types = ("scalar", "scalar", None)
    assert equivariance_error(model, batch, E3(), outputs=types).max < 1e-5
    assert lie_derivative(model, batch, E3(), outputs=types).max < 1e-5
    assert equivariance_error(model, batch, Permutations(), outputs=("scalar", "invariant", "scalar")).max < 1e-5
    assert equivariance_error(model, batch, Permutations()).max < 1e-5
    # PointNetConv feeds raw relative positions to a dense layer
    assert equivariance_error(model, batch, SO3(), outputs=(None, None, "scalar")).mean > 1e-2
    for key in batch.keys():  # noqa: SIM118
        assert torch.equal(batch[key], before[key])


def test_convolution_and_square_symmetries() -> None:
    class Symmetric(nn.Module):
        def __init__(self, broken: float) -> None:
            super().__init__()
            kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 5.0, 2.0], [1.0, 2.0, 1.0]], dtype=F64)
            kernel[0, 0] += broken
            self.register_buffer("kernel", kernel[None, None])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(nn.functional.conv2d(x, self.kernel, padding=1))

    x = normal(2, 1, 8, 8)
    types = {"inputs": {"x": "image"}, "outputs": "image"}
    for group in (Cyclic(4), Dihedral(4)):
        assert equivariance_error(Symmetric(0.0), x, group, **types).max < 1e-12
        assert equivariance_error(Symmetric(3.0), x, group, **types).max > 1e-2
    # other angles interpolate, which shows even in an equivariant model
    assert 1e-3 < equivariance_error(Symmetric(0.0), x, Cyclic(8), **types).max < 1.0


def test_forces_of_a_conservative_model() -> None:
    def forces(pos: Tensor) -> Tensor:
        pos.requires_grad_()
        energy = torch.pdist(pos).square().sum().sqrt()
        return torch.autograd.grad(energy, pos)[0]

    pos = normal(4, 3)
    assert equivariance_error(forces, pos, E3(), outputs="vector").max < 1e-12
    assert not pos.requires_grad


# ---------------------------------------------------------------- batches, outputs and types


@pytest.mark.parametrize("measure", [equivariance_error, lie_derivative])
def test_tuple_dict_and_positions_agree(measure) -> None:  # type: ignore[no-untyped-def]
    model, batch = Pairwise(0.2), graph()
    by_name = measure(model, batch, SO3())
    assert measure(model, tuple(batch.values()), SO3()) == by_name
    assert measure(model, tuple(batch.values()), SO3(), inputs={0: "position", "h": "scalar"}) == by_name
    as_irreps = measure(model, batch, SO3(), inputs={"pos": "1o"}, outputs={**OUTPUTS, "pos": "1o"})
    assert as_irreps.samples == pytest.approx(by_name.samples, rel=1e-10)
    with pytest.raises(AceError, match="1o"):
        measure(model, batch, SO3(), inputs={"h": "1o"})


def test_a_type_covers_every_tensor_of_a_nested_argument() -> None:
    def total(clouds: list[Tensor], scale: float) -> tuple[Tensor, list[Tensor]]:
        return sum(clouds) * scale, [cloud * 2 for cloud in clouds]

    batch = ([normal(4, 3), normal(4, 3, seed=1)], 3.0)
    kinds = {"inputs": {"clouds": "vector"}, "outputs": ("vector", "vector")}
    assert equivariance_error(total, batch, O3(), **kinds).max < 1e-12
    assert equivariance_error(total, batch, O3(), inputs=kinds["inputs"], outputs="vector").max < 1e-12
    assert lie_derivative(total, batch, O3(), **kinds).max < 1e-12


def test_the_worst_output_counts() -> None:
    def two(pos: Tensor) -> dict[str, Tensor | None]:
        return {"large": 1e9 * pos, "small": 1e-9 * pos.abs(), "absent": None}

    x = normal(8, 3)
    both = equivariance_error(two, x, SO3(), outputs={"large": "vector", "small": "vector"})
    small = equivariance_error(two, x, SO3(), outputs={"small": "vector"})
    assert both.samples == small.samples
    assert both.mean > 0.1
    assert equivariance_error(two, x, SO3(), outputs={"large": "vector", "small": None}).max < 1e-12


def test_zero_output_is_equivariant() -> None:
    report = equivariance_error(lambda pos: pos * 0, normal(3, 3), SO3(), outputs="vector")
    assert (report.mean, report.max) == (0.0, 0.0)


def test_non_finite_errors_are_not_hidden() -> None:
    report = equivariance_error(lambda pos: pos.abs().log().sqrt(), normal(3, 3), SO3(), outputs="vector")
    assert math.isnan(report.mean)
    assert math.isnan(report.max)


def test_scalar_outputs_need_no_type() -> None:
    x = normal(4, 3)
    assert equivariance_error(lambda pos: torch.pdist(pos).sum(), x, E3()).max < 1e-12
    assert equivariance_error(lambda pos: torch.cdist(pos, pos).sum(1, keepdim=True), x, E3()).max < 1e-11


def test_integer_node_features_and_graph_numbers_are_permuted() -> None:
    def pooled(z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        return torch.zeros(2, 3, dtype=F64).index_add(0, batch, pos * z[:, None])

    inputs = (torch.tensor([6, 1, 1, 8]), normal(4, 3), torch.tensor([0, 0, 1, 1]))
    assert equivariance_error(pooled, inputs, Permutations()).max < 1e-12
    assert equivariance_error(pooled, inputs, Permutations(), inputs={"z": "invariant"}).max > 1e-2


# ---------------------------------------------------------------- errors


def message(*args, **kwargs) -> str:  # type: ignore[no-untyped-def]
    with pytest.raises(AceError) as error:
        equivariance_error(*args, **kwargs)
    return str(error.value)


def test_all_problems_at_once() -> None:
    text = message(
        Pairwise(),
        graph(),
        SO3(),
        inputs={"pos": "vectr", "h": "vector", "speed": "vector"},
        outputs={"forces": "2x1o", "pos": "position", "spin": "vector"},
    )
    assert text.startswith("cannot measure how Pairwise transforms under SO(3):")
    for words in (
        "input pos: unknown type 'vectr', did you mean 'vector'?",
        "input h: type 'vector' needs a last axis of size 3, but the shape is (5, 1)",
        "inputs names 'speed', but the inputs are: pos",
        "output 'forces': type '2x1o' needs a last axis of size 6, but the shape is (5, 3)",
        "outputs names 'spin', but the output has the keys ['pos', 'forces', 'energy']",
    ):
        assert words in text
    assert text.count("\n  - ") == 5


def test_types_that_cannot_be_guessed() -> None:
    x = normal(4, 3)
    text = message(lambda features: features * 2, x, SO3())
    assert "SO(3) moves none of the inputs features (scalar, shape (4, 3))" in text
    assert "the output of shape (4, 3) could be of several types: pass outputs=" in text
    assert "could be of several types" in message(lambda pos: pos.sum(1), x, SO3())
    assert "moves none" in message(nn.Conv2d(1, 1, 3).double(), normal(1, 1, 5, 5), Cyclic(4), outputs="image")
    assert "SO2, Cyclic, Dihedral" in message(lambda x: x, x, SO3(), inputs={"x": "image"}, outputs="vector")


def test_batches_and_outputs_that_cannot_be_read() -> None:
    x = normal(4, 3)
    assert "no tensor found in a batch of type object" in message(lambda x: x, object(), SO3())
    assert "output is a str" in message(lambda pos: "x", x, SO3())
    assert "has 2 parts" in message(lambda pos: (pos, pos), x, SO3(), outputs=("vector",))
    assert "as a dict too" in message(lambda pos: {"a": pos}, x, SO3(), outputs=("vector",))
    assert "is a tensor" in message(lambda pos: pos, x, SO3(), outputs=("vector",))
    assert "no output is left" in message(lambda pos: {"a": pos}, x, SO3(), outputs={})
    assert "elements" in message(lambda pos: pos, x, SO3(), outputs="vector", elements=0)


def test_node_axes_that_disagree() -> None:
    def total(pos: Tensor, h: Tensor, globals_: Tensor) -> Tensor:
        return pos.sum() + h.sum() + globals_.sum()

    batch = (normal(5, 3), normal(5, 2), normal(1, 4))
    text = message(total, batch, Permutations())
    assert "input globals_: type 'scalar' has one entry per node on axis 0" in text
    assert "there are 5 nodes; edge and graph features are 'invariant'" in text
    assert equivariance_error(total, batch, Permutations(), inputs={"globals_": "invariant"}).max < 1e-12
    assert "no input has a node axis" in message(
        lambda edge_index: edge_index, torch.zeros(2, 3).long(), Permutations()
    )


def test_finite_groups_have_no_lie_derivative() -> None:
    for group in (Cyclic(4), Dihedral(2), Permutations()):
        with pytest.raises(AceError, match="use equivariance_error"):
            lie_derivative(Pairwise(), graph(), group)


def test_output_shape_must_not_depend_on_the_element() -> None:
    with pytest.raises(ShapeMismatch, match="must not depend"):
        equivariance_error(lambda pos: pos[pos[:, 0] > 0], normal(20, 3), SO3(), outputs="vector")


# ---------------------------------------------------------------- no trace left


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("measure", [equivariance_error, lie_derivative])
def test_model_and_random_state_are_untouched(measure, dtype) -> None:  # type: ignore[no-untyped-def]
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).to(F64).train()
    model[2].eval()
    model[3].weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    x, random = normal(8, 3).requires_grad_(), torch.get_rng_state()

    first = measure(model, x, SO3(), inputs={0: "vector"}, outputs="vector", dtype=dtype)
    again = measure(model, x, SO3(), inputs={0: "vector"}, outputs="vector", dtype=dtype)
    with pytest.raises(AceError):
        measure(model, x, SO3(), inputs={0: "vector"}, outputs="position 3")

    assert first == again  # dropout off, seeded elements
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == [True] * 4 + [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, normal(8, 3))
    assert x.grad is None


def test_a_model_that_draws_draws_the_same_for_both_sides() -> None:
    report = equivariance_error(lambda pos: pos * torch.rand(4, 1), normal(4, 3), SO3(), outputs="vector")
    assert report.max < 1e-12


def test_inputs_are_not_written_to() -> None:
    def in_place(pos: Tensor) -> Tensor:
        pos -= pos.mean(0)
        return pos

    x = normal(4, 3)
    assert equivariance_error(in_place, x, E3(), outputs="vector").max < 1e-12
    assert torch.equal(x, normal(4, 3))


def test_dtype_runs_a_copy() -> None:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3) / 3)
    x = normal(5, 3).float()
    kinds = {"inputs": {0: "vector"}, "outputs": "vector"}
    assert 1e-10 < equivariance_error(model, x, SO3(), **kinds).max < 1e-6
    assert equivariance_error(model, x, SO3(), dtype=F64, **kinds).max < 1e-15
    assert model.weight.dtype == torch.float32


# ---------------------------------------------------------------- report


def test_report() -> None:
    report = ErrorReport(3.1e-7, 5.2e-7, 8, "SO(3)")
    assert str(report) == "equivariance error: mean 3.1e-07, max 5.2e-07 (8 elements of SO(3))"
    assert float(report) == 3.1e-7
    with pytest.raises(AttributeError):
        report.mean = 0.0  # type: ignore[misc]
    [one] = lie_derivative(Pairwise(), graph(), SO2()).samples
    assert str(lie_derivative(Pairwise(0.5), graph(), SO2())).startswith("Lie derivative: mean ")
    assert str(lie_derivative(Pairwise(0.5), graph(), SO2())).endswith("(1 generator of SO(2))")
    assert one < 1e-12


@torch.no_grad()
def test_elements_and_seed() -> None:
    model, batch = Pairwise(0.3), graph()
    few, many = (equivariance_error(model, batch, SO3(), elements=n, seed=4) for n in (3, 3))
    assert few == many
    assert len(few.samples) == few.elements == 3
    assert equivariance_error(model, batch, SO3(), elements=3, seed=5).samples != few.samples
    x = batch["pos"]
    [g] = SO3().sample(1, seed=4)
    value, moved = model.eval()(**batch), model(**{**batch, "pos": act(g, x, "position")})
    expected = max(
        float((moved[name] - act(g, value[name], kind)).norm() / value[name].norm()) for name, kind in OUTPUTS.items()
    )
    assert equivariance_error(model, batch, SO3(), elements=1, seed=4).max == pytest.approx(expected, rel=1e-12)
