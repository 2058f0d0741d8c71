"""The benchmark tasks by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks import plugins, shapes
from benchmarks.data import explain_file, find_file
from benchmarks.molecules import md_available, qm9_available
from benchmarks.motion import MOTION_HOW, motion_file
from benchmarks.tasks import rotmnist, smoke
from benchmarks.tasks.base import Batch, Task
from benchmarks.tasks.broken import Broken, BrokenSO2
from benchmarks.tasks.gravity import Gravity
from benchmarks.tasks.md import MolecularDynamics
from benchmarks.tasks.mocap import SUBJECTS, MotionCapture
from benchmarks.tasks.modelnet import ModelNet
from benchmarks.tasks.nbody import NBody
from benchmarks.tasks.qm9 import QM9

__all__ = ["TASKS", "Batch", "Task", "TaskEntry"]


@dataclass(frozen=True)
class TaskEntry:
    """What the suite needs to know about a task before it builds it.

    Attributes:
        factory: Constructor; takes the data options of the configuration.
        models: Names of the models usually run on it.
        available: Says whether its data are at hand and, if not, what to do; without it, they are generated.
    """

    factory: Callable[..., Task]
    models: tuple[str, ...]
    available: Callable[[], tuple[bool, str]] = lambda: (True, "")


def _file_available(relative: str, how: str) -> tuple[bool, str]:
    return (True, "") if find_file(relative) else (False, explain_file(relative, how))


TASKS = {
    "broken": TaskEntry(Broken, ("vector",)),
    "broken-so2": TaskEntry(BrokenSO2, ("vector-axis",)),
    "nbody": TaskEntry(NBody, ("egnn", "segnn")),
    "nbody-iso": TaskEntry(partial(NBody, clip="norm"), ("egnn", "segnn")),
    "nbody-gravity": TaskEntry(Gravity, ("egnn", "segnn")),
    **{
        f"mocap-{motion}{turned * '-turned'}": TaskEntry(
            partial(MotionCapture, motion, turned=turned),
            ("egno", "egnn"),
            partial(_file_available, motion_file(subject), MOTION_HOW),
        )
        for turned in (False, True)
        for motion, subject in SUBJECTS.items()
    },
    **{
        f"modelnet{classes}": TaskEntry(
            partial(ModelNet, classes),
            ("vn-pointnet", "vn-dgcnn", "se3-transformer"),
            partial(_file_available, shapes.FILES[classes], shapes.HOW[classes]),
        )
        for classes in shapes.FILES
    },
    "rotmnist": TaskEntry(rotmnist.Digits, ("c8cnn",), partial(_file_available, rotmnist.FILE, rotmnist.HOW)),
    "smoke2d": TaskEntry(smoke.Smoke, ("c4cnn", "cnn"), partial(_file_available, smoke.FILE, smoke.HOW)),
    "qm9": TaskEntry(QM9, ("schnet", "segnn-molecular"), qm9_available),
    "md": TaskEntry(MolecularDynamics, ("schnet-forces", "segnn-forces", "nequip", "mace", "equiformer"), md_available),
}
TASKS |= plugins.load("tasks", TASKS)
"""Name -> `TaskEntry`."""
