"""Group axioms, representations, sampling and generators, against scipy, e3nn and the matrix exponential."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ace.errors import AceError
from ace.groups import (
    E3,
    O3,
    SO2,
    SO3,
    TYPES,
    Cyclic,
    Dihedral,
    Element,
    Group,
    Inversion,
    Octahedral,
    Permutations,
    Reflections,
    Tilts,
    Translations,
    act,
    act_generator,
    finding,
)
from ace.probing import default_dtype

# torch's and e3nn's own use of torch.jit.script, which torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

NODES = 5
TILTED = (1.0, -2.0, 0.5)
GEOMETRIC = [
    SO2(),
    SO2(axis=(0.0, 1.0, 0.0)),
    SO2(axis=TILTED),
    SO3(),
    O3(),
    E3(),
    E3(translation=30.0),
    Cyclic(1),
    Cyclic(3),
    Cyclic(4, axis=TILTED),
    Dihedral(1),
    Dihedral(5),
    Dihedral(4, axis=(1.0, 0.0, 0.0)),
    Translations(),
    Translations(30.0, axes=(2, 0)),
    Reflections(),
    Reflections((0.0, 2.0, 0.0)),
    Reflections(TILTED),
    Inversion(),
    Octahedral(),
    Tilts(),  # no group, but its elements are
    Tilts(TILTED),
]
PLANAR = [group for group in GEOMETRIC if isinstance(group, (SO2, Cyclic, Dihedral))]
GROUPS = [*GEOMETRIC, Permutations()]
CONTINUOUS = [group for group in GEOMETRIC if group.generators()]
IRREPS = "2x0e+0o+3x1o+1e+2e+2x3o"
SIZES = {"vector": 3, "pseudovector": 3, "position": 3, "scalar": 4, "invariant": 4, IRREPS: 34}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def same(left: Element, right: Element, tolerance: float = 1e-12) -> None:
    for name in ("matrix", "plane", "translation", "permutation"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * (1 + float(one.abs().max())))


groups = st.sampled_from(GROUPS)
seeds = st.integers(0, 2**31)


@given(groups, seeds)
@settings(deadline=None)
def test_axioms(group: Group, seed: int) -> None:
    f, g, h = group.sample(3, seed, nodes=NODES)
    identity = g @ g.inverse()
    same((f @ g) @ h, f @ (g @ h), 1e-11)
    same(identity @ f, f)
    same(f @ identity, f)
    same(g.inverse() @ g, identity)
    same((g @ h).inverse(), h.inverse() @ g.inverse(), 1e-11)
    x = normal(NODES, 3)
    close(act(identity, x, "position"), x, 1e-12)


@given(groups, st.sampled_from(sorted(SIZES)), seeds)
@settings(deadline=None)
def test_action_is_a_homomorphism(group: Group, kind: str, seed: int) -> None:
    g, h = group.sample(2, seed, nodes=NODES)
    x = normal(2, NODES, SIZES[kind])
    close(act(g @ h, x, kind), act(g, act(h, x, kind), kind), 1e-11)


@given(st.sampled_from(GEOMETRIC), st.sampled_from(["vector", "pseudovector", IRREPS]), seeds)
@settings(deadline=None)
def test_action_is_orthogonal(group: Group, kind: str, seed: int) -> None:
    [g] = group.sample(1, seed)
    x, y = normal(NODES, SIZES[kind]), normal(NODES, SIZES[kind], seed=1)
    close((act(g, x, kind) * act(g, y, kind)).sum(-1), (x * y).sum(-1), 1e-11)


@pytest.mark.parametrize("group", GEOMETRIC, ids=repr)
def test_determinants(group: Group) -> None:
    elements = group.sample(24, seed=1)
    signs = {round(float(torch.linalg.det(g.matrix)), 9) for g in elements}
    mirrors = isinstance(group, (O3, E3, Dihedral, Reflections, Inversion, Octahedral))
    assert signs == ({1.0, -1.0} if mirrors else {1.0})
    for g in elements:
        close(g.matrix @ g.matrix.T, torch.eye(3, dtype=torch.float64), 1e-14)
        if g.plane is not None:
            close(torch.linalg.det(g.plane), torch.linalg.det(g.matrix), 1e-14)


@pytest.mark.parametrize("group", PLANAR, ids=repr)
def test_axis_is_fixed_and_plane_moves_as_in_two_dimensions(group: SO2 | Cyclic | Dihedral) -> None:
    axis = torch.tensor(group.axis, dtype=torch.float64)
    for g in group.sample(6):
        close(act(g, axis, "vector"), axis)
        trace = float(torch.linalg.matrix_norm(g.matrix) ** 2) - 1  # of plane planeᵀ
        assert trace == pytest.approx(2.0)
        assert float(g.matrix.trace()) == pytest.approx(1 + float(g.plane.trace()))


def test_coordinate_axes_keep_the_cyclic_order() -> None:
    for number in range(3):
        axis = tuple(torch.eye(3)[number].tolist())
        [g] = SO2(axis=axis).sample(1, seed=2)
        across = [(number + 1) % 3, (number + 2) % 3]
        close(g.matrix[across][:, across], g.plane, 1e-15)


def test_position_is_translated_and_vector_is_not() -> None:
    [g] = E3(translation=7.0).sample(1, seed=5)
    x = normal(4, 3)
    close(act(g, x, "position") - act(g, x, "vector"), g.translation.expand(4, 3))
    close(act(g, x, "vector"), x @ g.matrix.T)
    assert float(g.translation.norm()) > 0.1


def test_mirror_of_axial_vectors() -> None:
    x, y = normal(6, 3), normal(6, 3, seed=1)
    for g in O3().sample(8, seed=3):
        cross = torch.linalg.cross(act(g, x, "vector"), act(g, y, "vector"))
        close(cross, act(g, torch.linalg.cross(x, y), "pseudovector"))
        close(cross, act(g, torch.linalg.cross(x, y), "1e"))
        triple = (torch.linalg.cross(x, y) * x.roll(1, 0)).sum(-1, keepdim=True)
        close(act(g, triple, "0o"), triple * torch.linalg.det(g.matrix))


@given(st.sampled_from([Translations(3.0), Translations(axes=(0,)), SO2(), Reflections()]), seeds)
@settings(deadline=None)
def test_points_of_the_plane(group: Group, seed: int) -> None:
    g, h = group.sample(2, seed)
    x = normal(4, 2)
    for kind in ("position", "vector"):
        close(act(g @ h, x, kind), act(g, act(h, x, kind), kind))
    lifted = torch.cat([x, torch.zeros(4, 1)], dim=1)
    close(act(g, x, "position"), act(g, lifted, "position")[:, :2])


def test_translations_move_nothing_but_positions() -> None:
    [g] = Translations().sample(1, seed=2)
    x = normal(NODES, 3)
    close(act(g, x, "position"), x + g.translation)
    for kind in ("vector", "pseudovector", "1o"):
        close(act(g, x, kind), x)
    for kind in ("image", "vector_image"):
        assert "groups of the plane" in (finding(g, torch.zeros(2, 4, 4), kind) or "")


@pytest.mark.parametrize("normal_", [(1.0, 0.0, 0.0), (3.0, -4.0, 0.0), TILTED])
def test_a_mirror_turns_its_normal_around_and_keeps_the_plane(normal_: tuple[float, float, float]) -> None:
    n = torch.tensor(normal_, dtype=torch.float64)
    x = torch.linalg.cross(n.expand(4, 3), normal(4, 3))
    mirrors = [g for g in Reflections(normal_).sample(2) if torch.linalg.det(g.matrix) < 0]
    assert len(mirrors) == 1
    for g in mirrors:
        close(act(g, n, "vector"), -n)
        close(act(g, x, "vector"), x)
        assert (g.plane is None) == (normal_[2] != 0)
    for left, right in zip(Reflections((0.0, 1.0, 0.0)).sample(4), Dihedral(1).sample(4), strict=True):
        same(left, right)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("group", GROUPS, ids=repr)
def test_same_seed_same_elements_and_global_state_untouched(group: Group) -> None:
    before = torch.get_rng_state()
    first, again = group.sample(5, 7, nodes=NODES), group.sample(5, 7, nodes=NODES)
    for left, right in zip(first, again, strict=True):
        same(left, right, 0.0)
    assert torch.equal(before, torch.get_rng_state())
    assert group.sample(0, nodes=NODES) == []


def test_seeds_give_different_rotations() -> None:
    matrices = torch.stack([SO3().sample(1, seed)[0].matrix for seed in range(20)])
    assert len(torch.unique(matrices[:, 0, 0])) == 20


@pytest.mark.parametrize("group", [SO3(), O3()], ids=str)
def test_haar_moments(group: Group) -> None:
    """E[R] = 0, E[R_ij R_kl] = δ_ik δ_jl / 3 and, for SO(3), E[tr(R)^2] = E[tr(R)^3] = 1 (characters)."""
    count = 20_000
    matrices = torch.stack([g.matrix for g in group.sample(count, seed=0)])
    flat = matrices.flatten(1)
    assert float(flat.mean(0).abs().max()) < 5 * (1 / 3 / count) ** 0.5
    second = flat.T @ flat / count
    assert float((second - torch.eye(9, dtype=torch.float64) / 3).abs().max()) < 5 * (0.3 / count) ** 0.5
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    assert float((trace**2).mean()) == pytest.approx(1.0, abs=0.06)
    third = 1.0 if isinstance(group, SO3) else 0.0
    assert float((trace**3).mean()) == pytest.approx(third, abs=0.15)


def test_circle_is_uniform() -> None:
    planes = torch.stack([g.plane for g in SO2().sample(5_000)])
    angles = torch.atan2(planes[:, 1, 0], planes[:, 0, 0])
    for frequency in (1, 2, 3):
        moment = torch.complex(torch.cos(frequency * angles), torch.sin(frequency * angles)).mean().abs()
        assert float(moment) < 4 * 5_000**-0.5


@pytest.mark.parametrize("axis", [(0.0, 0.0, 1.0), TILTED])
def test_a_tilt_after_a_turn_is_a_uniform_rotation(axis: tuple[float, float, float]) -> None:
    """Moments as above; and the axis itself goes to a uniform point: its height has variance 1/3, fourth moment 1/5."""
    count = 20_000
    tilts = torch.stack([g.matrix for g in Tilts(axis).sample(count, seed=0)])
    turns = torch.stack([g.matrix for g in SO2(axis).sample(count, seed=1)])
    flat = (tilts @ turns).flatten(1)
    assert float(flat.mean(0).abs().max()) < 5 * (1 / 3 / count) ** 0.5
    second = flat.T @ flat / count
    assert float((second - torch.eye(9, dtype=torch.float64) / 3).abs().max()) < 5 * (0.3 / count) ** 0.5
    direction = torch.tensor(axis, dtype=torch.float64)
    height = (tilts @ direction) @ direction / direction.square().sum()
    assert float(height.square().mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float(height.pow(4).mean()) == pytest.approx(1 / 5, abs=0.01)


@given(st.sampled_from([(0.0, 0.0, 1.0), TILTED]), seeds)
@settings(deadline=None)
def test_tilts_are_the_rotations_about_horizontal_axes(axis: tuple[float, float, float], seed: int) -> None:
    """The rotation vector is perpendicular to the axis; the tilt back is a tilt too."""
    direction = torch.tensor(axis, dtype=torch.float64)

    def turn(g: Element) -> float:
        vector = torch.from_numpy(Rotation.from_matrix(g.matrix.numpy()).as_rotvec())
        return float((vector @ direction).abs())

    [g] = Tilts(axis).sample(1, seed)
    assert turn(g) < 1e-7
    assert turn(g.inverse()) < 1e-7
    close(torch.linalg.det(g.matrix), torch.ones((), dtype=torch.float64))


def test_octahedral_is_covered_and_closed() -> None:
    drawn = [g.matrix for g in Octahedral().sample(144, seed=4)]
    elements, counts = torch.unique(torch.stack(drawn), dim=0, return_counts=True)
    assert counts.tolist() == [3] * 48
    names = {tuple(matrix.flatten().tolist()) for matrix in elements + 0.0}
    assert {tuple((a @ b + 0.0).flatten().tolist()) for a in elements for b in elements} == names
    assert torch.equal(elements.abs().sum(1), torch.ones(48, 3, dtype=torch.float64))
    assert torch.equal(elements.abs().sum(2), torch.ones(48, 3, dtype=torch.float64))
    first = [tuple((Octahedral().sample(1, seed)[0].matrix + 0.0).flatten().tolist()) for seed in range(600)]
    assert set(first) == names


@pytest.mark.parametrize("group", [Reflections(), Reflections(TILTED), Inversion()], ids=repr)
def test_groups_of_two(group: Group) -> None:
    drawn = torch.stack([g.matrix for g in group.sample(6, seed=3)])
    identity = torch.eye(3, dtype=torch.float64)
    assert sum(torch.equal(matrix, identity) for matrix in drawn) == 3
    for matrix in drawn:
        close(matrix @ matrix, identity, 1e-14)
    assert len({float(group.sample(1, seed)[0].matrix.trace()) for seed in range(20)}) == 2


@pytest.mark.parametrize("group", [Cyclic(1), Cyclic(6), Dihedral(1), Dihedral(4)], ids=str)
def test_finite_groups_are_covered(group: Cyclic | Dihedral) -> None:
    order = group.n * (2 if isinstance(group, Dihedral) else 1)
    planes = torch.stack([g.plane for g in group.sample(3 * order, seed=4)]).round(decimals=9)
    elements, counts = torch.unique(planes + 0.0, dim=0, return_counts=True)
    assert counts.tolist() == [3] * order
    closed = {tuple((a @ b).round(decimals=6).add(0.0).flatten().tolist()) for a in elements for b in elements}
    assert len(closed) == order
    first = [tuple(group.sample(1, seed)[0].plane.round(decimals=9).add(0.0).flatten().tolist()) for seed in range(64)]
    assert len(set(first)) == order


def test_translation_scale() -> None:
    shifts = torch.stack([g.translation for g in E3(translation=3.0).sample(4_000)])
    assert float(shifts.std()) == pytest.approx(3.0, rel=0.05)
    assert not torch.stack([g.translation for g in E3(translation=0.0).sample(3)]).any()
    shifts = torch.stack([g.translation for g in Translations(3.0, axes=(0, 2)).sample(4_000)])
    assert shifts.std(0).tolist() == pytest.approx([3.0, 0.0, 3.0], rel=0.05)


# ---------------------------------------------------------------- generators


@pytest.mark.parametrize("group", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_generator_is_the_derivative_along_the_exponential(group: Group, kind: str) -> None:
    x = normal(NODES, SIZES[kind])
    for generator in group.generators():
        affine = torch.zeros(4, 4, dtype=torch.float64)
        affine[:3, :3] = generator.matrix
        if generator.translation is not None:
            affine[:3, 3] = generator.translation

        def moved(t: float, affine: torch.Tensor = affine, generator=generator) -> torch.Tensor:
            motion = torch.linalg.matrix_exp(t * affine)
            plane = None if generator.plane is None else torch.linalg.matrix_exp(t * generator.plane)
            return act(Element(motion[:3, :3], plane, motion[:3, 3]), x, kind)

        h = 1e-3  # five-point formula, error of order h⁴
        slope = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
        close(act_generator(generator, x, kind), slope, 1e-9)


def test_generator_on_plane_vectors() -> None:
    [generator] = SO2().generators()
    close(act_generator(generator, torch.tensor([[2.0, 1.0]]), "vector"), torch.tensor([[-1.0, 2.0]]))
    [shift] = Translations(axes=(1,)).generators()
    close(act_generator(shift, torch.tensor([[2.0, 1.0]]), "position"), torch.tensor([[0.0, 1.0]]))
    close(act_generator(shift, torch.tensor([[2.0, 1.0]]), "vector"), torch.zeros(1, 2))


@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
@settings(deadline=None)
def test_irreps_exponentiate(weights: list[float]) -> None:
    """D(exp X) = exp(dD(X)), for X any combination of the generators."""
    size = SIZES[IRREPS]
    basis = torch.eye(size, dtype=torch.float64)
    matrix = sum(w * g.matrix for w, g in zip(weights, SO3().generators(), strict=True))
    infinitesimal = sum(w * act_generator(g, basis, IRREPS).T for w, g in zip(weights, SO3().generators(), strict=True))
    finite = act(Element(torch.linalg.matrix_exp(matrix)), basis, IRREPS).T
    close(finite, torch.linalg.matrix_exp(infinitesimal), 1e-11)


def test_commutators() -> None:
    x, y, z = (g.matrix for g in SO3().generators())
    assert torch.equal(x @ y - y @ x, z)
    assert torch.equal(y @ z - z @ y, x)
    assert len(SO2().generators()) == 1
    assert len(E3().generators()) == 6
    assert [len(g.generators()) for g in (Translations(), Translations(axes=(1,)), Tilts())] == [3, 1, 2]
    for group in (Cyclic(4), Dihedral(4), Permutations(), Reflections(), Inversion(), Octahedral()):
        assert group.generators() == []
    u, v = (g.matrix for g in Tilts(TILTED).generators())
    [about] = SO2(TILTED).generators()
    close(u @ v - v @ u, about.matrix)  # two tilts make a turn


# ---------------------------------------------------------------- oracles


@given(seeds)
@settings(deadline=None)
def test_vectors_against_scipy(seed: int) -> None:
    rotation = Rotation.random(rng=np.random.default_rng(seed))
    x = normal(6, 3)
    ours = act(Element(torch.from_numpy(rotation.as_matrix())), x, "vector")
    close(ours, torch.from_numpy(rotation.apply(x.numpy())), 1e-13)


@given(st.floats(0, 6.2), st.floats(0.1, 3.0), st.floats(0, 6.2))
@settings(deadline=None, max_examples=30)
def test_irreps_against_e3nn(alpha: float, beta: float, gamma: float) -> None:
    from e3nn import o3

    irreps = "+".join(f"{degree}{parity}" for degree in range(7) for parity in "eo")
    angles = [torch.tensor(angle, dtype=torch.float64) for angle in (alpha, beta, gamma)]
    with default_dtype(torch.float64):  # e3nn builds its generators in it
        rotation = o3.angles_to_matrix(*angles)
        wigner = {
            parity: o3.Irreps(irreps).D_from_angles(*angles, k)
            for parity, k in (("+", 0.0 * angles[0]), ("-", 0.0 * angles[0] + 1))
        }
    x = normal(3, o3.Irreps(irreps).dim)
    close(act(Element(rotation), x, irreps), x @ wigner["+"].T, 1e-11)
    close(act(Element(-rotation), x, irreps), x @ wigner["-"].T, 1e-11)


def test_irreps_are_accurate_where_euler_angles_are_not() -> None:
    """Rotations about y, the axis of e3nn's Euler angles, in degree 11: still a homomorphism to 1e-11."""
    x = normal(4, 23)
    for g in SO2(axis=(0.0, 1.0, 0.0)).sample(5):
        close(act(g @ g, x, "11o"), act(g, act(g, x, "11o"), "11o"), 1e-11)


