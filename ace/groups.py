"""Symmetry groups: sample elements, list generators, and act with either on typed tensors.

A *type* says how a tensor transforms:

=================  =====================================================================================
``scalar``         unchanged by every geometric group; one row per node, so permuted by `Permutations`
``vector``         last axis is a vector: g x
``pseudovector``   last axis is an axial vector (angular momentum, a cross product): det(g) g x
``position``       last axis is a point: g x + t, the only type that translations move
``image``          last two axes are a plane of pixels: (g f)(p) = f(g⁻¹ p)
``vector_image``   an image whose axis -3 holds (x, y) component pairs: pixels and components both move
``edge_index``     integer node numbers, relabelled by `Permutations`
``invariant``      never touched by any group: edge and graph features
``8x0e+4x1o``      any e3nn irreps string: last axis is the direct sum of those irreps
=================  =====================================================================================

Geometry is computed in float64 and cast to the dtype of the tensor.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ace.errors import AceError

TYPES = ("scalar", "vector", "pseudovector", "position", "image", "vector_image", "edge_index", "invariant")

_VECTORS = ("vector", "pseudovector", "position")
_IMAGES = ("image", "vector_image")
_IRREP = re.compile(r"\s*(?:(\d+)\s*x\s*)?(\d+)([eo])\s*")
_LARGEST_DEGREE = 11  # e3nn's spherical harmonics stop here


@dataclass(frozen=True, eq=False)
class Element:
    """A group element: a linear map of space, a translation, a permutation of the nodes.

    A part that the group does not have is ``None``. ``g @ h`` is the product (h acts first; both
    from the same group) and ``g.inverse()`` the inverse.

    Attributes:
        matrix: Orthogonal map of 3-vectors, shape (3, 3), float64.
        plane: The same element on 2-vectors, shape (2, 2), float64; groups that have an action on the plane only.
        translation: Shift of positions, shape (3,), float64, in the unit of the positions.
        permutation: Node i moves to place ``permutation[i]``, shape (nodes,), int64.

    Example:
        >>> g, h = SO3().sample(2)
        >>> bool(torch.allclose((g @ h).matrix, g.matrix @ h.matrix))
        True
    """

    matrix: Tensor | None = None
    plane: Tensor | None = None
    translation: Tensor | None = None
    permutation: Tensor | None = None

    def __matmul__(self, other: Element) -> Element:
        if self._parts() != other._parts():
            raise AceError(f"elements of different groups have no product: {self._parts()} and {other._parts()}")
        matrix = plane = translation = permutation = None
        if self.matrix is not None and other.matrix is not None:
            matrix = self.matrix @ other.matrix
            if self.translation is not None and other.translation is not None:
                translation = self.matrix @ other.translation + self.translation
        if self.plane is not None and other.plane is not None:
            plane = self.plane @ other.plane
        if self.permutation is not None and other.permutation is not None:
            permutation = self.permutation[other.permutation]
        return Element(matrix, plane, translation, permutation)

    def _parts(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def inverse(self) -> Element:
        """The element h with ``g @ h`` = ``h @ g`` = identity."""
        matrix = plane = translation = permutation = None
        if self.matrix is not None:
            matrix = self.matrix.T
            if self.translation is not None:
                translation = -matrix @ self.translation
        if self.plane is not None:
            plane = self.plane.T
        if self.permutation is not None:
            permutation = torch.argsort(self.permutation)
        return Element(matrix, plane, translation, permutation)


@dataclass(frozen=True, eq=False)
class Generator:
    """A basis element X of the Lie algebra: exp(tX) is an element of the group for every t.

    Rotations turn by one radian per unit of t, translations move by one unit of length.

    Attributes:
        matrix: Antisymmetric, shape (3, 3), float64; zero for a translation.
        plane: The same generator on 2-vectors, shape (2, 2), float64; groups that have an action on the plane only.
        translation: Velocity of positions, shape (3,), float64; groups with translations only.
    """

    matrix: Tensor
    plane: Tensor | None = None
    translation: Tensor | None = None


class Group(ABC):
    """Base of the groups: what can be sampled, and differentiated."""

    @abstractmethod
    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:
        """Draw elements uniformly (from Haar measure).

        Args:
            count: How many.
            seed: The same seed gives the same elements; the global random state is not touched.
            nodes: Number of nodes; needed by `Permutations`, not used by the other groups.

        Returns:
            ``count`` elements. Finite geometric groups are drawn without repetition until every
            element has come once, then again: ``count`` = order of the group covers it.

        Raises:
            AceError: `Permutations` without ``nodes``.
        """

    def generators(self) -> list[Generator]:
        """A basis of the Lie algebra; empty for a finite group."""
        return []


class _AboutAxis(Group):
    """Groups of the plane; on 3-vectors the plane is the one perpendicular to ``axis``.

    A mirror of the plane is, in space, a mirror in a plane that contains the axis (determinant -1).
    """

    axis: tuple[float, float, float]

    def __post_init__(self) -> None:
        _check_direction("axis", self.axis)

    def _elements(self, planes: list[Tensor]) -> list[Element]:
        frame = _frame(self.axis)
        across, still = frame[:, :2], torch.outer(frame[:, 2], frame[:, 2])
        return [Element(across @ plane @ across.T + still, plane) for plane in planes]


@dataclass(frozen=True)
class SO2(_AboutAxis):
    """Rotations about an axis: of 3-vectors about ``axis``, of 2-vectors and images in their plane.

    Args:
        axis: Direction of the axis in space, any length.

    Raises:
        AceError: The axis is not a direction.

    Example:
        >>> [turn] = SO2().generators()
        >>> act_generator(turn, torch.tensor([[1.0, 0.0, 5.0]]), "vector")
        tensor([[0., 1., 0.]])
    """

    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __str__(self) -> str:
        return "SO(2)"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        angles = 2 * math.pi * torch.rand(count, generator=_random(seed), dtype=torch.float64)
        return self._elements([_turn(angle) for angle in angles.tolist()])

    def generators(self) -> list[Generator]:  # noqa: D102
        plane = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        across = _frame(self.axis)[:, :2]
        return [Generator(across @ plane @ across.T, plane)]


@dataclass(frozen=True)
class SO3(Group):
    """Rotations of 3-vectors.

    Example:
        >>> [g] = SO3().sample(1, seed=3)
        >>> round(float(torch.linalg.det(g.matrix)), 12)
        1.0
    """

    def __str__(self) -> str:
        return "SO(3)"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        return [Element(matrix) for matrix in _rotations(count, _random(seed))]

    def generators(self) -> list[Generator]:  # noqa: D102
        return [Generator(matrix) for matrix in _rotation_generators()]


@dataclass(frozen=True)
class O3(Group):
    """Rotations and reflections of 3-vectors: a rotation times ±1, each sign with probability 1/2."""

    def __str__(self) -> str:
        return "O(3)"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        return [Element(matrix) for matrix in _orthogonal(count, _random(seed))]

    def generators(self) -> list[Generator]:  # noqa: D102
        return [Generator(matrix) for matrix in _rotation_generators()]


@dataclass(frozen=True)
class Tilts(Group):
    r"""Rotations about the axes perpendicular to ``axis``: what is left of SO(3) beside the rotations about ``axis``.

    Every rotation is one turn about ``axis`` and then one tilt, in one way (but for tilts by π). The tilts are a set
    and **no group**: two of them make a turn about ``axis``, so a model that is exactly equivariant under all tilts is
    so under SO(3). A *measured* error is another matter: together with ``SO2(axis)`` it tells a break in the
    vertical from one that is not.

    Drawn such that the tilted axis is uniform on the sphere: a tilt after a uniform turn is a uniform rotation.

    Args:
        axis: Direction of the axis in space, any length.

    Raises:
        AceError: The axis is not a direction.

    Example:
        >>> [g] = Tilts().sample(1)
        >>> bool(torch.isclose(g.matrix[0, 1], g.matrix[1, 0]))  # no turn about z
        True
    """

    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        _check_direction("axis", self.axis)

    def __str__(self) -> str:
        return "tilts"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        first, second = (generator.matrix for generator in self.generators())
        height, angle = torch.rand(2, count, generator=_random(seed), dtype=torch.float64)
        identity, elements = torch.eye(3, dtype=torch.float64), []
        for cos, phi in zip((1 - 2 * height).tolist(), (2 * math.pi * angle).tolist(), strict=True):
            about = math.cos(phi) * first + math.sin(phi) * second
            elements.append(Element(identity + math.sqrt(1 - cos**2) * about + (1 - cos) * about @ about))
        return elements

    def generators(self) -> list[Generator]:  # noqa: D102
        basis = torch.stack(_rotation_generators())
        return [Generator(torch.tensordot(across, basis, 1)) for across in _frame(self.axis).T[:2]]


@dataclass(frozen=True)
class Translations(Group):
    """Translations, of 3-d points and, along x and y, of 2-d points.

    They have no uniform distribution: theirs is normal with standard deviation ``scale`` on each axis.

    Args:
        scale: Scale of the sampled translations, in the unit of the positions.
        axes: Numbers of the coordinates that are shifted.

    Raises:
        AceError: A negative or infinite scale, or axes other than 0, 1 and 2.

    Example:
        >>> [g] = Translations(axes=(0, 1)).sample(1)
        >>> (act(g, torch.zeros(3), "position") != 0).tolist()
        [True, True, False]
    """

    scale: float = 1.0
    axes: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)
        if not self.axes or sorted(set(self.axes) & {0, 1, 2}) != sorted(self.axes):
            raise AceError(f"axes must be some of 0, 1 and 2, each once; found {self.axes!r}")

    def __str__(self) -> str:
        return "translations"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        along = torch.eye(3, dtype=torch.float64)[list(self.axes)]
        shifts = torch.randn(count, len(self.axes), generator=_random(seed), dtype=torch.float64) @ along
        still, flat = torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        return [Element(still, flat, self.scale * shift) for shift in shifts]

    def generators(self) -> list[Generator]:  # noqa: D102
        still, flat = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        return [Generator(still, flat, along) for along in torch.eye(3, dtype=torch.float64)[list(self.axes)]]


@dataclass(frozen=True)
class E3(Group):
    """Rotations, reflections and translations of 3-vectors.

    Translations have no uniform distribution: theirs is normal with standard deviation
    ``translation`` on each axis.

    Args:
        translation: Scale of the sampled translations, in the unit of the positions.

    Raises:
        AceError: A negative or infinite scale.

    Example:
        >>> [g] = E3(translation=10.0).sample(1)
        >>> x = torch.zeros(2, 3)
        >>> bool(act(g, x, "position").any()), bool(act(g, x, "vector").any())
        (True, False)
    """

    translation: float = 1.0

    def __post_init__(self) -> None:
        _check_scale("translation", self.translation)

    def __str__(self) -> str:
        return "E(3)"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        generator = _random(seed)
        matrices = _orthogonal(count, generator)
        shifts = self.translation * torch.randn(count, 3, generator=generator, dtype=torch.float64)
        return [Element(matrix, translation=shift) for matrix, shift in zip(matrices, shifts, strict=True)]

    def generators(self) -> list[Generator]:  # noqa: D102
        still = torch.zeros(3, dtype=torch.float64)
        rotations = [Generator(matrix, translation=still) for matrix in _rotation_generators()]
        shifts = torch.eye(3, dtype=torch.float64)
        return rotations + [Generator(torch.zeros_like(shifts), translation=shift) for shift in shifts]


@dataclass(frozen=True)
class Cyclic(_AboutAxis):
    """The n rotations by multiples of 2π/n about an axis, C_n.

    On images, quarter turns are exact (pixels are moved); any other angle is bilinear interpolation
    with zeros outside, so even an equivariant model shows an interpolation error there.

    Args:
        n: Order of the group.
        axis: Direction of the axis in space, any length.

    Raises:
        AceError: ``n`` < 1, or the axis is not a direction.

    Example:
        >>> image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> sorted(act(g, image, "image").flatten().tolist() for g in Cyclic(2).sample(2))
        [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]
    """

    n: int
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self.n)

    def __str__(self) -> str:
        return f"C_{self.n}"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        steps = _covering(self.n, count, _random(seed))
        return self._elements([_turn(2 * math.pi * step / self.n) for step in steps])


@dataclass(frozen=True)
class Dihedral(_AboutAxis):
    """The n rotations of C_n and their products with the mirror (x, y) -> (x, -y), D_n.

    The order is 2n. On 3-vectors the mirrors contain the axis and have determinant -1 (the point
    group C_nv). On images, quarter turns and their mirrors are exact, the rest is bilinear
    interpolation with zeros outside.

    Args:
        n: Number of rotations.
        axis: Direction of the axis in space, any length.

    Raises:
        AceError: ``n`` < 1, or the axis is not a direction.

    Example:
        >>> sorted(round(float(torch.linalg.det(g.matrix))) for g in Dihedral(2).sample(4))
        [-1, -1, 1, 1]
    """

    n: int
    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self.n)

    def __str__(self) -> str:
        return f"D_{self.n}"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        mirror = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
        planes = []
        for number in _covering(2 * self.n, count, _random(seed)):
            turn = _turn(2 * math.pi * (number % self.n) / self.n)
            planes.append(turn if number < self.n else turn @ mirror)
        return self._elements(planes)


@dataclass(frozen=True)
class Reflections(Group):
    """The mirror in the plane perpendicular to ``normal``, and the identity.

    With a normal in the xy-plane 2-vectors and images are mirrored too; ``Reflections((0, 1, 0))`` is ``Dihedral(1)``.

    Args:
        normal: Direction perpendicular to the mirror, any length.

    Raises:
        AceError: The normal is not a direction.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0])
        >>> sorted(act(g, x, "vector").tolist() for g in Reflections().sample(2))
        [[-1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """

    normal: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        _check_direction("normal", self.normal)

    def __str__(self) -> str:
        return "reflections"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        normal = _frame(self.normal)[:, 2]
        identity = torch.eye(3, dtype=torch.float64)
        matrices = (identity, identity - 2 * torch.outer(normal, normal))
        upright = self.normal[2] == 0
        drawn = (matrices[number] for number in _covering(2, count, _random(seed)))
        return [Element(matrix, matrix[:2, :2] if upright else None) for matrix in drawn]


@dataclass(frozen=True)
class Inversion(Group):
    """The inversion x -> -x, and the identity; O(3) is SO(3) times it.

    Example:
        >>> sorted(float(act(g, torch.ones(3), "vector")[0]) for g in Inversion().sample(2))
        [-1.0, 1.0]
    """

    def __str__(self) -> str:
        return "inversion"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        identity = torch.eye(3, dtype=torch.float64)
        return [Element((1 - 2 * number) * identity) for number in _covering(2, count, _random(seed))]


@dataclass(frozen=True)
class Octahedral(Group):
    """The symmetries of a cube with its faces along the axes, O_h: the 48 signed permutations of the coordinates.

    Example:
        >>> len({tuple(g.matrix.flatten().tolist()) for g in Octahedral().sample(48)})
        48
    """

    def __str__(self) -> str:
        return "O_h"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        orders = itertools.permutations(torch.eye(3, dtype=torch.float64))
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=3)), dtype=torch.float64)
        matrices = [sign[:, None] * torch.stack(rows) for rows in orders for sign in signs]
        return [Element(matrices[number]) for number in _covering(len(matrices), count, _random(seed))]


@dataclass(frozen=True)
class Permutations(Group):
    """Permutations of the nodes, S_n: node i moves to place p[i].

    The nodes are on axis -2 of tensors with two axes or more and on axis 0 of 1-d tensors; images
    have no nodes.

    Example:
        >>> [g] = Permutations().sample(1, nodes=4)
        >>> x, edges = torch.arange(4.0)[:, None], torch.tensor([[0, 1], [2, 3]])
        >>> moved = act(g, x, "scalar")[act(g, edges, "edge_index")]
        >>> bool(torch.equal(moved, x[edges]))
        True
    """

    def __str__(self) -> str:
        return "S_n"

    def sample(self, count: int, seed: int = 0, *, nodes: int | None = None) -> list[Element]:  # noqa: D102
        if nodes is None:
            raise AceError("Permutations().sample needs the number of nodes: pass nodes=")
        generator = _random(seed)
        return [Element(permutation=torch.randperm(nodes, generator=generator)) for _ in range(count)]


def act(element: Element, tensor: Tensor, kind: str) -> Tensor:
    """Transform a tensor by a group element, g · x.

    Differentiable in ``tensor``. Images are planes with x along the last axis and y along the one
    before it, both in the direction of growing indices, the centre of the image being the origin.

    Args:
        element: From `Group.sample`.
        tensor: Features on the last axis (images: on the axes before the last two).
        kind: Its type; see the module's table.

    Returns:
        A tensor of the same dtype and (quarter turns of oblong images aside) the same shape. Where
        nothing moves it is ``tensor`` itself.

    Raises:
        AceError: An unknown type, or one that does not fit the tensor or the group.

    Example:
        >>> [g] = O3().sample(1)
        >>> x = torch.randn(5, 3)
        >>> bool(torch.allclose(act(g, x, "vector"), act(g, x, "1o"), atol=1e-6))
        True
    """
    _refuse(finding(element, tensor, kind))
    if kind == "invariant":
        return tensor
    permutation = element.permutation
    if kind == "edge_index":
        return tensor if permutation is None else permutation.to(tensor.device)[tensor].to(tensor.dtype)
    if element.matrix is not None and kind != "scalar":
        tensor = _move(element, tensor, kind)
    if permutation is not None and kind not in _IMAGES and tensor.ndim > 0:
        origin = torch.argsort(permutation).to(tensor.device)
        tensor = tensor.index_select(max(tensor.ndim - 2, 0), origin)
    return tensor


def act_generator(generator: Generator, tensor: Tensor, kind: str) -> Tensor:
    """Infinitesimal action of a generator, X · x = d/dt exp(tX) · x at t = 0.

    Args:
        generator: From `Group.generators`.
        tensor: Features on the last axis.
        kind: Its type; images have no infinitesimal action.

    Returns:
        The velocity of every entry, same shape and dtype as ``tensor``.

    Raises:
        AceError: An unknown type, or one that does not fit the tensor or the group.

    Example:
        >>> about_z = SO3().generators()[2]
        >>> act_generator(about_z, torch.tensor([1.0, 0.0, 0.0]), "vector")
        tensor([0., 1., 0.])
    """
    _refuse(finding(generator, tensor, kind))
    if kind in ("scalar", "invariant", "edge_index"):
        return torch.zeros_like(tensor)
    x = tensor.double()
    if kind not in _VECTORS:
        blocks = [_wigner_generator(degree, generator.matrix) for _, degree, _ in _irreps(kind)]
        return _by_blocks(kind, blocks, x).to(tensor.dtype)
    moved = x @ _linear(generator, x).T
    if kind == "position" and generator.translation is not None:
        moved = moved + generator.translation[: x.shape[-1]].to(x.device)
    return moved.to(tensor.dtype)


def finding(motion: Element | Generator, tensor: Tensor, kind: str) -> str | None:
    """What keeps a tensor from being of a type under an element or generator.

    Args:
        motion: What would act.
        tensor: On what.
        kind: Its claimed type.

    Returns:
        A sentence, or ``None`` if the action is defined.

    Example:
        >>> finding(SO3().sample(1)[0], torch.ones(4, 2), "vector")
        "type 'vector' needs a last axis of size 3, but the shape is (4, 2)"
        >>> print(finding(SO3().sample(1)[0], torch.ones(4, 3), "vectr").split(";")[0])
        unknown type 'vectr', did you mean 'vector'?
    """
    irreps = None if kind in TYPES else _irreps(kind)
    if irreps == []:
        near = difflib.get_close_matches(kind, TYPES, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else ""
        return f"unknown type {kind!r}{hint}; valid: {', '.join(TYPES)}, or e3nn irreps such as '8x0e+4x1o'"
    if kind == "invariant":
        return None
    shape = tuple(tensor.shape)
    if isinstance(motion, Element) and motion.permutation is not None:
        return _node_finding(len(motion.permutation), tensor, kind)
    if kind in ("scalar", "edge_index"):
        return None
    if not tensor.is_floating_point():
        return f"type {kind!r} needs floating point numbers, but the dtype is {tensor.dtype}"
    if kind in _IMAGES:
        return _image_finding(motion, shape, kind)
    if irreps is not None:
        if max(degree for _, degree, _ in irreps) > _LARGEST_DEGREE:
            return f"irreps {kind!r} exceed l = {_LARGEST_DEGREE}, the largest that is supported"
        sizes = [sum(copies * (2 * degree + 1) for copies, degree, _ in irreps)]
    else:
        sizes = [3] if motion.plane is None else [2, 3]
    if not shape or shape[-1] not in sizes:
        wanted = " or ".join(map(str, sizes))
        return f"type {kind!r} needs a last axis of size {wanted}, but the shape is {shape}"
    return None


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """Derivative of a function at ``primals`` along ``tangents``, in forward mode.

    Args:
        function: Maps tensors to a tensor or a tuple of tensors.
        primals: Where.
        tangents: Along what, of the same shapes.

    Returns:
        The derivative, of the structure of the function's value.

    Example:
        >>> jvp(torch.square, (torch.tensor(3.0),), (torch.tensor(1.0),))
        tensor(6.)
    """
    with warnings.catch_warnings():
        # torch scripts its forward-mode decompositions on first use, and warns of its own scripting
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        return torch.func.jvp(function, primals, tangents)[1]


def _node_finding(nodes: int, tensor: Tensor, kind: str) -> str | None:
    if kind == "edge_index":
        if tensor.is_floating_point():
            return f"type 'edge_index' needs integers, but the dtype is {tensor.dtype}"
        return None
    if kind in _IMAGES or tensor.ndim == 0:
        return None
    axis = max(tensor.ndim - 2, 0)
    if tensor.shape[axis] == nodes:
        return None
    return (
        f"type {kind!r} has one entry per node on axis {axis}, but the shape is {tuple(tensor.shape)} "
        f"and there are {nodes} nodes; edge and graph features are 'invariant'"
    )


def _image_finding(motion: Element | Generator, shape: tuple[int, ...], kind: str) -> str | None:
    if isinstance(motion, Generator):
        return f"type {kind!r} has no infinitesimal action on pixels; measure finite elements instead"
    if motion.plane is None or motion.translation is not None:
        return (
            f"type {kind!r} is moved by groups of the plane only: SO2, Cyclic, Dihedral, and Reflections with a normal "
            "in the xy-plane"
        )
    if len(shape) < 2:
        return f"type {kind!r} needs two axes of pixels, but the shape is {shape}"
    if kind == "vector_image" and (len(shape) < 3 or shape[-3] % 2):
        return f"type {kind!r} needs (x, y) pairs on axis -3, but the shape is {shape}"
    return None


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise AceError(f"cannot act on this tensor: {problem}")


def _move(element: Element, tensor: Tensor, kind: str) -> Tensor:
    """Action of the geometric part of an element, computed in float64."""
    x = tensor.double()
    if kind in _IMAGES:
        assert element.plane is not None  # `finding` has refused the others
        x = _move_pixels(element.plane, x)
        if kind == "vector_image":
            pairs = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
            x = torch.einsum("ab,...bhw->...ahw", element.plane.to(x.device), pairs).flatten(-4, -3)
    elif kind in _VECTORS:
        linear = _linear(element, x)
        x = x @ linear.T
        if kind == "pseudovector":
            x = x * torch.linalg.det(linear).round()
        if kind == "position" and element.translation is not None:
            x = x + element.translation[: x.shape[-1]].to(x.device)
    else:
        assert element.matrix is not None  # the caller has checked
        sign = int(torch.linalg.det(element.matrix).round())
        blocks = [
            _wigner(degree, sign * element.matrix) * (sign if parity == "o" else 1)
            for _, degree, parity in _irreps(kind)
        ]
        x = _by_blocks(kind, blocks, x)
    return x.to(tensor.dtype)


def _linear(motion: Element | Generator, x: Tensor) -> Tensor:
    linear = motion.plane if x.shape[-1] == 2 else motion.matrix
    assert linear is not None  # `finding` has refused the others
    return linear.to(x.device)


def _move_pixels(plane: Tensor, image: Tensor) -> Tensor:
    """(g f)(p) = f(g⁻¹ p): exact for quarter turns and their mirrors, else bilinear."""
    if torch.allclose(plane, plane.round(), rtol=0.0, atol=1e-9):
        if torch.linalg.det(plane) < 0:
            image = image.flip(-2)
        quarters = round(math.atan2(float(plane[1, 0]), float(plane[0, 0])) / (math.pi / 2))
        return torch.rot90(image, quarters, dims=(-1, -2))
    height, width = image.shape[-2:]
    half = torch.tensor([width, height], dtype=image.dtype)  # grid_sample's unit is half a side
    theta = plane.T * half[None, :] / half[:, None]
    theta = torch.cat([theta, torch.zeros(2, 1, dtype=image.dtype)], dim=1)[None].to(image.device)
    flat = image.reshape(1, -1, height, width)
    grid = torch.nn.functional.affine_grid(theta, list(flat.shape), align_corners=False)
    return torch.nn.functional.grid_sample(flat, grid, align_corners=False).reshape(image.shape)


def _irreps(text: str) -> list[tuple[int, int, str]]:
    """Parse ``8x0e+4x1o`` to [(8, 0, "e"), (4, 1, "o")]; empty if it is not an irreps string."""
    matches = [_IRREP.fullmatch(part) for part in text.split("+")]
    return [
        (int(match[1] or 1), int(match[2]), match[3]) for match in matches if match is not None and None not in matches
    ]


def _by_blocks(irreps: str, blocks: Sequence[Tensor], x: Tensor) -> Tensor:
    """Apply one matrix per irrep to its copies along the last axis."""
    parts, start = [], 0
    for (copies, degree, _), block in zip(_irreps(irreps), blocks, strict=True):
        size = copies * (2 * degree + 1)
        part = x[..., start : start + size].reshape(*x.shape[:-1], copies, 2 * degree + 1)
        parts.append((part @ block.T.to(x.device)).flatten(-2))
        start += size
    return torch.cat(parts, dim=-1)


def _wigner(degree: int, rotation: Tensor) -> Tensor:
    """Wigner matrix in e3nn's basis, from its defining relation Y(R p) = D(R) Y(p) on fixed points.

    e3nn's own ``wigner_D`` builds on generators in the default dtype and on Euler angles: in float32
    it is good to 1e-6. This is good to 1e-13 whatever the default dtype.
    """
    harmonics, points, inverse = _harmonics(degree)
    return (inverse @ harmonics(points @ rotation.T)).T


def _wigner_generator(degree: int, generator: Tensor) -> Tensor:
    """Derivative of `_wigner` at the identity along an antisymmetric matrix."""
    harmonics, points, inverse = _harmonics(degree)
    slope: Tensor = jvp(harmonics, (points,), (points @ generator.T,))
    return (inverse @ slope).T


def _harmonics(degree: int) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """e3nn's harmonics Y of one degree, points in general position, and the pseudo-inverse of Y there."""
    from e3nn import o3  # here, so that importing ace does not import e3nn

    def harmonics(points: Tensor) -> Tensor:
        values: Tensor = o3.spherical_harmonics(degree, points, normalize=False)
        return values

    points = torch.randn(4 * degree + 10, 3, generator=_random(0), dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True)
    return harmonics, points, torch.linalg.pinv(harmonics(points))


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rotations(count: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed rotations, (count, 3, 3): a uniform point of the 3-sphere as unit quaternion."""
    q = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _orthogonal(count: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed elements of O(3), (count, 3, 3): a rotation times a fair sign."""
    rotations = _rotations(count, generator)
    signs = 1 - 2 * torch.randint(2, (count, 1, 1), generator=generator)
    return signs * rotations


def _rotation_generators() -> list[Tensor]:
    """The generators L_x, L_y, L_z with L_i v = e_i × v."""
    basis = torch.eye(3, dtype=torch.float64)
    return [torch.linalg.cross(axis.expand(3, 3), basis).T for axis in basis]


def _turn(angle: float) -> Tensor:
    """Rotation of the plane; quarter turns come out exact."""
    cos, sin = (round(x) if abs(x - round(x)) < 1e-14 else x for x in (math.cos(angle), math.sin(angle)))
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


def _covering(order: int, count: int, generator: torch.Generator) -> list[int]:
    """Uniform draws from 0..order-1 that run through all of them before one comes again."""
    rounds = [torch.randperm(order, generator=generator) for _ in range(-(-count // order))]
    return [int(number) for permutation in rounds for number in permutation][:count]


def _frame(axis: tuple[float, float, float]) -> Tensor:
    """Right-handed orthonormal columns (u, v, axis); (x, y, z) itself for the z axis."""
    last = torch.tensor(axis, dtype=torch.float64)
    last = last / last.norm()
    start = torch.eye(3, dtype=torch.float64)[(int(last.abs().argmax()) + 1) % 3]
    u = start - (start @ last) * last
    u = u / u.norm()
    return torch.stack([u, torch.linalg.cross(last, u), last], dim=1)


def _check_direction(name: str, value: tuple[float, float, float]) -> None:
    if len(value) != 3 or not 0 < math.hypot(*value) < math.inf:
        raise AceError(f"{name} must be three finite numbers, not all zero; found {value!r}")


def _check_scale(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise AceError(f"{name} must be a finite scale >= 0; found {value!r}")


def _check_order(n: int) -> None:
    if n < 1:
        raise AceError(f"n must be a number of rotations >= 1; found {n!r}")
