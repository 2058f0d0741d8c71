"""Errors and warnings: each says what was found, where, and what to do."""

from __future__ import annotations


class AceError(ValueError):
    """Base of every error raised by ace."""


class NoLayerMatched(AceError):
    """No layer of the model was selected by ``layers``; the message lists the nearest layer types."""


class NotAttachable(AceError):
    """Some selected layers cannot carry a relaxation term; the message lists each with its reason."""


class LayerNotCalled(AceError):
    """A relaxed layer is never run through its ``__call__``, so its relaxation term would never act."""


class AlreadyRelaxed(AceError):
    """The model already carries relaxation terms."""


class NotRelaxed(AceError):
    """The model carries no relaxation terms."""


class OptimizerMismatch(AceError):
    """The primal optimizer misses parameters of the relaxed model, or holds one twice."""


class NonFiniteLoss(AceError):
    """The loss was not finite for several steps in a row."""


class ShapeMismatch(AceError):
    """Two tensors that must have the same shape do not."""


class CheckpointMismatch(AceError):
    """A checkpoint belongs to another model or to another configuration, or is damaged."""


class CertificateMismatch(AceError):
    """A certificate was made for another model or for other weights; the message says what differs."""


class DataError(AceError):
    """A data file is missing, truncated or altered; the message says how to get it."""


class ConfigError(AceError):
    """A configuration has an unknown key or a value of the wrong type."""


class NotWritten(AceError, OSError):
    """A file could not be written (disk full, no permission); what was there before is intact."""


class AceWarning(UserWarning):
    """Base of every warning issued by ace."""


class ConstraintNotMet(AceWarning):
    """The relaxation was not zero (or not within its bound) when it was removed."""
