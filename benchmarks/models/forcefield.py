"""Force fields: forces as minus the gradient of any network for the energy."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.models.molecular import MolecularSEGNN
from benchmarks.models.schnet import SchNet


class ForceField(nn.Module):
    r"""Energies of molecules, and the forces :math:`F_i = -\partial E / \partial x_i` on their atoms.

    The derivative is taken inside of the forward pass, under ``torch.no_grad`` as well; where gradients are enabled
    outside, forces can be differentiated again, as a loss on them needs. The positions are marked as requiring a
    gradient in place: a copy would cut off whatever else was computed from them.

    Args:
        energy: Called with (z, pos, batch), returns shape (molecules, 1).

    Example:
        >>> class Spring(nn.Module):
        ...     def forward(self, z, pos, batch):
        ...         return pos.square().sum().reshape(1, 1) / 2
        >>> found = ForceField(Spring())(torch.ones(1), torch.tensor([[1.0, -2.0, 0.0]]), torch.zeros(1))
        >>> found["energy"].item(), found["forces"].tolist()
        (2.5, [[-1.0, 2.0, -0.0]])
    """

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> dict[str, Tensor]:
        """Predict energies and forces.

        Args:
            z: Atomic numbers, int64, shape (N,).
            pos: Positions, shape (N, 3).
            batch: Molecule of each atom, ascending from 0, shape (N,).

        Returns:
            ``energy``, shape (molecules, 1), and ``forces``, shape (N, 3).
        """
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            energy = self.energy(z, pos.requires_grad_(), batch)
            (slope,) = torch.autograd.grad(energy.sum(), pos, create_graph=again)
        return {"energy": energy if again else energy.detach(), "forces": -slope}


class SchNetForces(ForceField):
    """Force field from `benchmarks.models.schnet.SchNet`, with its arguments."""

    def __init__(
        self,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_interactions: int = 6,
        num_gaussians: int = 50,
        cutoff: float = 10.0,
        readout: Literal["add", "mean"] = "add",
    ) -> None:
        super().__init__(SchNet(hidden_channels, num_filters, num_interactions, num_gaussians, cutoff, readout))


class SEGNNForces(ForceField):
    """Force field from `benchmarks.models.molecular.MolecularSEGNN` with all pairs of atoms, so that it is smooth."""

    def __init__(self, features: int = 64, layers: int = 4) -> None:
        super().__init__(MolecularSEGNN(features, layers))
