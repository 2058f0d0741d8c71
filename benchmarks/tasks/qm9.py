"""Properties of small organic molecules from their geometry (QM9).

Ramakrishnan, Dral, Rupp and von Lilienfeld, Scientific Data 1, 140022 (2014), CC0: molecules of up to nine heavy atoms
(C, N, O, F) in their equilibrium geometry, B3LYP/6-31G(2df,p).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ace.errors import ConfigError
from ace.groups import E3
from benchmarks.molecules import ELEMENTS, load_qm9
from benchmarks.tasks.base import Batch, Task
from benchmarks.tasks.molecules import Atoms, some_of

HARTREE = 27211.386246
"""One Hartree in meV."""


class Property(NamedTuple):
    """A target: its unit in publications, what one stored unit is in it, and whether atoms contribute constants."""

    unit: str
    factor: float = 1.0
    per_atom: bool = False


TARGETS = {
    "mu": Property("D"),
    "alpha": Property("a0^3"),
    "homo": Property("meV", HARTREE),
    "lumo": Property("meV", HARTREE),
    "gap": Property("meV", HARTREE),
    "r2": Property("a0^2"),
    "zpve": Property("meV", HARTREE),
    "U0": Property("meV", HARTREE, per_atom=True),
    "U": Property("meV", HARTREE, per_atom=True),
    "H": Property("meV", HARTREE, per_atom=True),
    "G": Property("meV", HARTREE, per_atom=True),
    "Cv": Property("cal/(mol K)"),
}
"""The targets by their published names, in their usual order."""


class QM9(Task):
    """One of twelve properties of a molecule; invariant under E(3).

    The metric ``mae`` is the mean absolute error in the unit of publications (`TARGETS`), the loss the mean absolute
    error of the standardised target. From the energies U0, U, H and G a constant for each atom is subtracted first,
    fitted to the training molecules by least squares; mean and standard deviation are those of the training molecules.

    Splits: 24,000 / 3,000 / 3,000 of 30,000 molecules drawn at random from all 130,831, or 84, 8 and 8 % of all.
    Neither is official, there is no official one; publications draw their own 110,000 for training.

    Args:
        target: Name or number of the target.
        train: Number of training molecules, None for all.
        full: All molecules, as ``ace data qm9`` downloads them, instead of the 30,000.

    Raises:
        ConfigError: An unknown target, or more training molecules than there are.
        DataError: The data are missing or damaged.
    """

    input_types: ClassVar[dict[str, str]] = {"z": "scalar", "pos": "position", "batch": "invariant"}
    output_type: ClassVar[str] = "invariant"
    metric: ClassVar[str] = "mae"

    def __init__(self, target: int | str = "U0", train: int | None = None, full: bool = False) -> None:
        names = list(TARGETS)
        if isinstance(target, int) and 0 <= target < len(names):
            target = names[target]
        if target not in names:
            raise ConfigError(f"qm9 task: target={target!r} is unknown; there are {', '.join(names)} (0 to 11)")
        self.name = "qm9"
        self.target = str(target)
        self.group = E3()
        arrays = load_qm9(full)
        available = int((arrays["split"] == 0).sum())
        if train is not None and not 1 <= train <= available:
            raise ConfigError(f"qm9 task: train={train}: must be between 1 and {available}")
        self.atoms = Atoms(
            torch.from_numpy(arrays["Z"].astype(np.int64)),
            torch.from_numpy(arrays["pos"]),
            torch.from_numpy(arrays["atom_offset"].astype(np.int64)),
        )
        splits = [np.flatnonzero(arrays["split"] == number) for number in range(3)]
        chosen = {"train": some_of(splits[0], train), "valid": splits[1], "test": splits[2]}
        self.molecules = {split: torch.from_numpy(numbers) for split, numbers in chosen.items()}
        values = arrays["targets"][:, names.index(self.target)] * TARGETS[self.target].factor
        if TARGETS[self.target].per_atom:
            values = values - atomic_part(arrays, values, chosen["train"])
        fitted = values[chosen["train"]]
        self.mean, self.std = float(fitted.mean()), float(fitted.std()) or 1.0
        self.targets = torch.from_numpy((values - self.mean) / self.std).float()[:, None]

    def size(self, split: str) -> int:  # noqa: D102
        return len(self.molecules[split])

    def collate(self, split: str, chosen: Tensor) -> Batch:  # noqa: D102
        molecules = self.molecules[split][chosen]
        inputs, _ = self.atoms.inputs(molecules)
        return Batch(inputs, self.targets[molecules])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean absolute error of the standardised target."""
        assert isinstance(batch.target, Tensor)
        return l1_loss(model(**batch.inputs), batch.target)

    def metrics(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """Mean absolute error in the unit of publications."""
        return {"mae": self.std * l1_loss(prediction, target)}


def atomic_part(arrays: dict[str, np.ndarray], values: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Part of an extensive property that follows from the number of atoms of each element.

    Args:
        arrays: Of `load_qm9`.
        values: The property of each molecule.
        fitted: Numbers of the molecules that the constants are fitted to.

    Returns:
        One value for each molecule.
    """
    molecule = np.repeat(np.arange(len(values)), np.diff(arrays["atom_offset"]))
    counts = np.stack([np.bincount(molecule[arrays["Z"] == z], minlength=len(values)) for z in ELEMENTS], 1)
    constants, *_ = np.linalg.lstsq(counts[fitted].astype(float), values[fitted])
    return counts @ constants
