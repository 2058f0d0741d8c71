"""Models whose training step is measured: of realistic size, with a batch and a loss. They know nothing of ace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A model with what it is trained on.

    Attributes:
        model: The model.
        example: What it is called with, as in ``ace.relax``.
        loss: Scalar loss of its output.
        size: The sizes that matter, in words.
    """

    model: nn.Module
    example: Any
    loss: Callable[[Any], Tensor]
    size: str


def segnn() -> Subject:
    """SEGNN with 64 features and 4 layers on charged N-body systems."""
    from benchmarks.models.segnn import SEGNN

    return _nbody(SEGNN)


def egnn() -> Subject:
    """EGNN with 64 features and 4 layers on the same systems."""
    from benchmarks.models.egnn import EGNN

    return _nbody(EGNN)


def _nbody(build: Callable[..., nn.Module]) -> Subject:
    from benchmarks.tasks.nbody import NBody

    batch = next(iter(NBody(train=100, valid=1, test=1).batches("train", 100)))
    model = build(node_features=batch.inputs["h"].shape[1], edge_features=batch.inputs["edge_attr"].shape[1])
    return Subject(
        model, batch.inputs, lambda output: (output - batch.target).square().mean(), "100 systems of 5 particles"
    )


def mace() -> Subject:
    """MACE with 64 channels up to l = 1 on 4 molecules of ethanol, energies and forces."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e3nn 0.4.4 scripts functions when it is imported
        from mace import data, modules, tools
    import numpy as np
    from ase.build import molecule
    from e3nn import o3
    from mace.tools.torch_geometric.dataloader import DataLoader

    numbers = tools.AtomicNumberTable([1, 6, 8])
    atoms = [molecule("CH3CH2OH") for _ in range(4)]
    for seed, each in enumerate(atoms):
        each.rattle(0.05, seed=seed)
    graphs = [data.AtomicData.from_config(data.config_from_atoms(a), z_table=numbers, cutoff=5.0) for a in atoms]
    batch = next(iter(DataLoader(graphs, batch_size=len(graphs), shuffle=False))).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = modules.ScaleShiftMACE(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls_first=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            num_interactions=2,
            num_elements=len(numbers),
            hidden_irreps=o3.Irreps("64x0e+64x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=np.zeros(len(numbers)),
            atomic_numbers=numbers.zs,
            avg_num_neighbors=8.0,
            correlation=3,
            radial_type="bessel",
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
    return Subject(model, {"data": batch, "training": True}, _energy_and_forces("energy"), "4 molecules of 9 atoms")


def nequip() -> Subject:
    """NequIP with 32 features up to l = 2 and 4 layers on one molecule of ethanol, energy and forces."""
    import warnings

    from ase.build import molecule
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_global_state()
    types = {"H": 0, "C": 1, "O": 2}
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=0)
        batch = from_ase(atoms)
        batch[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([types[symbol] for symbol in atoms.symbols])
        batch = compute_neighborlist_(batch, r_max=5.0)
        model = NequIPGNNModel(
            seed=0,
            model_dtype="float32",
            r_max=5.0,
            type_names=list(types),
            num_layers=4,
            l_max=2,
            parity=True,
            num_features=32,
            radial_mlp_width=64,
            avg_num_neighbors=8.0,
            per_type_energy_scales=1.0,
            per_type_energy_shifts=dict.fromkeys(types, 0.0),
        )
    finally:
        torch.set_default_dtype(usual)
    return Subject(model, (batch,), _energy_and_forces("total_energy"), "1 molecule of 9 atoms")


def schnet() -> Subject:
    """SchNet of torch-geometric with its own default sizes on 8 molecules of 12 atoms."""
    from torch_geometric.nn.models import SchNet

    def all_pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        near = (batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool)
        edges = near.nonzero().T
        return edges, (pos[edges[0]] - pos[edges[1]]).norm(dim=-1)

    batch = torch.arange(8).repeat_interleave(12)
    example = (torch.randint(1, 9, (96,)), 3 * torch.randn(96, 3), batch)
    model = SchNet(interaction_graph=all_pairs)
    return Subject(model, example, lambda output: output.square().mean(), "8 molecules of 12 atoms")


def vn_dgcnn() -> Subject:
    """VN-DGCNN on 4 clouds of 256 points."""
    from benchmarks.models.vn import VNDGCNN

    model = VNDGCNN(classes=40)
    return Subject(model, torch.randn(4, 256, 3), lambda output: output.square().mean(), "4 clouds of 256 points")


def c4_cnn() -> Subject:
    """Four steerable convolutions of escnn, with 16 fields of C4, on images of 32 x 32 pixels."""
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(N=4)
    trivial, hidden = enn.FieldType(space, [space.trivial_repr]), enn.FieldType(space, 16 * [space.regular_repr])
    stages = []
    for width in (trivial, hidden, hidden, hidden):
        stages += [enn.R2Conv(width, hidden, kernel_size=5, padding=2), enn.InnerBatchNorm(hidden), enn.ReLU(hidden)]
    model = enn.SequentialModule(*stages, enn.R2Conv(hidden, trivial, kernel_size=5, padding=2))
    example = enn.GeometricTensor(torch.randn(8, 1, 32, 32), trivial)
    return Subject(model, example, lambda output: output.tensor.square().mean(), "8 images of 32 x 32")


def _energy_and_forces(energy: str) -> Callable[[Any], Tensor]:
    def loss(output: Any) -> Tensor:
        value: Tensor = output[energy].square().mean() + (output["forces"] - 0.1).square().mean()
        return value

    return loss


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "segnn": segnn,
    "egnn": egnn,
    "mace": mace,
    "nequip": nequip,
    "schnet": schnet,
    "vn-dgcnn": vn_dgcnn,
    "c4-cnn": c4_cnn,
}
