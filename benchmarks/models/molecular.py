"""The steerable network of `benchmarks.models.segnn` on molecules: one invariant number for each."""

from __future__ import annotations

from typing import Literal

import torch
from e3nn import o3
from torch import Tensor, nn

from benchmarks.models.graphs import mean_by_target, radius_graph, sum_by_target
from benchmarks.models.segnn import Gate, SEGNNLayer, irreps, steerable, tensor_product

ELEMENTS = 100
"""Atomic numbers that have an embedding."""
REACH = 6.0
"""Largest distance that the radial functions resolve, in Å."""


class MolecularSEGNN(nn.Module):
    """SEGNN with an invariant read-out for each molecule (Brandstetter et al., ICLR 2022, the set-up for QM9).

    The attribute of an edge is the spherical harmonics of x_i - x_j up to l = 1, that of an atom the mean over its
    edges. Messages see Gaussians of the distance, spaced evenly by their width; the published model sees the squared
    distance alone, with which the force fields here were much worse. The scalars of each atom go through a small
    network, whose outputs are summed or averaged over the molecule.

    Args:
        features: Number of irreps per atom: half are scalars, half vectors. Even.
        layers: Number of message-passing steps.
        cutoff: Largest distance of an edge, in Å; None joins all atoms of a molecule. An edge appears at once where
            two atoms come closer than the cutoff, so a force field, which must be smooth, takes None.
        readout: Sum (``"add"``) or ``"mean"`` over the atoms.
        gaussians: Number of radial functions, at least 2.

    Example:
        >>> model = MolecularSEGNN(features=8, layers=2)
        >>> model(torch.tensor([8, 1, 1]), torch.randn(3, 3), torch.zeros(3, dtype=torch.long)).shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        features: int = 64,
        layers: int = 4,
        cutoff: float | None = None,
        readout: Literal["add", "mean"] = "add",
        gaussians: int = 16,
    ) -> None:
        super().__init__()
        m = features // 2
        self.cutoff = cutoff
        self.readout = readout
        self.centers: Tensor
        self.register_buffer("centers", torch.linspace(0, REACH, gaussians), persistent=False)
        self.element = nn.Embedding(ELEMENTS, m)
        self.embed = tensor_product(o3.Irreps(f"{m}x0e"), irreps(m))
        self.layers = nn.ModuleList(SEGNNLayer(m, gaussians) for _ in range(layers))
        self.atom_in, self.atom_gate = tensor_product(irreps(m), irreps(2 * m, m)), Gate(m)
        self.atom_out = nn.Sequential(nn.Linear(m, m), nn.SiLU(), nn.Linear(m, 1))

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> Tensor:
        """Predict one number for each molecule.

        Args:
            z: Atomic numbers, int64, shape (N,).
            pos: Positions, shape (N, 3), Å.
            batch: Molecule of each atom, ascending from 0, shape (N,).

        Returns:
            Shape (molecules, 1).
        """
        source, target = edge_index = radius_graph(pos, batch, self.cutoff)
        relative = pos.index_select(0, target) - pos.index_select(0, source)
        distance = torch.linalg.vector_norm(relative, dim=1, keepdim=True)
        radial = torch.exp(-(((distance - self.centers) / self.centers[1]) ** 2))
        edge_attribute = steerable(relative)
        around = mean_by_target(edge_attribute[:, 1:], target, len(pos))
        attribute = torch.cat((torch.ones_like(around[:, :1]), around), 1)

        features = self.embed(self.element(z), attribute)
        for layer in self.layers:
            features = layer(features, attribute, edge_index, edge_attribute, radial)
        features = self.atom_gate(self.atom_in(features, attribute))
        atoms = self.atom_out(features[:, : self.atom_gate.multiplicity])
        pool = sum_by_target if self.readout == "add" else mean_by_target
        return pool(atoms, batch, int(batch[-1]) + 1)
