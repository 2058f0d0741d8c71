"""Relaxed models of other libraries: each class runs all checks of ``ace.testing.HostTests``."""
