r"""The equivariance error of a model on the batch it is being trained on, with its graph.

With one random element :math:`g_s` for each sample s of the batch,

.. math:: r^2 = \frac{\sum_s \lVert f(g_s x_s) - g_s f(x_s) \rVert^2}{\sum_s \lVert f(x_s) \rVert^2} ,

whose expectation over the elements is the mean over the group. The norm below is differentiated too: were it held
fixed, a smaller f would pass for a more symmetric one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ace.calls import call
from ace.distributed import place, total
from ace.errors import AceError
from ace.groups import Element, Group, Permutations, act
from ace.inputs import UNMOVED, Input, model_inputs, parameter_names, with_inputs
from ace.metrics import Types, output_leaves, typed_outputs

BLOCK = 1024
"""Samples whose elements are drawn together: of a batch divided over processes, each draws the blocks of its own."""


class Watch:
    """Remembers how the model was called in a forward pass, and measures its equivariance error there.

    Args:
        model: The model, possibly wrapped (``DistributedDataParallel``, compiled).
        inputs: Types of its inputs, as in ``ace.equivariance_error``.
        outputs: Types of its outputs, as in ``ace.equivariance_error``.
        share: Share of the samples that is used, the first ones of the batch.
        seed: Seed of the elements.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[int | str, str] | None = None,
        outputs: Types = None,
        share: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.inputs, self.outputs = inputs, outputs
        self.share = share
        self.seed = seed
        self._seen: tuple[tuple[Any, ...], dict[str, Any], Any] | None = None
        self._read: tuple[Any, list[Input], Samples] | None = None
        self._random: Tensor | None = None
        self._autocast: list[torch.autocast] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Remember the first call of the model inside the context."""
        self._seen = self._read = None
        before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.model.register_forward_hook(self._after, with_kwargs=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del model, args, kwargs
        if self._seen is None:
            self._random = torch.random.get_rng_state()
            self._autocast = [
                torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
                for device in ("cpu", "cuda")
            ]

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        del model
        if self._seen is None:
            self._seen = (args, kwargs, output)

    def read(self) -> tuple[Any, list[Input], Samples]:
        """Return the arguments of the remembered call, its tensors with their types, and its samples.

        Raises:
            AceError: The model was not called inside the context.
        """
        if self._seen is None:
            raise AceError("the constraint is measured on the batch: run the model inside problem.observing()")
        if self._read is None:  # once, however many groups there are
            plain = unwrapped(self.model)
            args, kwargs, _ = self._seen
            named = {**dict(zip(parameter_names(plain), args, strict=False)), **kwargs} if kwargs else args
            arguments = model_inputs(plain, named, self.inputs)
            self._read = named, arguments, Samples(arguments, self.share)
        return self._read

    def squares(self, group: Group, step: int, divided: bool = False) -> tuple[Tensor, Tensor]:
        """Measure the error of the remembered call.

        Args:
            group: The group.
            step: Number of the update: each draws its own elements.
            divided: Whether the batch is this process's part of a larger one. Its samples are then moved by the
                elements that one process with the whole batch would draw for them.

        Returns:
            For each sample ‖f(g x) - g f(x)‖², and for each ‖f(x)‖², with their graphs; shape (samples,). Of several
            outputs, the sum, each divided by its mean ‖f(x)‖² over the samples.

        Raises:
            AceError: The model was not called inside the context, or types are missing or do not fit.
        """
        example, arguments, samples = self.read()
        assert self._seen is not None  # `read` has refused
        run = getattr(self.model, "module", self.model)  # a wrapper has prepared its backward pass for one call
        plain = unwrapped(self.model)
        output = self._seen[2]
        nodes = samples.nodes if isinstance(group, Permutations) else None
        elements = samples.elements(group, (self.seed, step), divided)
        leaves = typed_outputs(plain, group, elements[0], arguments, output, self.outputs, [], nodes)
        moved = {
            entry.path: act_by_sample(
                elements,
                None if entry.kind == "edge_index" else samples.index(entry.value),
                samples.part(entry.value, entry.name),
                entry.kind,
            )
            for entry in arguments
        }
        with torch.random.fork_rng(devices=[]), ExitStack() as stack:
            if self._random is not None:
                torch.random.set_rng_state(self._random)  # dropout must drop the same
            for precision in self._autocast:
                stack.enter_context(precision)
            there = call(run, with_inputs(example, moved))
        differences, sizes = [], []
        after = output_leaves(there, self.outputs)
        for (_, value, kind), (_, found, _) in zip(leaves, after, strict=True):
            index, before = (
                samples.index(value),
                samples.part(value).to(torch.promote_types(value.dtype, torch.float32)),
            )
            expected = act_by_sample(elements, index, before, kind)
            scale: Tensor | float = 1.0
            if len(leaves) > 1:
                square = before.detach().square().sum()
                sums = torch.stack((square, torch.full_like(square, samples.count)))
                square, count = total(sums) if divided else sums
                scale = square / count
            differences.append(by_sample((found - expected).square(), index, samples.count) / scale)
            sizes.append(by_sample(before.square(), index, samples.count) / scale)
        return torch.stack(differences).sum(0), torch.stack(sizes).sum(0)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel`` and ``torch.compile``.

    Example:
        >>> unwrapped(nn.DataParallel(nn.Identity()))
        Identity()
    """
    for name in ("module", "_orig_mod"):
        model = getattr(model, name, model)
    return model


