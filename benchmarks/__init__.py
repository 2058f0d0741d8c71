"""Data and training suites around ace; run from a checkout, never part of the wheel."""
