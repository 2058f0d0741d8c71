"""The training methods that are compared."""

from __future__ import annotations

from benchmarks import plugins
from benchmarks.methods.base import Method, Strict, Unconstrained
from benchmarks.methods.constrained import Ace, AcePaper, AceResilient, AceTolerance
from benchmarks.methods.controllers import Controlled
from benchmarks.methods.rivals import (
    Augmentation,
    CosineDecay,
    Cr,
    CrNorm,
    LinearDecay,
    Penalty,
    Projection,
    Remul,
    RemulGradNorm,
    Rpp,
)

METHODS: dict[str, type[Method]] = {
    "strict": Strict,
    "unconstrained": Unconstrained,
    "augmentation": Augmentation,
    "ace": Ace,
    "ace-resilient": AceResilient,
    "ace-tolerance": AceTolerance,
    "ace-paper": AcePaper,
    "linear-decay": LinearDecay,
    "cosine-decay": CosineDecay,
    "controlled": Controlled,
    "cr": Cr,
    "cr-norm": CrNorm,
    "penalty": Penalty,
    "rpp": Rpp,
    "projection": Projection,
    "remul": Remul,
    "remul-gradnorm": RemulGradNorm,
}
METHODS |= plugins.load("methods", METHODS)
"""Name in the configuration -> method."""

__all__ = ["METHODS", "Method"]
