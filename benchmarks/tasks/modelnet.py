"""Which of ten (or forty) classes is a point cloud, seen from anywhere?

ModelNet10 and ModelNet40 (Wu et al., CVPR 2015) with the official split, as point clouds of few points: 300 is what
Deng et al. (ICCV 2021) use for vector neurons, and the papers on relaxed training after them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ace.errors import ConfigError
from ace.groups import SO2, SO3
from ace.probing import evaluating
from benchmarks.shapes import load_shapes
from benchmarks.tasks.base import Batch, Task

Rotation = Literal["so3", "z", "none"]


@dataclass(frozen=True)
class Clouds:
    """One split: S clouds of n points each, float32, shape (S, n, 3), and their classes, int64, shape (S,)."""

    points: Tensor
    label: Tensor


class ModelNet(Task):
    r"""Classes of point clouds, from training clouds that are degraded and rotated anew each time they are drawn.

    Each cloud is degraded, centred at its mean and scaled to the radius 1: of its ``points`` points a share ``dropout``
    is left out (left out, not replaced by copies of the first point as in the published code), and normal noise of
    standard deviation ``jitter``, in units of the radius, is added. Then it is rotated. Validation and test clouds are
    degraded and rotated once, the same in every run; those of the training split in every batch anew (`augment`).

    The loss is the cross-entropy. Metrics, each over the whole split: ``error``, the share of clouds that are
    classified wrongly, which counts; ``accuracy``, the share of the others; ``class_accuracy``, the mean over the
    classes of the accuracy on their clouds. On the test split the two accuracies are measured on the clouds without
    their rotation too (``accuracy_aligned``, ``class_accuracy_aligned``): an invariant model has the same.

    ModelNet has no validation split; here the official training split gives its clouds, drawn at random.

    Args:
        classes: 10 or 40.
        points: Points of a cloud before any are left out; at most 512 (ModelNet10) or 1024 (ModelNet40).
        dropout: Share of the points that is left out, at least 0 and below 1.
        jitter: Standard deviation of the noise on the points.
        train_rotation: Rotations of the training clouds: ``"so3"`` all, ``"z"`` about the vertical, ``"none"``.
        test_rotation: Rotations of the validation and test clouds.
        train: Number of training clouds; None for all that are left.
        valid: Number of validation clouds.
        seed: Seed of the split, and of all that is drawn for validation and test clouds.

    Raises:
        ConfigError: More clouds or points than there are, or an option out of its range; all are listed.
        DataError: The data are missing or damaged.
    """

    input_types: ClassVar[dict[str, str]] = {"points": "vector"}
    output_type: ClassVar[str] = "invariant"
    metric: ClassVar[str] = "error"

    def __init__(
        self,
        classes: Literal[10, 40],
        points: int = 300,
        dropout: float = 0.0,
        jitter: float = 0.0,
        train_rotation: Rotation = "so3",
        test_rotation: Rotation = "so3",
        train: int | None = None,
        valid: int = 400,
        seed: int = 0,
    ) -> None:
        self.name, self.group, self.classes = f"modelnet{classes}", SO3(), classes
        arrays = load_shapes(classes)
        there, most = arrays["train_points"].shape[:2]
        rest = there - valid
        rotations = {"train_rotation": train_rotation, "test_rotation": test_rotation}
        wrong = [
            f"{key}={value}: is one of {', '.join(get_args(Rotation))}"
            for key, value in rotations.items()
            if value not in get_args(Rotation)
        ]
        if not 1 <= points <= most:
            wrong.append(f"points={points}: is between 1 and {most}")
        if not 0 <= dropout < 1:
            wrong.append(f"dropout={dropout}: is at least 0 and below 1")
        if jitter < 0:
            wrong.append(f"jitter={jitter}: is at least 0")
        if not 1 <= valid < there or not 1 <= (rest if train is None else train) <= max(rest, 1):
            wrong.append(f"train={train}, valid={valid}: are at least 1, and at most {there} together")
        if wrong:
            raise ConfigError(f"{self.name} task: " + "; ".join(wrong))
        self.dropout, self.jitter, self.train_rotation = dropout, jitter, train_rotation
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(there, generator=generator)
        learnt, test = (_clouds(arrays, split, points, generator) for split in ("train", "test"))
        held_out = Clouds(learnt.points[order[:valid]], learnt.label[order[:valid]])
        chosen = order[valid : there if train is None else valid + train]
        self.views = {"train": Clouds(centred(learnt.points[chosen]), learnt.label[chosen])}
        for split, clouds in (("valid", held_out), ("test", test)):
            degraded = self.degraded(clouds.points, generator)
            self.views[f"{split}-aligned"] = replace(clouds, points=degraded)
            self.views[split] = replace(clouds, points=rotated(degraded, test_rotation, _draw(generator)))

    def size(self, split: str) -> int:  # noqa: D102
        return len(self.views[split].label)

    def collate(self, split: str, chosen: Tensor) -> Batch:  # noqa: D102
        clouds = self.views[split]
        return Batch({"points": clouds.points[chosen]}, clouds.label[chosen])

    def augment(self, batch: Batch, seed: int) -> Batch:
        """Degrade and rotate training clouds."""
        generator = torch.Generator().manual_seed(seed)
        degraded = self.degraded(batch.inputs["points"], generator)
        return replace(batch, inputs={"points": rotated(degraded, self.train_rotation, _draw(generator))})

    def degraded(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Leave points out, centre and scale what is left, and add noise; shape (S, points left, 3)."""
        count, size, _ = points.shape
        kept = max(1, round(size * (1 - self.dropout)))
        chosen = torch.rand(count, size, generator=generator).argsort(1)[:, :kept, None]
        left = centred(points.take_along_dim(chosen, 1)) if kept < size else centred(points)
        return left + self.jitter * torch.randn(left.shape, generator=generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        assert isinstance(batch.target, Tensor)
        return cross_entropy(model(**batch.inputs), batch.target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Error, accuracy, and mean over the classes of the accuracy; of a whole split together."""
        hit = (prediction.argmax(-1) == target).double()
        by_class = torch.stack([hit[target == label].mean() for label in target.unique()])
        return {"error": 1 - hit.mean(), "accuracy": hit.mean(), "class_accuracy": by_class.mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Metrics of a model over a whole split; on the test split the accuracies on aligned clouds too."""
        result: dict[str, float] = {}
        with evaluating(model):
            for view in [split, f"{split}-aligned"] if split == "test" else [split]:
                scores = torch.cat([model(**batch.inputs) for batch in self.batches(view, self.evaluation_batch)])
                found = self.metrics(scores, self.views[view].label)
                result |= {name + view.removeprefix(split).replace("-", "_"): float(v) for name, v in found.items()}
        return result

    def model_options(self, model_name: str) -> dict[str, Any]:
        """Number of classes."""
        return {"classes": self.classes}


def centred(points: Tensor) -> Tensor:
    """Move clouds of shape (S, n, 3) to the mean 0 and scale them to the radius 1.

    Example:
        >>> centred(torch.tensor([[[1.0, 0, 0], [5.0, 0, 0]]])).tolist()
        [[[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]
    """
    points = points - points.mean(1, keepdim=True)
    radius = points.norm(dim=-1).amax(1)
    return points / radius.clamp_min(torch.finfo(points.dtype).tiny)[:, None, None]


def rotated(points: Tensor, rotation: Rotation, seed: int) -> Tensor:
    """Rotate each cloud of shape (S, n, 3) by a random rotation of its own."""
    if rotation == "none":
        return points
    group = SO3() if rotation == "so3" else SO2()  # about z, which is up
    matrices = [element.matrix for element in group.sample(len(points), seed)]
    return points @ torch.stack([m for m in matrices if m is not None]).to(points).mT


def _clouds(arrays: dict[str, np.ndarray], split: str, points: int, generator: torch.Generator) -> Clouds:
    stored = torch.from_numpy(arrays[f"{split}_points"][:, :points])
    label = torch.from_numpy(arrays[f"{split}_label"]).long()
    if stored.is_floating_point():
        return Clouds(stored, label)
    # Centres of cells: spread over their cell, or a network could read off the lattice how the cloud was turned.
    return Clouds(stored + torch.rand(stored.shape, generator=generator) - 0.5, label)


def _draw(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))