def test_vectors_are_e3nn_1o() -> None:
    from e3nn import o3

    x = normal(6, 3)
    for g in O3().sample(6):
        close(act(g, x, "1o"), act(g, x, "vector"))
        harmonics = o3.spherical_harmonics("1o+2e+3o", x, normalize=True)
        close(o3.spherical_harmonics("1o+2e+3o", act(g, x, "vector"), normalize=True), act(g, harmonics, "1o+2e+3o"))


def test_irreps_layout_is_e3nns() -> None:
    from e3nn import o3

    [g] = O3().sample(1, seed=1)
    for text in ("3x1o+2x0e", "1e + 2x2e", "0x1o+1o", "10x0e"):
        x = normal(2, o3.Irreps(text).dim)
        wigner = o3.Irreps(text).D_from_matrix(g.matrix.float()).double()
        close(act(g, x, text), x @ wigner.T, 1e-5)


# ---------------------------------------------------------------- permutations


@given(seeds, st.integers(1, 8))
@settings(deadline=None)
def test_permutations(seed: int, nodes: int) -> None:
    [g] = Permutations().sample(1, seed, nodes=nodes)
    random = torch.Generator().manual_seed(seed)
    rows = torch.arange(nodes)
    edges = torch.randint(nodes, (2, 9), generator=random)
    x = torch.randn(3, nodes, 2, generator=random)
    moved = act(g, x, "scalar")
    for node in range(nodes):  # node i is found at place p[i]
        assert torch.equal(moved[:, g.permutation[node]], x[:, node])
    assert torch.equal(act(g, rows, "scalar")[act(g, edges, "edge_index")], edges)
    assert act(g, edges, "invariant") is edges
    assert act(g, torch.tensor(2.0), "scalar") == 2.0
    image = torch.zeros(1, nodes + 1, 4)
    assert act(g, image, "image") is image
    assert sorted(g.permutation.tolist()) == rows.tolist()


