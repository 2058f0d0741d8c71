"""Rising smoke: the flow of the next time steps, in a box that smoke enters from one of its sides.

The rotation data of Wang, Walters and Yu (ICML 2022), generated anew with PhiFlow after their description.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ace.errors import ConfigError
from ace.groups import Cyclic
from ace.probing import evaluating
from benchmarks.data import load_file
from benchmarks.tasks.base import Batch, Task

FILE = "smoke2d/smoke_rotation_phiflow.npz"
ARRAYS = ("velocity", "strength_k", "inflow_side")
HOW = (
    "It is generated, not downloaded. With PhiFlow 3.4, float64 and the solver 'scipy-direct': a box of 64 x 64 with "
    "closed walls, an inflow disc of radius 5 at (32, 5), (59, 32), (32, 59) or (5, 32) for side j = 0 to 3; in each "
    "step smoke = MacCormack advection (dt 1) + inflow, velocity = semi-Lagrangian advection of itself (dt 1) + smoke "
    "* k * force, with force (0, 0.01), (-0.01, 0), (0, -0.011), (0.01, 0), then pressure projection; runs k = 4 i + "
    "j + 1, i in 0, 2, 4, 6. Stored: velocity (float16, 16 x 100 x 2 x 64 x 64: run, steps 30 to 129, component x or "
    "y, y, x; the first 64 faces of each axis), strength_k, inflow_side."
)
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
        arrays = load_file(FILE, ARRAYS, HOW)
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
