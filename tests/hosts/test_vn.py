"""Vector neurons: the point-cloud classifiers of the benchmarks, layers that no rule of ace knows."""

from __future__ import annotations

import torch

import ace
from ace.testing import HostTests
from benchmarks.models.vn import VNDGCNN, VNPointNet

POINTS = {"inputs": {"points": "vector"}, "outputs": "scalar"}
ORDER = {"inputs": {"points": "scalar"}, "outputs": "invariant"}


def clouds() -> torch.Tensor:
    return torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(0))


class TestPointNet(HostTests):
    def model(self):
        return VNPointNet(classes=5, width=4, k=5)

    def batch(self):
        return clouds()

    def symmetries(self):
        return [(ace.SO3(), POINTS), (ace.Permutations(), ORDER)]


class TestDGCNN(HostTests):
    def model(self):
        return VNDGCNN(classes=5, width=4, k=5, layers=2)

    def batch(self):
        return clouds()

    def symmetries(self):
        return [(ace.O3(), POINTS), (ace.Permutations(), ORDER)]


class TestMaxPooling(HostTests):
    def model(self):
        return VNPointNet(classes=5, width=4, k=5, cross=False, pool="max")

    def batch(self):
        return clouds()

    def symmetries(self):
        return [(ace.O3(), POINTS), (ace.Permutations(), ORDER)]
