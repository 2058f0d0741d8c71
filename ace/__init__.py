"""ace: train equivariant models through a relaxation that dual ascent removes."""

from ace import checkpoint
from ace.certificate import Certificate, load_certificate
from ace.certification import certify
from ace.constraints import Bounded, EquivarianceError, Exact, Resilient
from ace.diagnosis import Diagnosis, diagnose
from ace.groups import (
    E3,
    O3,
    SO2,
    SO3,
    Cyclic,
    Dihedral,
    Inversion,
    Octahedral,
    Permutations,
    Reflections,
    Tilts,
    Translations,
)
from ace.history import History
from ace.metrics import ErrorReport, equivariance_error, lie_derivative
from ace.problem import PrimalDual, Problem
from ace.relaxation import (
    Relaxation,
    base_state_dict,
    load_base_state_dict,
    projection_gap,
    relax,
    relaxations,
    restore,
    restored,
    summary,
)
from ace.terms import register_term

__all__ = [
    "E3",
    "O3",
    "SO2",
    "SO3",
    "Bounded",
    "Certificate",
    "Cyclic",
    "Diagnosis",
    "Dihedral",
    "EquivarianceError",
    "ErrorReport",
    "Exact",
    "History",
    "Inversion",
    "Octahedral",
    "Permutations",
    "PrimalDual",
    "Problem",
    "Reflections",
    "Relaxation",
    "Resilient",
    "Tilts",
    "Translations",
    "base_state_dict",
    "certify",
    "checkpoint",
    "diagnose",
    "equivariance_error",
    "lie_derivative",
    "load_base_state_dict",
    "load_certificate",
    "projection_gap",
    "register_term",
    "relax",
    "relaxations",
    "restore",
    "restored",
    "summary",
]

__version__ = "0.1.0"