def act_by_sample(elements: list[Element], index: Tensor | None, tensor: Tensor, kind: str) -> Tensor:
    """Transform each sample of a tensor by its own element.

    Args:
        elements: One for each sample, or one for all.
        index: Sample of each row of the tensor, int64 of shape (rows,); None if all rows are one sample.
        tensor: Rows first.
        kind: Its type, see `ace.groups`.

    Returns:
        The transformed tensor.

    Example:
        >>> from ace.groups import SO3
        >>> x = torch.randn(4, 3)
        >>> elements = SO3().sample(2)
        >>> moved = act_by_sample(elements, torch.tensor([0, 0, 1, 1]), x, "vector")
        >>> bool(torch.allclose(moved[2:], act(elements[1], x[2:], "vector")))
        True
    """
    if len(elements) == 1:
        return act(elements[0], tensor, kind)
    if kind == "invariant" or (kind in UNMOVED and elements[0].permutation is None):
        return tensor
    if index is None:
        raise AceError(
            f"a tensor of type {kind!r} and shape {tuple(tensor.shape)} has one row neither for each node nor for each "
            f"of the {len(elements)} samples of the batch, so that it cannot be transformed with them"
        )
    if kind in ("vector", "position") and tensor.shape[-1] in (2, 3) and elements[0].matrix is not None:
        linear = [element.plane if tensor.shape[-1] == 2 else element.matrix for element in elements]
        matrices = torch.stack([m for m in linear if m is not None]).to(tensor)[index]
        rows = torch.einsum("rij,r...j->r...i", matrices, tensor)
        shifts = [element.translation for element in elements if element.translation is not None]
        if kind == "position" and shifts:
            shift = torch.stack(shifts)[:, : tensor.shape[-1]].to(tensor)[index]
            rows = rows + shift.view(len(shift), *[1] * (tensor.dim() - 2), -1)
        return rows
    parts = [act(element, tensor[index == number], kind) for number, element in enumerate(elements)]
    return torch.cat(parts)[torch.argsort(torch.argsort(index, stable=True), stable=True)]


def by_sample(squares: Tensor, index: Tensor | None, count: int) -> Tensor:
    """Sum the entries of each sample, whose number each row of the tensor has in ``index``; shape (count,)."""
    if index is None:
        return squares.sum().reshape(1)
    return squares.new_zeros(count).index_add(0, index, squares.flatten(1).sum(1) if squares.dim() > 1 else squares)


