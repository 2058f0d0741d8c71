"""Models whose training step is measured: of realistic size, with a batch and a loss. They know nothing of ace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

ELEMENTS = {"H": 1, "C": 6, "O": 8}
"""Atomic numbers of the elements in the molecules."""


@dataclass(frozen=True)
class Subject:
    """A model with what it is trained on.

    Attributes:
        model: The model.
        example: What it is called with, as in ``ace.relax``.
        loss: Scalar loss of its output.
        size: The sizes that matter, in words.
        layers: Which layers are relaxed, as in ``ace.relax``; None for those that it chooses.
        differentiates: Whether its forward pass differentiates, as that of a force field does.
    """

    model: nn.Module
    example: Any
    loss: Callable[[Any], Tensor]
    size: str
    layers: type[nn.Module] | None = None
    differentiates: bool = False


def segnn() -> Subject:
    """SEGNN with 64 features and 4 layers on charged N-body systems, a term beside each layer as in the suite."""
    from benchmarks.models.segnn import SEGNN, SEGNNLayer

    return replace(_nbody(SEGNN), layers=SEGNNLayer)


def segnn_products() -> Subject:
    """The same, a term beside each tensor product on nodes, as ``ace.relax`` chooses."""
    return replace(segnn(), layers=None)


def egnn() -> Subject:
    """EGNN with 64 features and 4 layers on the same systems."""
    from benchmarks.models.egnn import EGNN

    return _nbody(EGNN)


def egno() -> Subject:
    """EGNO with 64 features, 4 layers and 5 frames on the same systems; the last frame is the target."""
    from benchmarks.models.egno import EGNO

    batch = nbody_batch()
    model = EGNO(node_features=batch.inputs["h"].shape[1], edge_features=batch.inputs["edge_attr"].shape[1])
    return Subject(
        model,
        batch.inputs,
        lambda output: mse_loss(output[:, -1], batch.target.to(output.device)),
        "100 systems of 5 particles",
    )


def nbody_batch() -> Any:
    """One batch of 100 charged N-body systems, generated from a fixed seed."""
    from benchmarks.tasks.nbody import NBody

    return next(iter(NBody(train=100, valid=1, test=1).batches("train", 100)))


def _nbody(build: Callable[..., nn.Module]) -> Subject:
    batch = nbody_batch()
    model = build(node_features=batch.inputs["h"].shape[1], edge_features=batch.inputs["edge_attr"].shape[1])
    return Subject(
        model,
        batch.inputs,
        lambda output: mse_loss(output, batch.target.to(output.device)),
        "100 systems of 5 particles",
    )


def mace() -> Subject:
    """MACE with 64 channels up to l = 1 on 4 molecules of ethanol, energies and forces."""
    from benchmarks.models.mace import mace_model

    batch = {"data": mace_batch(["CH3CH2OH"] * 4, cutoff=5.0), "training": True}
    return Subject(
        mace_model(list(ELEMENTS.values())),
        batch,
        _energy_and_forces("energy"),
        "4 molecules of 9 atoms",
        differentiates=True,
    )


def mace_batch(names: list[str], cutoff: float) -> dict[str, Tensor]:
    """Slightly moved molecules as the loader of MACE gives them, labels included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mace import data, tools
        from mace.tools.torch_geometric.dataloader import DataLoader
    from ase.build import molecule

    table = tools.AtomicNumberTable(list(ELEMENTS.values()))
    atoms = [molecule(name) for name in names]
    for seed, each in enumerate(atoms):
        each.rattle(0.05, seed=seed)
    graphs = [data.AtomicData.from_config(data.config_from_atoms(a), z_table=table, cutoff=cutoff) for a in atoms]
    batch: dict[str, Tensor] = next(iter(DataLoader(graphs, batch_size=len(graphs), shuffle=False))).to_dict()
    return batch


def nequip() -> Subject:
    """NequIP with 32 features up to l = 2 and 4 layers on one molecule of ethanol, energy and forces."""
    from ase.build import molecule

    batch, model = nequip_batch(molecule("CH3CH2OH"), cutoff=5.0), nequip_model()
    return Subject(model, (batch,), _energy_and_forces("total_energy"), "1 molecule of 9 atoms", differentiates=True)


def nequip_model(**options: Any) -> nn.Module:
    """NequIP for hydrogen, carbon and oxygen; ``options`` replace its settings. Leaves float64 the default dtype."""
    from nequip.model import NequIPGNNModel

    _set_state_of_nequip()
    settings = {
        "seed": 0,
        "model_dtype": "float32",
        "r_max": 5.0,
        "type_names": list(ELEMENTS),
        "num_layers": 4,
        "l_max": 2,
        "parity": True,
        "num_features": 32,
        "radial_mlp_width": 64,
        "avg_num_neighbors": 8.0,
        "per_type_energy_scales": 1.0,
        "per_type_energy_shifts": dict.fromkeys(ELEMENTS, 0.0),
    }
    model: nn.Module = NequIPGNNModel(**{**settings, **options})
    return model


def nequip_batch(atoms: Any, cutoff: float) -> dict[str, Tensor]:
    """Slightly moved atoms as the pipeline of NequIP gives them. Leaves float64 the default dtype."""
    from nequip.data import AtomicDataDict, compute_neighborlist_, from_ase

    _set_state_of_nequip()
    atoms.rattle(0.05, seed=0)
    batch = from_ase(atoms)
    batch[AtomicDataDict.ATOM_TYPE_KEY] = torch.tensor([list(ELEMENTS).index(symbol) for symbol in atoms.symbols])
    found: dict[str, Tensor] = compute_neighborlist_(batch, r_max=cutoff)
    return found


def _set_state_of_nequip() -> None:
    """What the library asks for before anything else; it makes float64 the default dtype, of its data too."""
    from nequip.utils.global_state import set_global_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_global_state()
    torch.set_default_dtype(torch.float64)  # also where the state was set before


def schnet() -> Subject:
    """SchNet of torch-geometric with its own default sizes on 8 molecules of 12 atoms."""
    from torch_geometric.nn.models import SchNet

    def all_pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        near = (batch[:, None] == batch) & ~torch.eye(len(batch), dtype=torch.bool, device=batch.device)
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
    "segnn-products": segnn_products,
    "egnn": egnn,
    "egno": egno,
    "mace": mace,
    "nequip": nequip,
    "schnet": schnet,
    "vn-dgcnn": vn_dgcnn,
    "c4-cnn": c4_cnn,
}
