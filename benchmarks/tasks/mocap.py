"""Human motion: where will 31 joints be a quarter of a second from now?

Recordings of the CMU Graphics Lab Motion Capture Database (mocap.cs.cmu.edu; created with funding from
NSF EIA-0196217), with the samples of GMN (Huang et al., ICLR 2022) and EGNO (Xu et al., ICML 2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ace.errors import ConfigError
from ace.groups import E3, SO2
from ace.symmetry import act_by_sample
from benchmarks.motion import load_motion
from benchmarks.tasks.base import Batch, Dynamics, Samples

SUBJECTS = {"run": "run09", "walk": "walk35"}
HORIZON = 30  # frames from the input to the last target
STEPS = 5  # target frames: the last five up to the horizon
VERTICAL = (0.0, 1.0, 0.0)
MOST_SAMPLES = {"train": 200, "valid": 600, "test": 600}


class MotionCapture(Dynamics):
    """The last five of the thirty frames that follow a frame, from its positions and velocities.

    Velocities are differences to the next frame; h = (|v|, height / 10); edges join joints one bone
    apart (attribute 1) or two (attribute 2), the second attribute is the squared distance in the input
    frame. Nothing is divided by a statistic of the batch, so samples do not influence each other.
    Splits are by trial: 200 / 240 / 240 samples for ``"run"``, 198 / 600 / 600 for ``"walk"``.

    The loss is the mean squared error of the five frames; the metric ``mse`` that of the last frame,
    ``mse_all`` that of all five, in squared skeleton units (5.64 cm). A model that returns one frame
    is trained and measured on the last one. For scale, on the test split at the last frame: no motion
    has 89.8 (run) and 12.9 (walk), constant velocity 19.8 and 2.72.

    Gravity singles out the vertical, so these data are not symmetric under rotations. The height is
    given to the models as a number: the group acts on it as on any scalar, that is, not at all. So
    a model can be exactly equivariant and still know how high a joint was, but not which way is up.

    Which recording of the walking subject has which trial number in the published split is not
    recorded; here they are numbered in ascending order. Sizes, frames and start frames are the
    published ones, the assignment of trials to splits is an equally random one: results on
    ``"walk"`` are not comparable to published ones to the last digit. ``"run"`` has no such doubt.

    In all recordings the subject moves towards +z: the mean heading of each is within 1.5° of it, so they have been
    turned that way. It is no law of nature, but nothing in the data tells it from one. With ``turned`` each sample is
    turned about the vertical by an angle of its own, so that gravity is the only direction left.

    Args:
        motion: ``"run"`` (subject 09) or ``"walk"`` (subject 35).
        turned: Whether to turn samples about the vertical.

    Raises:
        ConfigError: An unknown motion.
        DataError: The data are missing or damaged.
    """

    def __init__(self, motion: Literal["run", "walk"], turned: bool = False) -> None:
        if motion not in SUBJECTS:
            raise ConfigError(f"motion capture task: motion={motion!r} is unknown; there are 'run' and 'walk'")
        self.name = f"mocap-{motion}" + turned * "-turned"
        self.group = E3()
        arrays = load_motion(SUBJECTS[motion])
        edge_index, hops = skeleton_edges(arrays["edges"])
        splits = {split: _samples(arrays, split, edge_index, hops) for split in MOST_SAMPLES}
        if turned:
            splits = {split: _turned(samples, seed) for seed, (split, samples) in enumerate(splits.items())}
        super().__init__(edge_index, splits)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over the target frames, or over the last one if the model returns one."""
        prediction = model(**batch.inputs)
        return mse_loss(prediction, batch.target if prediction.dim() == 3 else batch.target[:, -1])

    def metrics(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``mse`` of the last frame and, if the model returns all frames, ``mse_all`` of all."""
        if prediction.dim() == 2:
            return {"mse": mse_loss(prediction, target[:, -1])}
        return {"mse": mse_loss(prediction[:, -1], target[:, -1]), "mse_all": mse_loss(prediction, target)}

    def model_options(self, model_name: str) -> dict[str, Any]:
        """Feature sizes and, for EGNO, the number of frames."""
        options = super().model_options(model_name)
        return {**options, "steps": STEPS} if model_name == "egno" else options


def skeleton_edges(bones: np.ndarray) -> tuple[Tensor, Tensor]:
    """Directed edges between joints that are one or two bones apart.

    Args:
        bones: Pairs of joints, shape (b, 2); each joint has a bone.

    Returns:
        Edges (2, e), in the order of (source, target), and the number of bones 1 or 2 of each, (e,).

    Example:
        >>> edge_index, hops = skeleton_edges(np.array([[0, 1], [1, 2]]))
        >>> edge_index.T.tolist(), hops.tolist()
        ([[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]], [1, 2, 1, 1, 2, 1])
    """
    joints = int(bones.max()) + 1
    near = torch.zeros(joints, joints, dtype=torch.long)
    child, parent = torch.from_numpy(bones).T
    near[child, parent] = near[parent, child] = 1
    two_apart = (near @ near > 0) & (near == 0) & ~torch.eye(joints, dtype=torch.bool)
    hops = near + 2 * two_apart
    edge_index = torch.nonzero(hops).T
    return edge_index, hops[edge_index[0], edge_index[1]]


def _samples(arrays: dict[str, np.ndarray], split: str, edge_index: Tensor, hops: Tensor) -> Samples:
    stored = {"train": "train", "valid": "val", "test": "test"}[split]
    trials, starts = arrays[f"{stored}_trial"], arrays[f"{stored}_start"]
    per_trial = MOST_SAMPLES[split] // len(trials)
    frames = torch.from_numpy((arrays["trial_offset"][trials, None] + starts[:, :per_trial]).ravel())
    xyz = torch.from_numpy(arrays["xyz"])
    pos = xyz[frames]
    vel = xyz[frames + 1] - pos
    h = torch.stack((vel.norm(dim=-1), pos[..., 1] / 10), -1)
    distance2 = (pos[:, edge_index[0]] - pos[:, edge_index[1]]).square().sum(-1)
    edge_attr = torch.stack((hops.to(xyz.dtype).expand_as(distance2), distance2), -1)
    last_frames = frames[:, None] + torch.arange(HORIZON - STEPS + 1, HORIZON + 1)
    return Samples(pos, vel, h, edge_attr, xyz[last_frames].transpose(1, 2))


def _turned(samples: Samples, seed: int) -> Samples:
    """Turn each sample about the vertical by a random angle."""
    elements, index = SO2(VERTICAL).sample(len(samples.pos), seed), torch.arange(len(samples.pos))
    vectors = {name: getattr(samples, name) for name in ("pos", "vel", "target")}
    return replace(samples, **{name: act_by_sample(elements, index, x, "vector") for name, x in vectors.items()})
