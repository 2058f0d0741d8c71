"""What a task offers to the training loop: batches, loss, metrics and its symmetry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ace.groups import Element, Group
from ace.symmetry import act_by_sample

Target = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Several samples, and what is to be predicted for them.

    Attributes:
        inputs: Keyword arguments of the model's ``forward``. Graphs are joined into one, with the number of its graph
            for each node under ``batch``; without that, the first axis of every input is that of the samples.
        target: A tensor, or several by name where the model returns a dict.
    """

    inputs: dict[str, Tensor]
    target: Target

    def __len__(self) -> int:
        """Number of samples."""
        if "batch" in self.inputs:
            return int(self.inputs["batch"][-1]) + 1
        return len(next(iter(self.inputs.values())))

    def part(self, first: int, last: int) -> Batch:
        """Return the samples from number ``first`` to before ``last``.

        Rows of what is named ``edge...`` are those of the edges; others are those of the nodes, or of the samples.

        Example:
            >>> batch = Batch({"pos": torch.ones(6, 3), "batch": torch.tensor([0, 0, 1, 1, 1, 2])}, torch.ones(3))
            >>> part = batch.part(1, 3)
            >>> part.inputs["batch"].tolist(), len(part.inputs["pos"]), len(part.target)
            ([0, 0, 0, 1], 4, 2)
        """
        samples = slice(first, last)
        if "batch" not in self.inputs:
            inputs = {name: value[samples] for name, value in self.inputs.items()}
            return Batch(inputs, _each(self.target, lambda value: value[samples]))
        graph = self.inputs["batch"]
        start, stop = torch.searchsorted(graph, torch.tensor([first, last])).tolist()
        nodes = slice(start, stop)
        edges = self.inputs.get("edge_index", graph.new_empty(2, 0))
        inside = (edges[0] >= start) & (edges[0] < stop)

        def rows(value: Tensor) -> Tensor:
            return value[nodes if len(value) == len(graph) else samples]

        inputs = {
            name: value[inside] if name.startswith("edge") else rows(value)
            for name, value in self.inputs.items()
            if name != "edge_index"
        }
        inputs["batch"] = inputs["batch"] - first
        if "edge_index" in self.inputs:
            inputs["edge_index"] = edges[:, inside] - start
        return Batch(inputs, _each(self.target, rows))


def _each(target: Target, change: Callable[[Tensor], Tensor]) -> Target:
    if isinstance(target, Tensor):
        return change(target)
    return {name: change(value) for name, value in target.items()}


