"""The recordings of human motion: where they are, whether they are intact, and how to get them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ace.errors import DataError
from benchmarks.acclaim import positions, read_amc, read_asf
from benchmarks.data import (
    cache_folder,
    checksum,
    checksum_file,
    find_file,
    load_arrays,
    load_file,
    read_pickled_arrays,
    retrieve,
    retry,
    save_arrays,
    verify,
)

ORIGIN = "https://raw.githubusercontent.com/andreimano/ACE/8d6d2ad0183f377ac2115ab268ce087c9ac79984"
"""Repository (MIT licence) and commit that the running motions and both splits are downloaded from."""

MOTION_FILES = ("EGNO/motion/dataset/motion_run.pkl", "EGNO/motion/dataset/split_run.pkl")

RECORDINGS = "http://mocap.cs.cmu.edu/subjects/35"
"""Where the CMU Graphics Lab has the recordings of the walking motions (8 MB), free to use, to be acknowledged as:
The data used in this project was obtained from mocap.cs.cmu.edu. The database was created with funding from NSF
EIA-0196217."""

WALK_SPLIT_FILE = "EGNO/motion/dataset/split.pkl"

MOTION_HOW = (
    "Run `ace data mocap`: it downloads the running motions, and the recordings (8 MB) that it computes the walking "
    "ones from."
)

MOTION_ARRAYS = (
    "xyz",
    "trial_offset",
    "edges",
    "train_trial",
    "train_start",
    "val_trial",
    "val_start",
    "test_trial",
    "test_start",
)

JOINTS = (
    "root lhipjoint lfemur ltibia lfoot ltoes rhipjoint rfemur rtibia rfoot rtoes lowerback upperback thorax lowerneck "
    "upperneck head lclavicle lhumerus lradius lwrist lhand lfingers lthumb rclavicle rhumerus rradius rwrist rhand "
    "rfingers rthumb"
)
"""Joints of the walking subject, in their order in the arrays."""

WALKS = {
    "35_01": (358, 4.45429, 14.86871, 13.7346, 0.19734),
    "35_02": (406, 5.3356, 14.92185, 9.09129, 0.19113),
    "35_03": (401, 0.51699, 14.87782, 10.06767, 0.19302),
    "35_04": (401, 0.53347, 14.96317, 8.44019, 0.18745),
    "35_05": (427, 0.54454, 14.932, 12.07041, 0.18839),
    "35_06": (401, 0.67399, 14.90502, 6.66631, 0.18479),
    "35_07": (360, 0.48748, 14.94176, 17.07199, 0.19565),
    "35_08": (451, 0.90415, 14.95759, 11.48595, 0.18556),
    "35_09": (384, 0.69872, 15.01121, 6.42366, 0.18582),
    "35_10": (426, 0.48413, 14.94143, 15.3257, 0.18361),
    "35_11": (385, 0.5833, 14.96366, 10.87957, 0.1821),
    "35_12": (397, 0.7255, 14.95422, 7.67514, 0.18113),
    "35_13": (451, 0.92221, 14.96909, 9.36522, 0.18465),
    "35_14": (411, 0.79091, 14.93635, 14.42733, 0.18782),
    "35_15": (406, 0.45415, 14.93954, 14.62668, 0.18375),
    "35_16": (443, 0.85856, 14.94328, 12.87429, 0.18373),
    "35_28": (417, 0.67051, 15.13369, 14.81971, 0.18096),
    "35_29": (497, 0.64606, 15.08953, 8.76534, 0.16621),
    "35_30": (412, 0.92885, 15.00037, 8.133, 0.18121),
    "35_31": (421, 0.71427, 14.94239, 5.35582, 0.18143),
    "35_32": (392, 0.73676, 14.88916, 6.7002, 0.19484),
    "35_33": (410, 1.02163, 14.87978, 8.57334, 0.19794),
    "35_34": (415, 5.37453, 14.90512, 9.96715, 0.19231),
}
"""The walking motions by trial of CMU, in the order of the arrays: number of frames; mean x, y and z of all joints, and
their mean speed per frame, in skeleton units."""

WALK_STARTS = {"35_10": 7}  # it jumps before its seventh frame; the others are taken from the first

WALK_REST = "02f19e56ddf55f83ae748a271240575346d4f89c0488be36d7d9c27d5e849eba"
"""`checksum` of the arrays of the walking motions but for the positions."""


def motion_file(subject: str) -> str:
    """Data file, as in `find_file`, of ``"run09"`` or ``"walk35"``."""
    return f"mocap/{subject}.npz"


def load_motion(subject: str) -> dict[str, np.ndarray]:
    """Motion capture data of one subject, verified.

    Args:
        subject: ``"run09"`` or ``"walk35"``.

    Returns:
        xyz (frames, 31, 3) float32, all trials one after the other; trial_offset (trials + 1,), first
        frame of each trial; edges (30, 2), bones; and for each of train, val and test the trials
        (``train_trial``) and the start frames in each (``train_start``), int64. Lengths are in the
        skeleton unit of CMU, 5.64 cm; axis 1 points up; 120 frames per second.

    Raises:
        DataError: Not found, unreadable, or not the published numbers; walking motions that `download_walk` made
            may differ from them by rounding.
    """
    relative = motion_file(subject)
    path = find_file(relative)
    if subject == "walk35" and path is not None and checksum_file(path).is_file():
        arrays = load_arrays(path)
        if not walk_fault(arrays):
            return arrays
    return load_file(relative, MOTION_ARRAYS, MOTION_HOW)


def download_motion() -> Path:
    """Download the running motions, and what the walking motions are made of.

    Returns:
        The folder ``mocap`` of the cache folder.

    Raises:
        DataError: As `download_run` and `download_walk`, which comes second: what the first has written is kept.
    """
    run = download_run()
    try:
        return download_walk().parent
    except DataError as error:
        raise DataError(f"{error} The running motions are there: {run}.") from error


def download_run(origin: str = ORIGIN) -> Path:
    """Download the running motions (subject 09), convert and verify them.

    Args:
        origin: Address that the published files are below.

    Returns:
        The file written into the cache folder, ``mocap/run09.npz``.

    Raises:
        DataError: No connection, or what arrived is not the published data. Nothing is written then.
    """
    relative = motion_file("run09")
    advice = retry(relative, "mocap")
    with tempfile.TemporaryDirectory() as folder:
        urls = [f"{origin}/{name}" for name in MOTION_FILES]
        motion, split = (
            read_pickled_arrays(retrieve(url, folder, relative, "mocap").read_bytes(), url) for url in urls
        )
    arrays = _motion_arrays(motion, split, origin, advice)
    verify("run09", arrays, origin, advice)
    path = cache_folder() / relative
    save_arrays(path, arrays)
    return path


def download_walk(origin: str = ORIGIN, recordings: str = RECORDINGS) -> Path:
    """Download the recordings of the walking subject (35), compute where its joints are, and verify that.

    Args:
        origin: Address that the published split is below.
        recordings: Address that the skeleton and the recordings are below.

    Returns:
        The file written into the cache folder, ``mocap/walk35.npz``.

    Raises:
        DataError: No connection, or what arrived is not the published data but for rounding. Nothing is written then.
    """
    relative = motion_file("walk35")
    advice = retry(relative, "mocap")
    with tempfile.TemporaryDirectory() as folder:

        def fetch(url: str) -> bytes:
            return retrieve(url, folder, relative, "mocap").read_bytes()

        split_url, skeleton_url = f"{origin}/{WALK_SPLIT_FILE}", f"{recordings}/35.asf"
        split = read_pickled_arrays(fetch(split_url), split_url)
        skeleton = read_asf(fetch(skeleton_url).decode(errors="replace"), skeleton_url)
        if (names := " ".join(skeleton.names)) != JOINTS:
            raise DataError(f"{skeleton_url} has the joints {names}; expected are {JOINTS}. {advice}")
        trials = []
        for trial, (frames, *_) in WALKS.items():
            url, first = f"{recordings}/{trial}.amc", WALK_STARTS.get(trial, 1)
            recording = read_amc(fetch(url).decode(errors="replace"), skeleton, url)
            start, there = first - recording.first, len(recording.values)
            if start < 0 or start + frames > there:
                raise DataError(
                    f"{url} has the frames {recording.first} to {recording.first + there - 1}; needed are {first} to "
                    f"{first + frames - 1}. {advice}"
                )
            trials.append(positions(skeleton, recording.values[start : start + frames]))
    bones = list(enumerate(skeleton.parents.tolist()))[1:]
    arrays = _motion_arrays((bones, trials), split, origin, advice)
    if fault := walk_fault(arrays):
        raise DataError(f"{recordings} and {origin} do not give the published numbers of walk35: {fault}. {advice}")
    path = cache_folder() / relative
    save_arrays(path, arrays)
    return path


def walk_fault(arrays: dict[str, np.ndarray]) -> str:
    """What keeps arrays from being the published walking motions but for rounding.

    Args:
        arrays: Name -> array, as in `load_motion`.

    Returns:
        The first trial whose mean position or speed is another one, or that something else is; empty if they are it.
    """
    rest = {name: array for name, array in arrays.items() if name != "xyz"}
    xyz = arrays.get("xyz", np.empty(0))
    shape = (sum(frames for frames, *_ in WALKS.values()), len(JOINTS.split()), 3)
    if checksum(rest) != WALK_REST or xyz.shape != shape or xyz.dtype != np.float32:
        return "the bones, the split, or the shape of the positions are other ones"
    trials = np.split(xyz.astype(float), arrays["trial_offset"][1:-1])
    for (trial, (_, *expected)), frames in zip(WALKS.items(), trials, strict=True):
        found = [*frames.mean((0, 1)), np.linalg.norm(np.diff(frames, axis=0), axis=-1).mean()]
        if not np.allclose(found, expected, rtol=0, atol=1e-5):
            return (
                f"the joints in trial {trial} have the mean position and speed {np.round(found, 5).tolist()}, expected "
                f"{expected}"
            )
    return ""


def _motion_arrays(motion: Any, split: Any, origin: str, advice: str) -> dict[str, np.ndarray]:
    """Arrays of `load_motion` from (bones, trials), and from the published split: one dict per partition."""
    try:
        edges, trials = motion
        arrays = {
            "xyz": np.concatenate(trials).astype(np.float32),
            "trial_offset": np.cumsum([0, *map(len, trials)]).astype(np.int64),
            "edges": np.array(edges, dtype=np.int64),
        }
        for partition, starts in zip(("train", "val", "test"), split, strict=True):
            arrays[f"{partition}_trial"] = np.array(list(starts), dtype=np.int64)
            arrays[f"{partition}_start"] = np.array(list(starts.values()), dtype=np.int64)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{origin}: the motion files are not laid out as published ({error!r}). {advice}") from error
    return arrays