class Samples:
    """Which sample each row of a tensor belongs to, and which rows belong to the share that is used.

    Graphs joined into one batch, one after the other, are told apart by an integer input named ``batch``; dense
    tensors by their first axis, if all inputs that move have at least three axes. Otherwise all is one sample, moved
    by one element.
    """

    def __init__(self, arguments: list[Input], share: float) -> None:
        moving = [entry.value for entry in arguments if entry.kind not in UNMOVED]
        scalars = [entry.value for entry in arguments if entry.kind == "scalar"]
        rows = [value for value in [*moving, *scalars] if value.dim() > 1]
        graph = next((e.value for e in arguments if e.name == "batch" and e.value.dim() == 1), None)
        edges = next((e.value for e in arguments if e.name == "edge_index" and e.value.dim() == 2), None)
        self._index: dict[int, Tensor] = {}
        count = 1
        if graph is not None and len(graph):
            count = int(graph.max()) + 1
            self._index[count] = torch.arange(count, device=graph.device)
            if edges is not None:
                self._index[edges.shape[1]] = graph[edges[0]]
            self._index[len(graph)] = graph
        elif moving and all(value.dim() > 2 for value in moving) and len({len(value) for value in moving}) == 1:
            count = len(moving[0])
            self._index[count] = torch.arange(count, device=moving[0].device)
        if any(len(value) not in self._index for value in moving):
            count, self._index = 1, {}
        self.device = next((entry.value.device for entry in arguments), torch.device("cpu"))
        self.count = max(1, round(share * count))
        self._whole = self.count == count
        self._graph = None if graph is None or len(graph) not in self._index else graph[graph < self.count]
        self.nodes = len(self._graph) if self._graph is not None else rows[0].shape[-2] if rows else 1

    def elements(self, group: Group, key: tuple[int, int], divided: bool = False) -> list[Element]:
        """Draw one element for each sample; all permutations within graphs together are one of the whole batch.

        Args:
            group: The group.
            key: Decides what is drawn.
            divided: Whether the samples are this process's part of a batch: it takes its own of what is drawn for all.
        """
        permuted = isinstance(group, Permutations)
        count = self.count if self._graph is None or not permuted else len(self._graph)
        first, whole = place(count, self.device) if divided else (0, count)
        if not permuted or self._graph is None:
            drawn = []
            for block in range(first // BLOCK, -(-(first + count) // BLOCK)):
                seed = hash((*key, block)) & 0x7FFFFFFF
                size = min(BLOCK, whole - block * BLOCK)
                drawn += group.sample(size, seed, nodes=self.nodes if permuted else None)
            return drawn[first % BLOCK :][:count]
        [permutation] = group.sample(1, hash((*key, 0)) & 0x7FFFFFFF, nodes=whole)
        assert permutation.permutation is not None
        order = permutation.permutation - first
        order = order[(order >= 0) & (order < count)]
        graph = self._graph.cpu()
        shuffled = order[torch.argsort(graph[order], stable=True)]  # graph by graph
        return [Element(permutation=torch.empty_like(shuffled).scatter(0, torch.argsort(graph, stable=True), shuffled))]

    def index(self, tensor: Tensor) -> Tensor | None:
        """Return the sample of each row that is used, or None if all rows are one sample."""
        if not self._index or tensor.dim() == 0 or len(tensor) not in self._index:
            return None
        index = self._index[len(tensor)]
        return index if self._whole else index[index < self.count]

    def part(self, tensor: Tensor, name: str = "") -> Tensor:
        """Return the rows (columns of an ``edge_index``) of the samples that are used."""
        if self._whole or tensor.dim() == 0:
            return tensor
        if name == "edge_index" and tensor.shape[1] in self._index:
            return tensor[:, self._index[tensor.shape[1]] < self.count]
        return tensor[self._index[len(tensor)] < self.count] if len(tensor) in self._index else tensor
