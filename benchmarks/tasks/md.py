"""Energies and forces of a flexible molecule: a force field learnt from molecular dynamics.

Data of the BOTNet benchmark (Batatia et al., arXiv 2205.06643; MIT licence): ethanol with the geometries of rMD17
(Christensen and von Lilienfeld, 2020), acetylacetone, and 3BPA (Kovács et al., 2021).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ace.errors import ConfigError
from ace.groups import E3
from benchmarks.molecules import load_md
from benchmarks.tasks.base import Batch, Task
from benchmarks.tasks.molecules import Atoms, some_of

ENERGY_WEIGHT, FORCE_WEIGHT = 1.0, 80.0
VALID = 50


class Source(NamedTuple):
    """Where the splits of a molecule come from.

    The last ``held`` configurations, in random order, of the training set are the test split if no set of its own
    is published for it.
    """

    train: str
    test: str | None
    further: dict[str, str]
    held: int = 0


SOURCES = {
    "ethanol": Source("train", "test", {}),
    "acac": Source("train_300K", "test_MD_300K", {"test_600K": "test_MD_600K"}),
    "3bpa": Source("train_300K", None, {"test_mixedT": "train_mixedT"}, held=100),
}

Molecule = Literal["ethanol", "acac", "3bpa"]


class MolecularDynamics(Task):
    """Energy and forces of configurations of one molecule.

    Energies and forces are divided by one number, the root mean square of the force components of the training split
    (in eV/Å), so that forces stay minus the gradient of the energy; the mean energy of the training split is
    subtracted before. The loss is that of Equiformer on MD17 (Liao and Smidt, ICLR 2023), with weights 1 and 80::

        mean |E' - E| + 80 mean |F'_i - F_i|

    with the length of the error of each atom's force. Metrics are ``energy_mae`` in meV and ``force_mae``, over
    Cartesian components, in meV/Å; the latter selects the model.

    ============  =======================  =====  ====  ==============================================
    molecule      train and valid          test         further
    ============  =======================  =====  ====  ==============================================
    ``ethanol``   950 + 50, 500 K          1,000  same
    ``acac``      450 + 50, 300 K          650    same  650 at 600 K (``test_600K``)
    ``3bpa``      350 + 50, 300 K          100    same  469 at 300, 600 and 1200 K (``test_mixedT``)
    ============  =======================  =====  ====  ==============================================

    Of 3BPA only the published training sets are used, so its test splits are held out of these and its numbers are not
    comparable to published ones; configurations that both sets share are left out of ``test_mixedT``.

    Args:
        molecule: Which molecule.
        train: Number of training configurations, None for all.

    Raises:
        ConfigError: An unknown molecule, or more training configurations than there are.
        DataError: The data are missing or damaged.
    """

    input_types: ClassVar[dict[str, str]] = {"z": "scalar", "pos": "position", "batch": "invariant"}
    output_type: ClassVar[dict[str, str]] = {"energy": "invariant", "forces": "vector"}
    metric: ClassVar[str] = "force_mae"

    def __init__(self, molecule: Molecule = "ethanol", train: int | None = None) -> None:
        if molecule not in SOURCES:
            raise ConfigError(f"md task: molecule={molecule!r} is unknown; there are {', '.join(SOURCES)}")
        self.name = "md"
        self.group = E3()
        source, arrays = SOURCES[molecule], load_md(molecule)
        order = np.random.default_rng(0).permutation(len(arrays[f"{source.train}_E"]))
        available = len(order) - VALID - source.held
        if train is not None and not 1 <= train <= available:
            raise ConfigError(f"md task: train={train}: must be between 1 and {available} for {molecule}")
        rows = {
            "train": (source.train, some_of(order[:available], train)),
            "valid": (source.train, order[available : available + VALID]),
            "test": (source.test or source.train, order[available + VALID :] if source.test is None else slice(None)),
        }
        known = arrays[f"{source.train}_R"]
        rows |= {split: (name, unseen(arrays[f"{name}_R"], known)) for split, name in source.further.items()}
        self.further_tests = tuple(source.further)
        stored = {split: [arrays[f"{name}_{part}"][some] for part in "REF"] for split, (name, some) in rows.items()}
        _, energies, forces = stored["train"]
        self.mean, self.scale = float(energies.mean()), float(np.sqrt(np.square(forces, dtype=np.float64).mean()))
        self.z = torch.from_numpy(arrays["z"].astype(np.int64))
        self.splits = {split: self._split(*parts) for split, parts in stored.items()}

    def _split(self, positions: np.ndarray, energies: np.ndarray, forces: np.ndarray) -> tuple[Atoms, Tensor, Tensor]:
        count, atoms, _ = positions.shape
        offset = torch.arange(0, (count + 1) * atoms, atoms)
        return (
            Atoms(self.z.repeat(count), torch.from_numpy(positions).flatten(0, 1), offset),
            torch.from_numpy((energies - self.mean) / self.scale).float()[:, None],
            torch.from_numpy(forces / self.scale).float().flatten(0, 1),
        )

    def size(self, split: str) -> int:  # noqa: D102
        return len(self.splits[split][1])

    def collate(self, split: str, chosen: Tensor) -> Batch:  # noqa: D102
        atoms, energies, forces = self.splits[split]
        inputs, rows = atoms.inputs(chosen)
        return Batch(inputs, {"energy": energies[chosen], "forces": forces[rows]})

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Weighted mean absolute error of the energies and mean length of the error of the forces."""
        prediction, target = model(**batch.inputs), batch.target
        energy = (prediction["energy"] - target["energy"]).abs().mean()
        forces = torch.linalg.vector_norm(prediction["forces"] - target["forces"], dim=-1).mean()
        return ENERGY_WEIGHT * energy + FORCE_WEIGHT * forces

    def metrics(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """Mean absolute errors of the energies in meV and of the force components in meV/Å."""
        unit = 1000 * self.scale
        errors = {name: unit * (prediction[name] - target[name]).abs().mean() for name in ("energy", "forces")}
        return {"energy_mae": errors["energy"], "force_mae": errors["forces"]}


def unseen(positions: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which configurations are not among the known ones; boolean, one for each.

    Example:
        >>> unseen(np.eye(3), np.eye(3)[:1]).tolist()
        [False, True, True]
    """
    seen = {configuration.tobytes() for configuration in known}
    return np.array([configuration.tobytes() not in seen for configuration in positions])