def test_permutations_are_uniform() -> None:
    drawn = torch.stack([g.permutation for g in Permutations().sample(6_000, nodes=3)])
    _, counts = torch.unique(drawn, dim=0, return_counts=True)
    assert len(counts) == 6
    assert float((counts - 1000).abs().max()) < 5 * (6000 * 5 / 36) ** 0.5


# ---------------------------------------------------------------- images


def quarter(turns: int, mirror: bool = False) -> Element:
    plane = torch.linalg.matrix_power(torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64), turns)
    return Element(
        torch.eye(3, dtype=torch.float64), plane @ torch.diag(torch.tensor([1.0, 1.0 - 2 * mirror]).double())
    )


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_quarter_turns_move_pixels_exactly(turns: int, mirror: bool) -> None:
    """Oracle: the pixel at centred coordinates p goes to g p."""
    g, size = quarter(turns, mirror), 5
    image = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))
    moved = act(g, image, "image")
    assert moved.dtype == image.dtype
    centre = (size - 1) / 2
    for row in range(size):
        for column in range(size):
            x, y = (g.plane @ torch.tensor([column - centre, row - centre], dtype=torch.float64)).tolist()
            assert torch.equal(moved[:, int(y + centre), int(x + centre)], image[:, row, column])


def test_interpolation_agrees_with_pixel_moves_near_quarter_turns() -> None:
    image = normal(3, 4, 4, 4)
    for plane in (g.plane for g in Dihedral(4).sample(8)):
        exact = act(Element(torch.eye(3).double(), plane), image, "image")
        angle = 1e-7  # just off, so that grid_sample is used
        off = torch.tensor([[1.0, -angle], [angle, 1.0]], dtype=torch.float64)
        bilinear = act(Element(torch.eye(3).double(), off @ plane), image, "image")
        assert not torch.equal(exact, bilinear)
        close(bilinear, exact, 1e-5)


