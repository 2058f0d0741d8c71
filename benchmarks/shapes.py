"""Point clouds of the shapes of ModelNet: out of voxel grids (ModelNet10) and out of triangle meshes (ModelNet40).

The shapes come from the internet and are provided by Princeton for academic research; copyright stays with their
authors. So they are downloaded, never distributed with this repository.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ace.errors import DataError
from benchmarks.data import (
    cache_folder,
    explain_file,
    find_file,
    load_arrays,
    load_file,
    retrieve,
    retry,
    save_arrays,
    verify,
)

VOXELS = (
    "https://raw.githubusercontent.com/amitregmi/VoxNet-Google-Colab/"
    "2b66a4ddfac20dc6224fd2ed9b4da337525f29d6/data/modelnet10.npz"
)
"""ModelNet10 as voxel grids (X_train, y_train, X_test, y_test), 24 cells along the longest side."""
MESHES = "https://modelnet.cs.princeton.edu/ModelNet40.zip"
MESHES_SHA256 = "42dc3e656932e387f554e25a4eb2cc0e1a1bd3ab54606e2a9eae444c60e536ac"
ARRAYS = ("train_points", "train_label", "test_points", "test_label")
FILES = {10: "modelnet10/modelnet10_points.npz", 40: "modelnet40/modelnet40_points.npz"}
HOW = {classes: f"Run `ace data modelnet{classes}` to download it." for classes in FILES}
MOST_POINTS = {10: 512, 40: 1024}
SPLITS = ("train", "test")


def load_shapes(classes: int) -> dict[str, np.ndarray]:
    """Clouds and classes of the official splits, verified.

    Args:
        classes: 10 or 40.

    Returns:
        ``train_points`` and ``test_points``, shape (shapes, most, 3), of which the first k are a cloud of k points for
        every k; ``train_label`` and ``test_label``, shape (shapes,). Points are cells of a grid of 24³ (ModelNet10,
        uint8, most = 512, the third axis up) or on the surface of a mesh (ModelNet40, float32, most = 1024).

    Raises:
        DataError: Not found, unreadable, or altered.
    """
    if classes == 10:
        return load_file(FILES[10], ARRAYS, HOW[10])
    path = find_file(FILES[classes])
    if path is None:
        raise DataError(explain_file(FILES[classes], HOW[classes]))
    return load_arrays(path)


def download_modelnet10(origin: str = VOXELS) -> Path:
    """Download the voxel grids of ModelNet10, make point clouds of them and verify these.

    Args:
        origin: Address of the file.

    Returns:
        The file written into the cache folder.

    Raises:
        DataError: No connection, or what arrived are not the published grids. Nothing is written then.
    """
    advice = retry(FILES[10], "modelnet10")
    with tempfile.TemporaryDirectory() as folder:
        file = retrieve(origin, folder, FILES[10], "modelnet10")
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {
                    name: array
                    for split in SPLITS
                    for name, array in _from_grids(stored[f"X_{split}"], stored[f"y_{split}"], split).items()
                }
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{origin} is not laid out as published ({error!r}). {advice}") from error
    verify("modelnet10_points", arrays, origin, advice)
    path = cache_folder() / FILES[10]
    save_arrays(path, arrays)
    return path


def download_modelnet40(origin: str = MESHES, sha256: str = MESHES_SHA256) -> Path:
    """Download the meshes of ModelNet40, verify them, and draw a point cloud on each (about 2 GB, minutes).

    Args:
        origin: Address of the archive.
        sha256: Its checksum.

    Returns:
        The file written into the cache folder.

    Raises:
        DataError: No connection, or what arrived is not the published archive. Nothing is written then.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = retrieve(origin, folder, FILES[40], "modelnet40")
        found = _sha256(file)
        if found != sha256:
            advice = retry(FILES[40], "modelnet40")
            raise DataError(f"{origin} is not the published archive: SHA-256 {found}, expected {sha256}. {advice}")
        with zipfile.ZipFile(file) as archive:
            arrays = _from_meshes(archive)
    path = cache_folder() / FILES[40]
    save_arrays(path, arrays)
    return path


