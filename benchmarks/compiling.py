"""Running models through ``torch.compile``, wherever that is possible."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import nn


def compile_in_place(model: nn.Module, mode: str = "default") -> None:
    """Let a model run through ``torch.compile``; what cannot be compiled, or where there is no compiler, runs as it is.

    Args:
        model: Any model.
        mode: That of ``torch.compile``; ``reduce-overhead`` records CUDA graphs on a GPU.
    """
    torch._dynamo.config.suppress_errors = True
    with suppress(AttributeError):  # older versions find out in the backward pass, too late for that
        torch._functorch.config.force_non_lazy_backward_lowering = True
    model.compile(mode=mode)