def test_oblong_images_are_turned_about_their_centre_in_pixels() -> None:
    """A smooth bump off centre lands where the rotation takes it."""
    height, width = 41, 81

    def bump(x0: float, y0: float) -> torch.Tensor:
        y = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
        x = torch.arange(width, dtype=torch.float64)[None, :] - (width - 1) / 2
        return torch.exp(-((x - x0) ** 2 + (y - y0) ** 2) / 32)

    g = next(g for g in Cyclic(12).sample(12) if abs(float(g.plane[1, 0]) - 0.5) < 1e-9 and g.plane[0, 0] > 0)
    x, y = (g.plane @ torch.tensor([12.0, 3.0], dtype=torch.float64)).tolist()
    close(act(g, bump(12.0, 3.0), "image"), bump(x, y), 0.02)


@given(seeds)
@settings(deadline=None)
def test_image_actions_compose_exactly_for_square_symmetries(seed: int) -> None:
    g, h = Dihedral(4).sample(2, seed)
    image = normal(2, 4, 6, 6)
    for kind in ("image", "vector_image"):
        assert torch.equal(act(g @ h, image, kind), act(g, act(h, image, kind), kind))


def test_vector_image_is_a_gradient() -> None:
    """The gradient of a turned image is the turned gradient: finite differences commute with quarter turns."""

    def gradient(f: torch.Tensor) -> torch.Tensor:
        dy, dx = torch.gradient(f, dim=(-2, -1))
        return torch.stack([dx, dy], dim=-3)

    image = normal(7, 7)
    for g in Dihedral(4).sample(8):
        close(gradient(act(g, image, "image")), act(g, gradient(image), "vector_image"))