def surface_points(grid: np.ndarray, most: int) -> np.ndarray:
    """Cells on the surface of a voxel grid, in the order of farthest point sampling.

    On the surface is an occupied cell with a free one (or the end of the grid) across one of its six faces. The first
    point is the one farthest from the mean of all, each next one the one farthest from those before; of several, the
    first in the order of the grid. If there are fewer than ``most``, they are repeated in turn.

    Args:
        grid: Occupancy, three axes, bool, not empty.
        most: Number of points.

    Returns:
        Indices of cells, shape (most, 3).

    Example:
        >>> solid = np.ones((3, 3, 3), dtype=bool)  # all cells but the one inside
        >>> len(np.unique(surface_points(solid, 30), axis=0))
        26
    """
    padded = np.pad(grid, 1)
    inside = grid.copy()
    for axis in range(3):
        for shift in (-1, 1):
            inside &= np.roll(padded, shift, axis)[1:-1, 1:-1, 1:-1]
    cells = np.argwhere(grid & ~inside)
    chosen = [int(np.square(cells - cells.mean(0)).sum(1).argmax())]
    distance = np.square(cells - cells[chosen[0]]).sum(1)
    while len(chosen) < min(most, len(cells)):
        chosen.append(int(distance.argmax()))
        np.minimum(distance, np.square(cells - cells[chosen[-1]]).sum(1), out=distance)
    return cells[np.resize(chosen, most)]


def mesh_points(vertices: np.ndarray, triangles: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw points uniformly on the surface of a mesh.

    Args:
        vertices: Shape (v, 3).
        triangles: Indices of vertices, shape (t, 3).
        count: Number of points.
        generator: Source of randomness.

    Returns:
        Shape (count, 3).

    Example:
        >>> corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
        >>> points = mesh_points(corners, np.array([[0, 1, 2]]), 100, np.random.default_rng(0))
        >>> bool((points >= 0).all() and (points.sum(1) <= 1).all() and (points[:, 2] == 0).all())
        True
    """
    a, b, c = vertices[triangles].swapaxes(0, 1)
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    chosen = generator.choice(len(area), count, p=area / area.sum())
    u, v = generator.random((2, count, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)  # folds the square onto its triangle
    return a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]


def read_off(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    r"""Read a mesh in the Object File Format; the first line may lack its end, as in some files of ModelNet.

    Args:
        content: The file.

    Returns:
        Vertices (v, 3), float64, and triangles (t, 3), int64.

    Raises:
        ValueError: It is not a triangle mesh in this format.

    Example:
        >>> vertices, triangles = read_off(b"OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
        >>> vertices.shape, triangles.tolist()
        ((3, 3), [[0, 1, 2]])
    """
    if not content.startswith(b"OFF"):
        raise ValueError(f"starts with {content[:10]!r} instead of OFF")
    numbers = np.array(content[3:].split(), dtype=np.float64)
    v, t = numbers[:2].astype(int)
    vertices, faces = numbers[3 : 3 + 3 * v].reshape(v, 3), numbers[3 + 3 * v : 3 + 3 * v + 4 * t].reshape(t, 4)
    if (faces[:, 0] != 3).any():
        raise ValueError("has faces that are no triangles")
    return vertices, faces[:, 1:].astype(np.int64)


def _from_grids(grids: np.ndarray, label: np.ndarray, split: str) -> dict[str, np.ndarray]:
    """Clouds of the grids that are not empty, without the three free cells around each."""
    grids = grids[:, 3:-3, 3:-3, 3:-3].astype(bool)
    there = grids.any((1, 2, 3))
    points = [surface_points(grid, MOST_POINTS[10]) for grid in grids[there]]
    return {f"{split}_points": np.stack(points).astype(np.uint8), f"{split}_label": label[there].astype(np.uint8)}


def _from_meshes(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Clouds of the meshes ModelNet40/CLASS/SPLIT/NAME.off of an archive."""
    paths = sorted(name for name in archive.namelist() if name.startswith("ModelNet40/") and name.endswith(".off"))
    classes = sorted({path.split("/")[1] for path in paths})
    arrays = {}
    for number, split in enumerate(SPLITS):
        members = [path for path in paths if path.split("/")[2] == split]
        clouds = np.empty((len(members), MOST_POINTS[40], 3), dtype=np.float32)
        for index, path in enumerate(members):
            try:
                mesh = read_off(archive.read(path))
            except ValueError as error:
                raise DataError(f"{path} {error}") from error
            clouds[index] = mesh_points(*mesh, MOST_POINTS[40], np.random.default_rng([number, index]))
        label = np.array([classes.index(path.split("/")[1]) for path in members], dtype=np.uint8)
        arrays |= {f"{split}_points": clouds, f"{split}_label": label}
    return arrays


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
