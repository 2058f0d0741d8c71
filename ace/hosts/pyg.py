"""Terms for torch-geometric: message-passing layers that return a tensor or a tuple of them."""

from __future__ import annotations

from torch_geometric.nn import MessagePassing

from ace.terms import generic_term, register_term

register_term(MessagePassing)(generic_term)