# ---------------------------------------------------------------- dtypes, errors, imports


@pytest.mark.parametrize("kind", ["vector", "position", IRREPS, "scalar"])
def test_float32_is_float64_rounded_and_gradients_flow(kind: str) -> None:
    [g] = E3().sample(1)
    x = normal(3, SIZES[kind]).float().requires_grad_()
    moved = act(g, x, kind)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, act(g, x.double(), kind).float())
    (moved**2).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", TYPES)
def test_tensors_stay_on_their_device(kind: str) -> None:
    shape = {"image": (2, 4, 4), "vector_image": (2, 4, 4), "scalar": (NODES, 2)}.get(kind, (NODES, 3))
    x = torch.zeros(shape, device="meta", dtype=torch.long if kind == "edge_index" else torch.float32)
    for element in (*SO2().sample(1), *Dihedral(4).sample(1), *Permutations().sample(1, nodes=NODES)):
        moved = act(element, x, kind)
        assert (moved.device, moved.dtype, moved.shape) == (x.device, x.dtype, x.shape)
    if "image" not in kind:
        assert act_generator(SO2().generators()[0], x, kind).device == x.device


def test_still_tensors_are_returned_as_they_are() -> None:
    x = torch.arange(6).reshape(2, 3)
    for group in GEOMETRIC:
        [g] = group.sample(1)
        for kind in ("scalar", "invariant", "edge_index"):
            assert act(g, x, kind) is x


