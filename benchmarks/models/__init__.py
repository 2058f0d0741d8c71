"""Models to be relaxed: plain PyTorch, written without knowledge of the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import nn

from benchmarks import plugins
from benchmarks.models.cnn import CNN
from benchmarks.models.egnn import EGNN
from benchmarks.models.egno import EGNO
from benchmarks.models.equiformer import EquiformerForces
from benchmarks.models.forcefield import SchNetForces, SEGNNForces
from benchmarks.models.mace import MACE
from benchmarks.models.molecular import MolecularSEGNN
from benchmarks.models.nequip import NequIP
from benchmarks.models.schnet import SchNet
from benchmarks.models.se3_transformer import SE3Classifier
from benchmarks.models.segnn import SEGNN
from benchmarks.models.steerable import SteerableClassifier, SteerableFlow
from benchmarks.models.vector import VectorAxisNet, VectorNet
from benchmarks.models.vn import VNDGCNN, VNPointNet


@dataclass(frozen=True)
class ModelEntry:
    """What the suite needs to know about a model.

    Attributes:
        build: Constructor.
        layers: Class names of the layers to relax.
        read_types: Layer -> e3nn irreps of the node tensors it is called with, concatenated in the
            order of its arguments; None where its representations are others, so that the methods that regularise
            linear terms by them do not apply.
        write_types: Layer -> e3nn irreps of the node tensors it returns, concatenated.
        read_positions: Layer -> the entries of what it is called with that translations move.
        turns: Layer -> number of quarter turns, counterclockwise, to the matrices by which they act on the channels it
            reads and on those it writes; None where its features are no fields on pixels.
        tasks: Tasks it runs on beside those that name it.
        package: The package that the model comes from, if it is none of those that the suite needs anyway.
        proper: Whether it is equivariant to rotations only, also where the data have the symmetry of reflections.
    """

    build: Callable[..., nn.Module]
    layers: tuple[str, ...]
    read_types: Callable[[Any], str] | None = None
    write_types: Callable[[Any], str] | None = None
    read_positions: Callable[[Any], slice] = lambda layer: slice(0)
    turns: Callable[[Any], dict[int, tuple[Any, Any]]] | None = None
    tasks: tuple[str, ...] = ()
    package: str | None = None
    proper: bool = False

    @property
    def installed(self) -> bool:
        """Whether the package is there."""
        return self.package is None or find_spec(self.package) is not None


def _schnet(build: Callable[..., nn.Module]) -> ModelEntry:
    """Terms beside SchNet's convolutions, which see invariants only, read the positions as well."""
    return ModelEntry(
        build=build,
        layers=("CFConv",),
        read_types=lambda layer: f"{layer.lin1.in_features}x0e+1x1o",
        write_types=lambda layer: f"{layer.lin2.out_features}x0e",
        read_positions=lambda layer: slice(layer.lin1.in_features, layer.lin1.in_features + 3),
    )


def _egnn(build: Callable[..., nn.Module]) -> ModelEntry:
    return ModelEntry(
        build=build,
        layers=("EGNNLayer",),
        read_types=lambda layer: f"{layer.hidden}x0e+1x1o+1x1o",  # h, pos, vel
        write_types=lambda layer: f"{layer.hidden}x0e+1x1o",  # h, pos
        read_positions=lambda layer: slice(layer.hidden, layer.hidden + 3),
    )


def _segnn(build: Callable[..., nn.Module]) -> ModelEntry:
    return ModelEntry(
        build=build,
        layers=("SEGNNLayer",),
        read_types=lambda layer: f"{layer.multiplicity}x0e+{layer.multiplicity}x1o+1x0e+1x1o",
        write_types=lambda layer: f"{layer.multiplicity}x0e+{layer.multiplicity}x1o",
    )


def _vectors(build: Callable[..., nn.Module], layer: str) -> ModelEntry:
    """Axial vectors (VNBlock's cross products) count as vectors: the group of the point clouds has no reflections."""
    return ModelEntry(
        build=build,
        layers=(layer,),
        read_types=lambda layer: f"{layer.channels_in}x1o",
        write_types=lambda layer: f"{layer.channels_out}x1o",
    )


def _steerable(build: Callable[..., nn.Module]) -> ModelEntry:
    return ModelEntry(build=build, layers=("R2Conv",), turns=_quarter_turns, package="escnn")


def _quarter_turns(layer: Any) -> dict[int, tuple[Any, Any]]:
    """Those of the quarter turns that are in the group of the fields of a convolution."""
    reads, writes = layer.in_type, layer.out_type
    quarters = [np.linalg.matrix_power([[0, -1], [1, 0]], number) for number in range(4)]
    return {
        number: (reads.representation(element), writes.representation(element))
        for element in reads.testing_elements
        for number, quarter in enumerate(quarters)
        if np.allclose(reads.gspace.basespace_action(element), quarter, atol=1e-6)
    }


MODELS = {
    "egnn": _egnn(EGNN),
    "segnn": _segnn(SEGNN),
    "segnn-molecular": _segnn(MolecularSEGNN),
    "segnn-forces": _segnn(SEGNNForces),
    "schnet": _schnet(SchNet),
    "schnet-forces": _schnet(SchNetForces),
    "nequip": ModelEntry(build=NequIP, layers=("Linear", "FullyConnectedTensorProduct"), package="nequip"),
    "mace": ModelEntry(build=MACE, layers=("Linear", "FullyConnectedTensorProduct"), package="mace"),
    "equiformer": ModelEntry(
        build=EquiformerForces, layers=("L2DistAttention", "FeedForward"), package="equiformer_pytorch", proper=True
    ),
    "egno": _egnn(EGNO),
    "c8cnn": _steerable(SteerableClassifier),
    "c4cnn": _steerable(SteerableFlow),
    "cnn": ModelEntry(build=CNN, layers=()),  # not equivariant: a reference for the strict method
    "vn-pointnet": _vectors(VNPointNet, "VNBlock"),
    "vn-dgcnn": _vectors(VNDGCNN, "VNBlock"),
    "se3-transformer": ModelEntry(
        build=SE3Classifier,
        layers=("AttentionBlockSE3", "FeedForwardBlockSE3"),
        package="se3_transformer_pytorch",
        proper=True,
    ),
    "vector": _vectors(VectorNet, "VectorLayer"),
    # no irreps: they are those of all rotations, and about the axis alone more maps are equivariant
    "vector-axis": ModelEntry(build=VectorAxisNet, layers=("VectorLayer",)),
}
MODELS |= plugins.load("models", MODELS)
"""Name -> `ModelEntry`."""
