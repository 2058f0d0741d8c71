"""What the options of a task, a model or a method are: fields with a type, a range and a default."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """Options that are checked, cannot be changed, and refuse keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Relaxing(Options):
    """Options of the methods that choose their relaxation terms."""

    term: Literal["linear", "mlp", "spectral"] = "linear"
    rank: int | None = Field(None, gt=0)
    normalize: bool = False