so3 = SO3().sample(1)[0]
turn = Cyclic(8).sample(8)[0]
shuffle = Permutations().sample(1, nodes=4)[0]


@pytest.mark.parametrize(
    ("motion", "shape", "kind", "words"),
    [
        (so3, (4, 3), "vectr", "did you mean 'vector'"),
        (so3, (4, 3), "", "unknown type ''"),
        (so3, (4, 3), "8x0e+4y1o", r"unknown type '8x0e\+4y1o'"),
        (so3, (4, 2), "vector", r"size 3, but the shape is \(4, 2\)"),
        (so3, (), "position", r"shape is \(\)"),
        (turn, (4, 4), "vector", "size 2 or 3"),
        (so3, (4, 7), "2x0e+2x1o", "size 8"),
        (so3, (4, 25), "12e", "l = 11"),
        (so3, (1, 4, 4), "image", "SO2, Cyclic, Dihedral"),
        (turn, (4,), "image", "two axes"),
        (turn, (3, 4, 4), "vector_image", "pairs on axis -3"),
        (turn, (4, 4), "vector_image", "pairs on axis -3"),
        (SO2().generators()[0], (4, 4), "image", "no infinitesimal action"),
        (shuffle, (5, 3), "vector", "there are 4 nodes.*'invariant'"),
        (shuffle, (5,), "scalar", "axis 0"),
        (shuffle, (2, 5), "edge_index", "integers"),
    ],
)
def test_findings(motion, shape: tuple[int, ...], kind: str, words: str) -> None:
    action = act if isinstance(motion, Element) else act_generator
    with pytest.raises(AceError, match=words):
        action(motion, torch.zeros(shape), kind)


