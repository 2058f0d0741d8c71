"""NequIP (Batzner et al., 2022) of the package ``nequip``, as a force field."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models.forcefield import ForceField
from benchmarks.models.graphs import radius_graph

ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}


@contextmanager
def building() -> Iterator[None]:
    """Set the global state that the package insists on, and take back afterwards what is not its own.

    It seeds all generators and makes float64 the default.
    """
    usual, python, numpy = torch.get_default_dtype(), random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            from nequip.utils.global_state import set_global_state  # importing draws random numbers as well

            set_global_state()
            torch.set_default_dtype(torch.float64)  # the first call did, later ones do not
            yield
        finally:
            torch.set_default_dtype(usual)
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


class NequIPEnergy(nn.Module):
    """The package's network for energies, called with atomic numbers, positions and molecules.

    It computes in float64, the precision that the package prefers, whatever the positions have.

    Args:
        num_layers: Number of interaction blocks.
        l_max: Largest degree of the features.
        num_features: Channels of each degree and parity.
        r_max: Distance in Å at which interactions have faded to zero.
        avg_num_neighbors: Usual number of neighbours, by whose root sums are divided.
    """

    def __init__(self, num_layers: int, l_max: int, num_features: int, r_max: float, avg_num_neighbors: float) -> None:
        super().__init__()
        self.r_max = r_max
        seed = int(torch.randint(2**31, ()))
        with building():
            from nequip.model import NequIPGNNModel

            self.network = NequIPGNNModel(
                seed=seed,
                model_dtype="float64",
                type_names=list(ELEMENTS),
                num_layers=num_layers,
                l_max=l_max,
                num_features=num_features,
                r_max=r_max,
                avg_num_neighbors=avg_num_neighbors,
                per_type_energy_scales=1.0,
                per_type_energy_shifts=0.0,
                do_derivatives=False,
            )
        kinds = torch.full((max(ELEMENTS.values()) + 1,), -1)
        kinds[list(ELEMENTS.values())] = torch.arange(len(ELEMENTS))
        self.register_buffer("kinds", kinds, persistent=False)

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        """Predict the energy of each molecule, shape (molecules, 1)."""
        atoms = {
            "pos": pos.double(),
            "edge_index": radius_graph(pos, batch, self.r_max),
            "atom_types": self.kinds[z],
            "batch": batch,
            "num_atoms": batch.bincount(),
        }
        return self.network(atoms)["total_energy"].to(pos.dtype)


class NequIP(ForceField):
    """Force field from the package's network; its forces are taken outside of it, and no stress is.

    Args:
        num_layers: Number of interaction blocks.
        l_max: Largest degree of the features.
        num_features: Channels of each degree and parity.
        r_max: Cutoff in Å.
        avg_num_neighbors: Usual number of neighbours.
    """

    def __init__(
        self,
        num_layers: int = 4,
        l_max: int = 1,
        num_features: int = 32,
        r_max: float = 5.0,
        avg_num_neighbors: float = 10.0,
    ) -> None:
        super().__init__(NequIPEnergy(num_layers, l_max, num_features, r_max, avg_num_neighbors))
