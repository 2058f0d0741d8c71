"""Data and training suites around ace; run from a checkout, never part of the wheel."""

import torch

torch.serialization.add_safe_globals([slice])  # one is among the constants of e3nn 0.4.4, which MACE pins