def test_every_type_is_listed_for_an_unknown_one() -> None:
    message = finding(so3, torch.zeros(3), "nonsense") or ""
    assert all(kind in message for kind in TYPES)


def test_integers_do_not_rotate() -> None:
    with pytest.raises(AceError, match="floating point"):
        act(so3, torch.zeros(2, 3, dtype=torch.int64), "vector")


def test_bad_groups_and_products_are_refused() -> None:
    with pytest.raises(AceError, match="nodes="):
        Permutations().sample(1)
    for axis in ((0.0, 0.0, 0.0), (1.0, 0.0), (float("nan"), 0.0, 1.0)):
        with pytest.raises(AceError, match="axis"):
            SO2(axis=axis)  # type: ignore[arg-type]
    for group in (Cyclic, Dihedral):
        with pytest.raises(AceError, match=">= 1"):
            group(0)
    with pytest.raises(AceError, match=">= 0"):
        E3(translation=-1.0)
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(AceError, match="scale must be"):
            Translations(scale)
    for axes in ((), (0, 0), (3,), (-1,)):
        with pytest.raises(AceError, match="axes"):
            Translations(axes=axes)
    with pytest.raises(AceError, match="normal"):
        Reflections((0.0, 0.0, 0.0))
    with pytest.raises(AceError, match="axis"):
        Tilts((0.0, 0.0, 0.0))
    with pytest.raises(AceError, match="different groups"):
        so3 @ shuffle


def test_importing_does_not_import_e3nn() -> None:
    code = "import sys, ace.groups, ace.metrics; sys.exit(any(m.split('.')[0] == 'e3nn' for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)
