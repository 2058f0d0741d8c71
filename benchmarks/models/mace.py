"""MACE (Batatia et al., NeurIPS 2022) of the package ``mace-torch``, as a force field."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models.forcefield import ForceField
from benchmarks.models.graphs import radius_graph
from benchmarks.models.nequip import ELEMENTS


def mace_model(atomic_numbers: list[int], **options: Any) -> nn.Module:
    """Build the package's ScaleShiftMACE.

    Args:
        atomic_numbers: The elements that it is for.
        options: Replace its settings.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn 0.4.4 scripts functions when it is imported
        from mace import modules
    from e3nn import o3  # after mace, which lets e3nn 0.4.4 load its constants

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    settings = {
        "r_max": 5.0,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": 3,
        "interaction_cls_first": block,
        "interaction_cls": block,
        "num_interactions": 2,
        "num_elements": len(atomic_numbers),
        "hidden_irreps": o3.Irreps("64x0e+64x1o"),
        "MLP_irreps": o3.Irreps("16x0e"),
        "gate": torch.nn.functional.silu,
        "atomic_energies": np.zeros(len(atomic_numbers)),
        "atomic_numbers": atomic_numbers,
        "avg_num_neighbors": 8.0,
        "correlation": 3,
        "radial_type": "bessel",
        "atomic_inter_scale": 1.0,
        "atomic_inter_shift": 0.0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = modules.ScaleShiftMACE(**{**settings, **options})
    return model


class MACEEnergy(nn.Module):
    """The package's network for energies, called with atomic numbers, positions and molecules.

    Args:
        num_layers: Number of interaction blocks.
        max_ell: Largest degree of the spherical harmonics.
        num_features: Scalars of an atom, and as many vectors.
        correlation: Number of neighbours that a message sees together.
        r_max: Distance in Å at which interactions have faded to zero.
        avg_num_neighbors: Usual number of neighbours, by which sums are divided.
    """

    def __init__(
        self,
        num_layers: int,
        max_ell: int,
        num_features: int,
        correlation: int,
        r_max: float,
        avg_num_neighbors: float,
    ) -> None:
        from e3nn import o3

        super().__init__()
        self.r_max = r_max
        self.network = mace_model(
            list(ELEMENTS.values()),
            r_max=r_max,
            max_ell=max_ell,
            num_interactions=num_layers,
            hidden_irreps=o3.Irreps(f"{num_features}x0e+{num_features}x1o"),
            correlation=correlation,
            avg_num_neighbors=avg_num_neighbors,
        )

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        """Predict the energy of each molecule, shape (molecules, 1)."""
        edge_index = radius_graph(pos, batch, self.r_max)
        sizes = batch.bincount()
        atoms = {
            "positions": pos,
            "node_attrs": (z[:, None] == self.network.atomic_numbers).to(pos),
            "edge_index": edge_index,
            "shifts": pos.new_zeros(edge_index.shape[1], 3),  # no periodic images
            "cell": pos.new_zeros(3 * len(sizes), 3),
            "batch": batch,
            "ptr": torch.cat((sizes.new_zeros(1), sizes.cumsum(0))),
        }
        return self.network(atoms, compute_force=False)["energy"][:, None]


class MACE(ForceField):
    """Force field from the package's network, with the gradient taken outside of it.

    Args:
        num_layers: Number of interaction blocks.
        max_ell: Largest degree of the spherical harmonics.
        num_features: Scalars of an atom, and as many vectors.
        correlation: Number of neighbours that a message sees together.
        r_max: Cutoff in Å.
        avg_num_neighbors: Usual number of neighbours.
    """

    def __init__(
        self,
        num_layers: int = 2,
        max_ell: int = 3,
        num_features: int = 64,
        correlation: int = 3,
        r_max: float = 5.0,
        avg_num_neighbors: float = 8.0,
    ) -> None:
        super().__init__(MACEEnergy(num_layers, max_ell, num_features, correlation, r_max, avg_num_neighbors))
