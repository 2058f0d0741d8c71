"""Made-up molecules in the layout of the published files, and what the tests on them share."""

from __future__ import annotations

import numpy as np
import torch

import ace
from benchmarks import data
from benchmarks.models import MODELS
from benchmarks.molecules import MD_FILES

SMALL = {
    "schnet": {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2, "num_gaussians": 10},
    "segnn-molecular": {"features": 8, "layers": 2},
    "schnet-forces": {"hidden_channels": 8, "num_filters": 8, "num_interactions": 2, "num_gaussians": 10},
    "segnn-forces": {"features": 8, "layers": 2},
    "nequip": {"num_layers": 2, "num_features": 4},
    "mace": {"num_features": 4, "max_ell": 1, "correlation": 2},
    "equiformer": {"features": 8, "layers": 1, "radial": 8},
}
"""Options that make the models of the tasks on molecules small."""
LEARNING = {
    **{name: {"hidden_channels": 32, "num_filters": 32, "num_interactions": 2} for name in ("schnet", "schnet-forces")},
    **{name: {"features": 16, "layers": 2} for name in ("segnn-molecular", "segnn-forces")},
}
"""Options with which they learn something in a few seconds."""


def lattice(count: int, generator: np.random.Generator) -> np.ndarray:
    """Positions of atoms that are no closer than molecules have them, shape (count, 3), float32."""
    corners = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    chosen = generator.permutation(corners)[:count]
    return (1.4 * chosen + 0.1 * generator.standard_normal((count, 3))).astype(np.float32)


def qm9(molecules: int = 60) -> dict[str, np.ndarray]:
    """Molecules of three to nine atoms: 40 to train, 8 to validate, 12 to test."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 10, molecules)
    split = np.repeat(np.array([0, 1, 2], dtype=np.uint8), [40, 8, 12])
    return {
        "index": np.arange(1, molecules + 1, dtype=np.int32),
        "atom_offset": np.cumsum([0, *sizes]).astype(np.int32),
        "Z": generator.choice([1, 6, 7, 8, 9], sizes.sum()).astype(np.uint8),
        "pos": np.concatenate([lattice(size, generator) for size in sizes]),
        "targets": generator.standard_normal((molecules, 12)),
        "split": generator.permutation(split),
    }


def md(molecule: str) -> dict[str, np.ndarray]:
    """Configurations of four atoms on springs, whose forces are minus the gradient of their energy."""
    generator = np.random.default_rng(1)
    z = np.array([6, 8, 1, 1], dtype=np.uint8)
    rest = lattice(4, generator)
    arrays = {"z": z}
    for name in MD_FILES[molecule].sets:
        positions = (rest + 0.1 * generator.standard_normal((160, 4, 3))).astype(np.float32)
        energy, forces = springs(torch.from_numpy(positions).double())
        arrays |= {f"{name}_R": positions, f"{name}_E": energy.numpy() - 1000, f"{name}_F": forces.float().numpy()}
    if molecule == "3bpa":
        arrays["train_mixedT_R"][5:9] = arrays["train_300K_R"][20:24]
    return arrays


def springs(pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy Σ (d - 1.5)² over the pairs of atoms, d their distance, and forces; of configurations (..., n, 3)."""
    difference, same = pos[..., :, None, :] - pos[..., None, :, :], torch.eye(pos.shape[-2], dtype=pos.dtype)
    distance = (difference.square().sum(-1) + same).sqrt()
    stretch = (distance - 1.5) * (1 - same)
    forces = -2 * (stretch / distance)[..., None] * difference
    return stretch.square().sum((-1, -2)) / 2, forces.sum(-2)


def install(folder, monkeypatch):
    """Put all made-up files into a cache folder and let them pass for the published ones."""
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(folder))
    files = {"qm9/qm9_30k": qm9(), **{f"md/{file.stem}": md(name) for name, file in MD_FILES.items()}}
    for name, arrays in files.items():
        monkeypatch.setitem(data.CHECKSUMS, name.split("/")[1], data.checksum(arrays))
        data.save_arrays(folder / f"{name}.npz", arrays)


def relaxed(task, name: str) -> torch.nn.Module:
    """A small model of the task, with the terms that the suite gives it."""
    model = MODELS[name].build(**SMALL[name])
    return ace.relax(
        model, layers=lambda _, module: type(module).__name__ in MODELS[name].layers, example=task.example()
    )


def error(task, model, dtype=torch.float64) -> float:
    """Equivariance error on eight samples."""
    inputs = next(task.batches("test", 8)).inputs
    return float(
        ace.equivariance_error(
            model, inputs, task.group, inputs=task.input_types, outputs=task.output_type, elements=3, dtype=dtype
        )
    )
