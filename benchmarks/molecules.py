"""Published data on molecules: found, verified, downloaded, converted to arrays.

QM9 is laid out as ``qm9/qm9_30k.npz`` (`load_qm9`), molecular dynamics as the files in ``md/`` (`load_md`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ace.errors import DataError
from benchmarks.data import cache_folder, checksum, explain_file, find_file, load_arrays, load_file, save_arrays, verify

ELEMENTS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}

QM9_ARRAYS = ("index", "atom_offset", "Z", "pos", "targets", "split")
QM9_SIZE = 130_831
"""Molecules of QM9 less the 3,054 that failed its consistency check."""
QM9_DRAWN = "92ded2a3e0fbd7a982b9a0ffc5bd4de4425c9c9c6e0c142f605290100c39beb6"
"""`checksum` of `composition` of the 30,000 molecules of ``qm9_30k.npz``."""
QM9_SEED = 20250531
EV = 1 / 27.211386246
"""One eV in Hartree."""
QM9_HOW = (
    "Build it from the 130,831 molecules of QM9: benchmarks.molecules.drawn says which 30,000, load_qm9 how they "
    "are laid out. Or take all: `ace data qm9` downloads them through torch-geometric, task.full=true reads them."
)

MD_ORIGIN = "https://raw.githubusercontent.com/davkovacs/BOTNet-datasets/29e6d467317e4b5967b7ea5cbee54de953fa0d45"
"""Repository (MIT licence) and commit that the molecular dynamics sets are downloaded from."""
MD_HOW = "Run `ace data md` to download it."


class MDFile(NamedTuple):
    """One molecule: the file of its arrays, and the published file of each set."""

    stem: str
    sets: dict[str, str]


MD_FILES = {
    "ethanol": MDFile(
        "rmd17_ethanol_botnet", {"train": "dataset_ethanol/train.xyz", "test": "dataset_ethanol/test_MD.xyz"}
    ),
    "acac": MDFile(
        "acac",
        {name: f"dataset_acac/{name}.xyz" for name in ("train_300K", "test_MD_300K", "test_MD_600K")},
    ),
    "3bpa": MDFile("3bpa_train", {name: f"dataset_3BPA/{name}.xyz" for name in ("train_300K", "train_mixedT")}),
}


def load_qm9(full: bool = False) -> dict[str, np.ndarray]:
    """QM9, verified.

    Args:
        full: All molecules, from the cache folder, instead of the 30,000 of ``qm9/qm9_30k.npz``.

    Returns:
        index, number of each molecule in the data base, from 1; atom_offset (molecules + 1,); Z and pos (Å) of all
        atoms; targets (molecules, 12) float64: mu alpha homo lumo gap r2 zpve U0 U H G Cv in Debye, Bohr^3, Hartree,
        Bohr^2 and cal/(mol K); split, 0 train, 1 validation, 2 test.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    if not full:
        return load_file("qm9/qm9_30k.npz", QM9_ARRAYS, QM9_HOW)
    path = cache_folder() / "qm9" / "qm9_full.npz"
    if not path.is_file():
        raise DataError(f"{path} is not there. Run `ace data qm9` to download all molecules of QM9.")
    return load_arrays(path)


def qm9_available() -> tuple[bool, str]:
    """Whether the 30,000 molecules are there and, if not, what to do."""
    return (True, "") if find_file("qm9/qm9_30k.npz") else (False, explain_file("qm9/qm9_30k.npz", QM9_HOW))


