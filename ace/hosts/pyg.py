"""Terms for torch-geometric: message-passing layers, whatever they return."""

from __future__ import annotations

from torch_geometric.nn import MessagePassing

from ace.generic import generic_term
from ace.terms import register_term

register_term(MessagePassing)(generic_term)
