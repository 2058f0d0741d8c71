"""Rising smoke: the flow of the next time steps, in a box that smoke enters from one of its sides.

The rotation data of Wang, Walters and Yu (ICML 2022), generated anew with PhiFlow after their description.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ace.errors import ConfigError, DataError
from ace.groups import Cyclic
from ace.probing import evaluating
from benchmarks.data import cache_folder, checksum_file, find_file, load_arrays, load_file, save_arrays
from benchmarks.tasks.base import Batch, Task

FILE = "smoke2d/smoke_rotation_phiflow.npz"
ARRAYS = ("velocity", "strength_k", "inflow_side")
PACKAGES = "phiflow==3.4.0 phiml==1.16.1"
HOW = (
    "It is generated, not downloaded: `ace data smoke2d` does so (five minutes) after "
    f"`python -m pip install {PACKAGES}` in the same environment."
)
SIDES = (((32, 5), (0, 0.01)), ((59, 32), (-0.01, 0)), ((32, 59), (0, -0.011)), ((5, 32), (0.01, 0)))
"""Centre of the inflow at the bottom, right, top and left, and what a unit of smoke is pushed by there, (x, y)."""
RUNS = tuple((4 * i + side + 1, side) for i in (0, 2, 4, 6) for side in range(4))
"""Strength of the push and side of each run."""
LEFT_OUT = 30  # frames at the start of a run, in which little moves
SIZES = (0.5265, 0.6051, 0.6923, 0.7103, 0.8521, 0.8666, 0.9116, 0.909)
SIZES += (0.9462, 0.9935, 0.9979, 0.985, 1.0257, 0.9887, 0.9907, 1.0028)
"""Root mean square of the last ten frames of each published run."""
GIVEN = 10  # frames that the model is given
UNSEEN = 6  # i of the runs that are tested on only
VALID, FUTURE = 60, 80  # first target frames


class Smoke(Task):
    """Velocity fields of 64 × 64 pixels: ten frames are given, the model predicts the next, and so on from its own.

    The metric ``rmse`` is that of the source, the root mean square error per component over twenty frames that the
    model predicts one after the other. As there, it is taken on two test splits: ``"test"``, the future of the runs
    that are trained on, and ``"domain"``, runs of another strength, which are not. The loss is the mean squared error
    of the first ``unrolled`` frames predicted, with its gradient through all of them.

    Runs differ in the side that smoke enters from and in the strength of buoyancy. Twelve runs train on the frames 0
    to 59; the frames 60 to 79 validate and 80 to 99 are the future test (the ten frames before are given). The four
    strongest runs are the domain test, with targets from 10, 30, 50 and 70 on. No target frame is in two splits.
    For scale, no change has an RMSE of 0.47 in the future and 1.02 in the domain.

    Turned data are nearly, but not quite, as likely: strengths differ from side to side, the force is a tenth larger
    for the inflow at the top, and the components are those on the faces of the pixels, half a pixel aside.

    Fields are divided by their root mean square over the training frames, metrics are in the units of the data. They
    are not comparable to published numbers, which are for other times, more runs and another solver.

    Args:
        unrolled: Frames predicted in a training sample; published: 6.
        horizon: Frames predicted when validating and testing, at most 20.
        train: Number of training samples, drawn at random once; None: all.

    Raises:
        ConfigError: A number out of range.
        DataError: The data are missing or damaged.
    """

    name = "smoke2d"
    group = Cyclic(4)
    input_types: ClassVar[dict[str, str]] = {"frames": "vector_image"}
    output_type: ClassVar[str] = "vector_image"
    metric: ClassVar[str] = "rmse"
    evaluation_batch: ClassVar[int] = 16
    further_tests = ("domain",)

    def __init__(self, unrolled: int = 6, horizon: int = 20, train: int | None = None) -> None:
        wrong = [
            f"{name}={value}: is from 1 to {most}"
            for name, value, most in (("unrolled", unrolled, VALID - GIVEN), ("horizon", horizon, FUTURE - VALID))
            if not 1 <= value <= most
        ]
        if wrong:
            raise ConfigError("smoke2d task: " + "; ".join(wrong))
        arrays = load()
        velocity = torch.from_numpy(arrays["velocity"]).float()
        strength, side = torch.from_numpy(arrays["strength_k"]), torch.from_numpy(arrays["inflow_side"])
        unseen = (strength - 1 - side) // 4 == UNSEEN
        seen, others = torch.nonzero(~unseen).flatten(), torch.nonzero(unseen).flatten()
        self.scale = float(velocity[seen, :VALID].square().mean().sqrt())
        self.velocity = velocity / self.scale
        self.steps = {"train": unrolled, "valid": horizon, "test": horizon, "domain": horizon}
        self.windows = {  # run and first target frame of each sample
            "train": torch.cartesian_prod(seen, torch.arange(GIVEN, VALID - unrolled + 1)),
            "valid": torch.cartesian_prod(seen, torch.tensor([VALID])),
            "test": torch.cartesian_prod(seen, torch.tensor([FUTURE])),
            "domain": torch.cartesian_prod(others, torch.arange(GIVEN, FUTURE, FUTURE - VALID)),
        }
        if train is not None:
            samples = len(self.windows["train"])
            if not 0 < train <= samples:
                raise ConfigError(f"smoke2d task: train={train}: there are 1 to {samples} samples to train on")
            order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
            self.windows["train"] = self.windows["train"][order[:train]]

    def size(self, split: str) -> int:
        """Number of samples of a split: ``"train"``, ``"valid"``, ``"test"`` or ``"domain"``."""
        return len(self.windows[split])

    def collate(self, split: str, chosen: Tensor) -> Batch:
        """Join samples: ten frames, (B, 20, 64, 64), and those that follow, (B, 2 · steps, 64, 64)."""
        run, first = self.windows[split][chosen].T[:, :, None]
        given = self.velocity[run, first + torch.arange(-GIVEN, 0)]
        target = self.velocity[run, first + torch.arange(self.steps[split])]
        return Batch({"frames": given.flatten(1, 2)}, target.flatten(1, 2))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of the frames that are predicted one after the other."""
        assert isinstance(batch.target, Tensor)
        return mse_loss(self.predict(model, batch), batch.target)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predict as many frames as the target has, each from the ten before it, given or predicted."""
        assert isinstance(batch.target, Tensor)
        frames = batch.inputs["frames"]
        for _ in range(batch.target.shape[1] // 2):
            frames = torch.cat([frames, model(frames=frames[:, -2 * GIVEN :])], 1)
        return frames[:, 2 * GIVEN :]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """``rmse`` of a split, in the units of the data."""
        with evaluating(model):
            squares = [
                len(batch) * mse_loss(self.predict(model, batch), batch.target)
                for batch in self.batches(split, self.evaluation_batch)
            ]
        return {"rmse": self.scale * float(torch.stack(squares).sum() / self.size(split)) ** 0.5}


def load() -> dict[str, np.ndarray]:
    """Velocity, strength_k and inflow_side of the runs: the published numbers, or those of `generate`.

    Raises:
        DataError: Not found, unreadable, or neither.
    """
    path = find_file(FILE)
    if path is not None and checksum_file(path).is_file() and is_published(arrays := load_arrays(path)):
        return arrays
    return load_file(FILE, ARRAYS, HOW)


def generate() -> Path:
    """Simulate the runs with PhiFlow, and compare them with the published ones.

    The flow amplifies rounding, so on another processor the last frames of a run differ by up to 1 %.

    Returns:
        The file written into the cache folder.

    Raises:
        DataError: PhiFlow is not installed, or its runs are not the published ones. Nothing is written then.
    """
    strength, side = np.array(RUNS, dtype=np.int64).T
    arrays = {"velocity": simulate(RUNS, 100), "strength_k": strength, "inflow_side": side}
    if not is_published(arrays):
        raise DataError(
            f"what PhiFlow made here are not the published runs: their last frames have the sizes {sizes(arrays)}, "
            f"expected {SIZES}. Those were made with {PACKAGES}; `python -m pip list` says what is installed here."
        )
    path = cache_folder() / FILE
    save_arrays(path, arrays)
    return path


def is_published(arrays: dict[str, np.ndarray]) -> bool:
    """Whether these are the published runs but for rounding, by the size of their last frames."""
    if set(arrays) != set(ARRAYS) or arrays["velocity"].shape != (len(RUNS), 100, 2, 64, 64):
        return False
    runs = np.stack([arrays["strength_k"], arrays["inflow_side"]], 1)
    return np.array_equal(runs, RUNS) and np.allclose(sizes(arrays), SIZES, rtol=1e-3)


def sizes(arrays: dict[str, np.ndarray]) -> list[float]:
    """Root mean square of the last ten frames of each run."""
    return (np.square(arrays["velocity"][:, -10:], dtype=float).mean((1, 2, 3, 4)) ** 0.5).round(4).tolist()


def simulate(runs: Sequence[tuple[int, int]], frames: int) -> np.ndarray:
    """Simulate smoke that rises, or is pushed aside, in a closed box of 64 × 64 cells.

    Args:
        runs: Strength of the push and side of the inflow of each.
        frames: How many time steps to return, after the first 30.

    Returns:
        Velocities, float16, shape (runs, frames, 2, 64, 64): component x or y, y, x; on the first 64 of the 65 faces
        of each axis.

    Raises:
        DataError: PhiFlow is not installed.
    """
    try:
        from phi import flow
    except ModuleNotFoundError as error:
        raise DataError(f"{error.name} is not installed: python -m pip install {PACKAGES}") from None
    found = []
    with flow.math.precision(64), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pressure that is determined up to a constant
        run, vector = flow.batch("run"), flow.channel(vector="x,y")
        grid = {"bounds": flow.Box(x=64, y=64), "x": 64, "y": 64}
        centre = flow.math.tensor([SIDES[side][0] for _, side in runs], run, vector)
        push = flow.math.tensor([[strength * part for part in SIDES[side][1]] for strength, side in runs], run, vector)
        inflow = flow.CenteredGrid(flow.Sphere(centre, radius=5), flow.extrapolation.BOUNDARY, **grid)
        smoke = flow.CenteredGrid(0, flow.extrapolation.BOUNDARY, **grid)
        velocity = flow.StaggeredGrid(0, flow.extrapolation.ZERO, **grid)
        for step in range(LEFT_OUT + frames):
            smoke = flow.advect.mac_cormack(smoke, velocity, 1) + inflow
            pushed = flow.resample(smoke * push, to=velocity)
            velocity = flow.advect.semi_lagrangian(velocity, velocity, 1) + pushed
            velocity, _ = flow.fluid.make_incompressible(velocity, (), flow.Solve("scipy-direct", 1e-5, 0))
            if step >= LEFT_OUT:
                faces = velocity.staggered_tensor().numpy("run,vector,y,x")
                found.append(faces[..., :64, :64].astype(np.float16))
    return np.stack(found, 1)
