"""ace: train equivariant models through a relaxation that dual ascent removes."""

from ace import checkpoint
from ace.constraints import Bounded, Exact, Resilient
from ace.problem import PrimalDual, Problem
from ace.relaxation import (
    Relaxation,
    base_state_dict,
    projection_gap,
    relax,
    relaxations,
    restore,
    restored,
    summary,
)
from ace.terms import register_term

__version__ = "0.1.0"