class Task(ABC):
    """Data, loss, metric and symmetry.

    Attributes:
        name: Name in the registry.
        group: Symmetry group.
        input_types: Type of each model input, in the words of `ace.groups`.
        output_type: Type of the prediction; of several, by name.
        metric: Name of the metric in `evaluate` that counts; lower is better.
        evaluation_batch: Samples per batch in `evaluate`; no result depends on it.
        further_tests: Splits beside ``"test"`` on which the shipped model is measured at the end.
    """

    name: str
    group: Group
    input_types: ClassVar[dict[str, str]]
    output_type: ClassVar[str | dict[str, str]]
    metric: ClassVar[str] = "mse"
    evaluation_batch: ClassVar[int] = 100
    further_tests: tuple[str, ...] = ()

    @abstractmethod
    def size(self, split: str) -> int:
        """Number of samples of a split."""

    @abstractmethod
    def collate(self, split: str, chosen: Tensor) -> Batch:
        """Join samples of a split, given by their numbers (int64, one axis), into a batch."""

    def batches(self, split: str, batch_size: int, *, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Iterate over a split once.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``.
            batch_size: Samples per batch; the last batch may be smaller.
            shuffle_seed: Seed of the order; ``None`` keeps the stored order.

        Yields:
            Batches that together hold each sample once.
        """
        order = torch.arange(self.size(split))
        if shuffle_seed is not None:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(shuffle_seed))
        for chosen in order.split(batch_size):
            yield self.collate(split, chosen)

    def augment(self, batch: Batch, seed: int) -> Batch:
        """Draw anew what is random in a training batch, such as its degradation; here nothing is.

        Args:
            batch: A batch of the training split.
            seed: Seed of all that is drawn: derived from that of the run and the number of the step.

        Returns:
            The batch to train on.
        """
        del seed
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Training loss, a mean over the samples, without axes; here the mean squared error over all entries."""
        assert isinstance(batch.target, Tensor)
        return mse_loss(model(**batch.inputs), batch.target)

    def metrics(self, prediction: Any, target: Any) -> dict[str, Tensor]:
        """Metrics of one batch, each a mean over its samples."""
        return {"mse": mse_loss(prediction, target)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Metrics of a model over a whole split.

        Args:
            model: Put into evaluation mode for the while.
            split: ``"train"``, ``"valid"`` or ``"test"``.

        Returns:
            Metric name -> mean over the samples.
        """
        training, totals = model.training, dict[str, float]()
        model.eval()
        try:
            for batch in self.batches(split, self.evaluation_batch):
                for name, value in self.metrics(model(**batch.inputs), batch.target).items():
                    totals[name] = totals.get(name, 0.0) + len(batch) * float(value)
        finally:
            model.train(training)
        return {name: total / self.size(split) for name, total in totals.items()}

    def example(self) -> dict[str, Tensor]:
        """Model inputs of a batch of up to four training samples."""
        return next(self.batches("train", 4)).inputs

    def transform(self, batch: Batch, *elements: Element) -> Batch:
        """Transform inputs and target alike.

        Args:
            batch: Any batch of this task.
            elements: From ``group.sample``: one for the whole batch, or one for each of its samples.

        Returns:
            The transformed batch.
        """
        rows = {len(batch): torch.arange(len(batch))}
        if "batch" in batch.inputs:
            rows[len(batch.inputs["batch"])] = batch.inputs["batch"]

        def moved(value: Tensor, kind: str) -> Tensor:
            return act_by_sample(list(elements), rows.get(len(value)), value, kind)

        inputs = {name: moved(value, self.input_types[name]) for name, value in batch.inputs.items()}
        if isinstance(batch.target, Tensor):
            assert isinstance(self.output_type, str)
            return replace(batch, inputs=inputs, target=moved(batch.target, self.output_type))
        assert isinstance(self.output_type, dict)
        targets = {name: moved(value, self.output_type[name]) for name, value in batch.target.items()}
        return replace(batch, inputs=inputs, target=targets)

    def model_options(self, model_name: str) -> dict[str, Any]:
        """Constructor arguments of a model that follow from the data."""
        del model_name
        return {}


@dataclass(frozen=True)
class Samples:
    """One split: S samples of graphs with n nodes and e edges each, float32.

    Attributes:
        pos: Positions, shape (S, n, 3).
        vel: Velocities, shape (S, n, 3).
        h: Invariant node features, shape (S, n, d_h).
        edge_attr: Invariant edge attributes, shape (S, e, d_e).
        target: Shape (S, n, 3) or (S, n, T, 3).
    """

    pos: Tensor
    vel: Tensor
    h: Tensor
    edge_attr: Tensor
    target: Tensor


class Dynamics(Task):
    """Prediction of positions on graphs that all have the same edges.

    Args:
        edge_index: Source and target node of each edge of one graph, shape (2, e).
        splits: Samples of ``"train"``, ``"valid"`` and ``"test"``.
    """

    input_types: ClassVar[dict[str, str]] = {
        "pos": "position",
        "vel": "vector",
        "h": "scalar",
        "edge_index": "edge_index",
        "edge_attr": "invariant",
        "batch": "invariant",
    }
    output_type: ClassVar[str] = "position"

    def __init__(self, edge_index: Tensor, splits: dict[str, Samples]) -> None:
        self.edge_index = edge_index
        self.splits = splits
        self._topology = lru_cache(maxsize=8)(self._build_topology)

    def size(self, split: str) -> int:  # noqa: D102
        return len(self.splits[split].pos)

    def collate(self, split: str, chosen: Tensor) -> Batch:  # noqa: D102
        samples = self.splits[split]
        edge_index, batch = self._topology(len(chosen), samples.pos.shape[1])
        pos, vel, h, edge_attr, target = (
            values[chosen].flatten(0, 1)
            for values in (samples.pos, samples.vel, samples.h, samples.edge_attr, samples.target)
        )
        inputs = {
            "pos": pos,
            "vel": vel,
            "h": h,
            "edge_index": edge_index,
            "edge_attr": edge_attr,
            "batch": batch,
        }
        return Batch(inputs, target)

    def model_options(self, model_name: str) -> dict[str, Any]:
        """Sizes of the features."""
        train = self.splits["train"]
        return {"node_features": train.h.shape[-1], "edge_features": train.edge_attr.shape[-1]}

    def _build_topology(self, graphs: int, nodes: int) -> tuple[Tensor, Tensor]:
        """Edges (2, graphs * e) and graph index of the nodes of several copies of the graph."""
        index = torch.arange(graphs)
        edge_index = (self.edge_index[:, None] + nodes * index[:, None]).flatten(1)
        return edge_index, index.repeat_interleave(nodes)
