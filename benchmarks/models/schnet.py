"""SchNet (Schütt et al., NeurIPS 2017) of torch-geometric, with a neighbour list that needs nothing else."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.models.graphs import radius_graph


class Neighbours(nn.Module):
    """The pairs of atoms of a molecule that are closer than a cutoff, and their distances.

    The library's own function needs a compiled extension, and keeps at most 32 neighbours of an atom; this one keeps
    all, which is the same for molecules of up to 33 atoms.

    Args:
        cutoff: Largest distance.
    """

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return source and target of each pair (2, E), and distances (E,)."""
        source, target = edge_index = radius_graph(pos, batch, self.cutoff)
        return edge_index, torch.linalg.vector_norm(pos[source] - pos[target], dim=-1)


class SchNet(nn.Module):
    """The library's model, unchanged, behind its neighbour list: one number for each molecule.

    Its convolutions see distances only, so that it is invariant under E(3).

    Args:
        hidden_channels: Features of an atom.
        num_filters: Features of a convolution.
        num_interactions: Number of interaction blocks.
        num_gaussians: Number of radial basis functions.
        cutoff: Distance in Å at which the filters have faded to zero.
        readout: Sum (``"add"``) or ``"mean"`` over the atoms.

    Example:
        >>> model = SchNet(hidden_channels=8, num_filters=8, num_interactions=2)
        >>> model(torch.tensor([8, 1, 1]), torch.randn(3, 3), torch.zeros(3, dtype=torch.long)).shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_interactions: int = 6,
        num_gaussians: int = 50,
        cutoff: float = 10.0,
        readout: Literal["add", "mean"] = "add",
    ) -> None:
        from torch_geometric.nn.models import SchNet as Network  # slow to import

        super().__init__()
        self.network = Network(
            hidden_channels=hidden_channels,
            num_filters=num_filters,
            num_interactions=num_interactions,
            num_gaussians=num_gaussians,
            cutoff=cutoff,
            interaction_graph=Neighbours(cutoff),
            readout=readout,
        )

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        """Predict one number for each molecule.

        Args:
            z: Atomic numbers, int64, shape (N,).
            pos: Positions, shape (N, 3), Å.
            batch: Molecule of each atom, ascending from 0, shape (N,).

        Returns:
            Shape (molecules, 1).
        """
        return self.network(z, pos, batch)
