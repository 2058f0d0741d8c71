"""Equiformer (Liao and Smidt, ICLR 2023) of the package ``equiformer-pytorch``, as a force field."""

from __future__ import annotations

from torch import Tensor, nn

ELEMENTS = 10
"""Atomic numbers that have an embedding: below this one."""


class EquiformerForces(nn.Module):
    """The package's network, which attends to all atoms of a molecule; scalars and vectors.

    The sum of its scalar outputs is the energy, its vector outputs are the forces. They are *not* minus the gradient
    of the energy: the package leaves the directions of the edges out of the derivative, so that a gradient would lack
    their part. It is equivariant to rotations and translations, not to reflections, which the network tells apart.
    All molecules of a batch must have the same number of atoms: the package's attention sees atoms that fill up others.

    Args:
        features: Scalars of an atom; vectors are half as many. Even.
        layers: Number of attention blocks, each with a feed-forward block.
        heads: Attention heads for scalars, and as many for vectors.
        radial: Width of the networks that see distances.
    """

    def __init__(self, features: int = 32, layers: int = 2, heads: int = 2, radial: int = 32) -> None:
        from equiformer_pytorch import Equiformer

        super().__init__()
        dim = (features, features // 2)
        self.network = Equiformer(
            dim=dim,
            dim_head=tuple(channels // heads for channels in dim),
            heads=heads,
            depth=layers,
            radial_hidden_dim=radial,
            num_tokens=ELEMENTS,
            reduce_dim_out=True,
        )

    def forward(self, z: Tensor, pos: Tensor, batch: Tensor) -> dict[str, Tensor]:
        """Predict energies and forces.

        Args:
            z: Atomic numbers, int64, shape (N,).
            pos: Positions, shape (N, 3).
            batch: Molecule of each atom, ascending from 0, shape (N,).

        Returns:
            ``energy``, shape (molecules, 1), and ``forces``, shape (N, 3).

        Raises:
            ValueError: Molecules of different sizes.
        """
        sizes = batch.bincount()
        if (sizes != sizes[0]).any():
            raise ValueError(
                f"molecules of {int(sizes.min())} to {int(sizes.max())} atoms; all must have the same number"
            )
        scalars, vectors = self.network(z.view(len(sizes), -1), pos.view(len(sizes), -1, 3))
        return {"energy": scalars.sum(1, keepdim=True), "forces": vectors.flatten(0, 1)}
