"""What the tasks on molecules share: ragged lists of atoms, joined into batches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Atoms:
    """Molecules of different sizes, one after the other.

    Attributes:
        z: Atomic numbers, int64, shape (atoms,).
        pos: Positions, float32, shape (atoms, 3), Å.
        offset: First atom of each molecule, then the number of atoms, int64, shape (molecules + 1,).
    """

    z: Tensor
    pos: Tensor
    offset: Tensor

    def rows(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Find the atoms of some molecules.

        Args:
            chosen: Numbers of the molecules, shape (m,).

        Returns:
            Number of each of their atoms, and to which of the m molecules it belongs.

        Example:
            >>> atoms = Atoms(torch.tensor([8, 1, 1, 6]), torch.zeros(4, 3), torch.tensor([0, 3, 4]))
            >>> [part.tolist() for part in atoms.rows(torch.tensor([1, 0]))]
            [[3, 0, 1, 2], [0, 1, 1, 1]]
        """
        first = self.offset[chosen]
        sizes = self.offset[chosen + 1] - first
        batch = torch.arange(len(chosen)).repeat_interleave(sizes)
        place = torch.arange(len(batch)) - (sizes.cumsum(0) - sizes)[batch]
        return first[batch] + place, batch

    def inputs(self, chosen: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Join some molecules.

        Args:
            chosen: Their numbers.

        Returns:
            Model inputs ``z``, ``pos`` and ``batch``, and the numbers of their atoms.
        """
        rows, batch = self.rows(chosen)
        return {"z": self.z[rows], "pos": self.pos[rows], "batch": batch}, rows


def some_of(molecules: np.ndarray, count: int | None) -> np.ndarray:
    """The first molecules in an order that is random but always the same: those of a smaller count are among them.

    Args:
        molecules: Their numbers.
        count: How many; None for all, in the order given.

    Example:
        >>> some_of(np.arange(10), 3).tolist(), some_of(np.arange(10), 2).tolist()
        ([4, 6, 2], [4, 6])
    """
    return molecules if count is None else np.random.default_rng(0).permutation(molecules)[:count]