def load_md(molecule: str) -> dict[str, np.ndarray]:
    """Molecular dynamics of one molecule, verified.

    Args:
        molecule: A key of `MD_FILES`.

    Returns:
        z (atoms,) and for each set its ``_R`` (n, atoms, 3) in Å, ``_E`` (n,) in eV and ``_F`` (n, atoms, 3) in eV/Å.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    stem, sets = MD_FILES[molecule]
    return load_file(f"md/{stem}.npz", ("z", *(f"{name}_{part}" for name in sets for part in "REF")), MD_HOW)


def md_available() -> tuple[bool, str]:
    """Whether the data of all molecules are there and, if not, what to do."""
    missing = [name for name in (f"md/{file.stem}.npz" for file in MD_FILES.values()) if not find_file(name)]
    return (False, explain_file(missing[0], MD_HOW)) if missing else (True, "")


def download_md(origin: str = MD_ORIGIN) -> Path:
    """Download the molecular dynamics sets, convert and verify them.

    Args:
        origin: Address that the published files are below.

    Returns:
        The folder ``md`` of the cache folder.

    Raises:
        DataError: No connection, or what arrived is not the published data; files before that one are kept.
    """
    import pooch  # needed for downloads only

    pooch.get_logger().setLevel("WARNING")
    target = cache_folder() / "md"
    for stem, sets in MD_FILES.values():
        arrays: dict[str, np.ndarray] = {}
        for name, file in sets.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    text = Path(pooch.retrieve(f"{origin}/{file}", known_hash=None, path=folder)).read_text()
                except OSError as error:  # also every error of requests
                    raise DataError(f"{origin}/{file} could not be downloaded ({error})") from error
            arrays |= {part if part == "z" else f"{name}_{part}": value for part, value in read_xyz(text, file).items()}
        verify(stem, arrays, origin)
        save_arrays(target / f"{stem}.npz", arrays)
    return target


def read_xyz(text: str, source: str) -> dict[str, np.ndarray]:
    r"""Read configurations of one molecule from an extended XYZ file; isolated atoms among them are left out.

    Args:
        text: The file: for each configuration the number of atoms, a line with ``energy=``, and for each atom its
            symbol, position and force.
        source: Its name, for the message.

    Returns:
        z, R, E and F, as in `load_md`.

    Raises:
        DataError: It is laid out otherwise.

    Example:
        >>> water = "2\nProperties=species:S:1:pos:R:3:forces:R:3 energy=-1.5\nO 0 0 0 1 0 0\nH 0 0 1 -1 0 0"
        >>> found = read_xyz(water, "water.xyz")
        >>> found["z"].tolist(), found["E"].tolist(), found["R"].shape
        ([8, 1], [-1.5], (1, 2, 3))
    """
    numbers = {symbol: z for z, symbol in ELEMENTS.items()}
    lines = text.splitlines()
    z, found = None, list[tuple[float, np.ndarray]]()
    try:
        start = 0
        while start < len(lines) and lines[start].strip():
            count = int(lines[start])
            energy = re.search(r"(?:^|\s)energy=(\S+)", lines[start + 1])
            rows = [line.split() for line in lines[start + 2 : start + 2 + count]]
            start += 2 + count
            if count == 1:
                continue
            z = np.array([numbers[row[0]] for row in rows], dtype=np.uint8)
            assert energy is not None
            found.append((float(energy[1]), np.array([row[1:7] for row in rows], dtype=float)))
        values = np.stack([value for _, value in found]).astype(np.float32)
    except (ValueError, KeyError, IndexError, AssertionError) as error:
        raise DataError(f"{source} is not laid out as published ({error!r})") from error
    assert z is not None
    return {"z": z, "R": values[..., :3], "E": np.array([e for e, _ in found]), "F": values[..., 3:]}


def download_qm9() -> Path:
    """Download all of QM9 through torch-geometric, convert it and verify which molecules it holds.

    Beside ``qm9_full.npz`` the 30,000 molecules of the default are *not* written: torch-geometric's coordinates have
    fewer digits than those of ``qm9_30k.npz``, so that results would differ in the last ones.

    Returns:
        The file written into the cache folder, ``qm9/qm9_full.npz``.

    Raises:
        DataError: No connection, or what arrived is not QM9.
    """
    from torch_geometric.datasets import QM9  # slow to import

    path = cache_folder() / "qm9" / "qm9_full.npz"
    try:
        molecules = QM9(str(path.parent / "pyg"))
        arrays = qm9_arrays(list(molecules))
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise DataError(f"torch-geometric could not download or read QM9 ({error})") from error
    verify_molecules(arrays)
    save_arrays(path, arrays)
    return path


def qm9_arrays(molecules: Sequence[Any]) -> dict[str, np.ndarray]:
    """Lay out molecules of torch-geometric's ``QM9`` as `load_qm9` returns them.

    The energies U0, U, H and G are stored there in single precision, which at -10,000 eV is 1 meV. The energies of
    atomisation (12 to 15) keep more digits and differ by a constant for each atom, so they stand in for them.

    Args:
        molecules: With ``z``, ``pos``, ``y`` (1, 19) and ``idx``, in the order of the data base.
    """
    raw = np.concatenate([molecule.y.numpy() for molecule in molecules]).astype(np.float64)
    targets = raw[:, [*range(7), 12, 13, 14, 15, 11]]
    targets[:, [2, 3, 4, 6, 7, 8, 9, 10]] *= EV
    order = np.random.default_rng(QM9_SEED).permutation(len(molecules))
    split = np.full(len(molecules), 2, dtype=np.uint8)
    train, valid = round(0.84 * len(molecules)), round(0.92 * len(molecules))
    split[order[:train]], split[order[train:valid]] = 0, 1
    return {
        "index": np.array([int(molecule.idx) + 1 for molecule in molecules], dtype=np.int32),
        "atom_offset": np.cumsum([0, *(len(molecule.z) for molecule in molecules)]).astype(np.int32),
        "Z": np.concatenate([molecule.z.numpy() for molecule in molecules]).astype(np.uint8),
        "pos": np.concatenate([molecule.pos.numpy() for molecule in molecules]).astype(np.float32),
        "targets": targets,
        "split": split,
    }


def drawn(size: int = QM9_SIZE, count: int = 30_000) -> np.ndarray:
    """Rows of the molecules of ``qm9_30k.npz`` among all molecules, ascending."""
    return np.sort(np.random.default_rng(QM9_SEED).permutation(size)[:count])


def composition(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Numbers of some molecules and their atoms, sorted within each molecule: what no conversion changes."""
    start = arrays["atom_offset"]
    atoms = [np.sort(arrays["Z"][start[row] : start[row + 1]]) for row in rows]
    return {
        "index": arrays["index"][rows].astype(np.int64),
        "sizes": np.array([len(each) for each in atoms]),
        "Z": np.concatenate(atoms).astype(np.uint8),
    }


def verify_molecules(arrays: Mapping[str, np.ndarray]) -> None:
    """Compare the molecules with those of ``qm9_30k.npz``.

    Args:
        arrays: All of QM9.

    Raises:
        DataError: They differ.
    """
    molecules = len(arrays["index"])
    found = checksum(composition(arrays, drawn())) if molecules == QM9_SIZE else ""
    if found != QM9_DRAWN:
        raise DataError(
            f"what torch-geometric downloaded is not QM9 as published: {molecules} molecules (expected {QM9_SIZE}), "
            f"checksum {found!r} of the 30,000 that are compared (expected {QM9_DRAWN!r})"
        )
