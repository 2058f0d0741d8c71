"""Where data files are, whether they are intact, and how to get them.

Data are looked up in the folder ``$ACE_DATA`` and then in the cache folder, ``$ACE_CACHE`` or else
``~/.cache/ace``. Only arrays are read; what is published as a pickle is converted by a reader that
admits NumPy arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ace.errors import DataError
from ace.history import replace_file
from benchmarks.acclaim import positions, read_amc, read_asf

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

CHECKSUMS = {
    "run09": "0846b20df07843d5679f88b6d832c349b4cbc9e0d8661d92cd436a83cf36d880",
    "walk35": "385a4ad835b95349041c00834c20565a5d989cfa19149ba09729d081765c3688",
    "modelnet10_points": "12624c3ccca538dc76ddc41e8dedacd3fac8bbb797591505c0ba5b9b7c0811c3",
    "qm9_full": "30eecabccecc13efde57bf327e6da54e5906bef050ed6a7394cca5c14e2d187a",
    "qm9_30k": "ad5c2565b846bb08a86d8cea2246b340618e421c579a2f789d8be49466d888eb",
    "rmd17_ethanol_botnet": "7a40602252ae8ec10b2f4c764259d6533621740291930a0733ae782ab86d8038",
    "acac": "0daef60d2ae827ddad3441518e0af6922280063a8f481757ab020a02273b775a",
    "3bpa_train": "426ce5509e45cc6dea87c711eeaed6f188f179ffda51c6c9f1185ba78242d14c",
    "mnist10k_rot": "602e176df05c2e59168cc52336808c2e535a3b7d42d7eb098d36453ea20bc075",
    "smoke_rotation_phiflow": "a6d006a9ecad35fb82dc2c053792cb6429a3c723ac2eebbff9d6e4cbb976a807",
}
"""`checksum` of the arrays that are read of each published file, by its stem."""

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


def cache_folder() -> Path:
    """Folder for what is generated or downloaded: ``$ACE_CACHE``, or else ``~/.cache/ace``."""
    return Path(os.environ.get("ACE_CACHE") or Path.home() / ".cache" / "ace")


def checksum(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of names, types, shapes and bytes of arrays, whatever file they came from.

    Args:
        arrays: Name -> array of numbers.

    Returns:
        64 hexadecimal digits; the order of the names does not matter.

    Example:
        >>> a, b = np.arange(2), np.ones(3)
        >>> checksum({"a": a, "b": b}) == checksum({"b": b, "a": a})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an ``.npz`` file and its `checksum` (in ``<name>.sha256`` beside it), both atomically.

    Args:
        path: The file; folders are made as needed.
        arrays: Name -> array of numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    # The checksum first: a file whose checksum is missing is refused, a lone checksum is not.
    replace_file(checksum_file(path), checksum(arrays).encode())
    replace_file(path, content.getvalue())


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a file written by `save_arrays` and verify it.

    Args:
        path: The file.

    Returns:
        Name -> array.

    Raises:
        DataError: The file or its checksum is missing, or they do not fit each other.
    """
    try:
        expected = checksum_file(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        expected = ""
    arrays = _read(path)
    if checksum(arrays) != expected:
        raise DataError(
            f"{path} does not have the checksum in {checksum_file(path).name}: it was truncated or altered. "
            f"Delete both files; the next run makes them again, or `ace data` where they were downloaded."
        )
    return arrays


def checksum_file(path: Path) -> Path:
    """Where `save_arrays` puts the checksum of a file."""
    return path.with_name(path.name + ".sha256")


def find_file(relative: str) -> Path | None:
    """Path of a data file, such as ``mocap/run09.npz``, in ``$ACE_DATA`` or else in the cache folder, or ``None``."""
    return next((path for path in _paths(relative) if path.is_file()), None)


def explain_file(relative: str, how: str) -> str:
    """What to do when `find_file` finds nothing: where it looked, and how to get the file."""
    looked = " and ".join(str(path) for path in _paths(relative))
    hint = "" if os.environ.get("ACE_DATA") else " (ACE_DATA is not set)"
    return f"{Path(relative).name} was looked for at {looked}{hint} and is not there. {how}"


def load_file(relative: str, names: Iterable[str], how: str) -> dict[str, np.ndarray]:
    """Read the arrays that are needed of a data file and verify them against `CHECKSUMS`.

    Args:
        relative: The file, as in `find_file`; its checksum is that of its stem.
        names: The arrays.
        how: How to get the file, for the message.

    Returns:
        Name -> array.

    Raises:
        DataError: Not found, unreadable, or not the published numbers.
    """
    path = find_file(relative)
    if path is None:
        raise DataError(explain_file(relative, how))
    stored = _read(path)
    missing = [name for name in names if name not in stored]
    if missing:
        raise DataError(f"{path} has no array {', '.join(missing)}: it is not the file expected. Replace it.")
    arrays = {name: stored[name] for name in names}
    verify(Path(relative).stem, arrays, str(path), f"Delete it, or replace it by an unaltered copy. {how}")
    return arrays


def verify(stem: str, arrays: dict[str, np.ndarray], source: str, remedy: str) -> None:
    """Compare arrays with the published ones.

    Args:
        stem: Name in `CHECKSUMS`.
        arrays: Name -> array.
        source: Where they came from, for the message.
        remedy: What to do, for the message.

    Raises:
        DataError: They are not the published numbers.
    """
    if checksum(arrays) != CHECKSUMS[stem]:
        raise DataError(
            f"{source} does not hold the published numbers of {stem}: checksum {checksum(arrays)}, "
            f"expected {CHECKSUMS[stem]}. {remedy}"
        )


def retrieve(url: str, folder: str, relative: str, command: str) -> Path:
    """Download a file that a data file is made of.

    Args:
        url: Its address.
        folder: Where to.
        relative: The data file, as in `find_file`, for the message.
        command: Name of the data for ``ace data``, for the message.

    Returns:
        The path.

    Raises:
        DataError: No connection, or no such file there.
    """
    import pooch  # needed for downloads only

    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(pooch.retrieve(url, known_hash=None, path=folder, fname=Path(url).name))
    except OSError as error:  # also every error of requests
        raise DataError(f"{url} could not be downloaded ({error}). {retry(relative, command)}") from error


def retry(relative: str, command: str) -> str:
    """What to do when a data file could not be made: for the messages of its download, as in `retrieve`."""
    path = cache_folder() / relative
    return (
        f"Try again. Without a connection, or if the source has changed, put {path.name} and {path.name}.sha256, made "
        f"on another machine by `ace data {command}`, into {path.parent} or into the folder {Path(relative).parent} of "
        "ACE_DATA."
    )


def find_motion(subject: str) -> Path | None:
    """Path of a motion capture file, in ``$ACE_DATA`` or else in the cache folder, or ``None``."""
    return find_file(f"mocap/{subject}.npz")


def explain_motion(subject: str) -> str:
    """What to do when `find_motion` finds nothing."""
    return explain_file(f"mocap/{subject}.npz", MOTION_HOW)


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
    relative = f"mocap/{subject}.npz"
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
    relative = "mocap/run09.npz"
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
    relative = "mocap/walk35.npz"
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


def read_pickled_arrays(content: bytes, source: str) -> Any:
    """Read a pickle of plain containers, numbers and NumPy arrays, without running anything else.

    Args:
        content: The pickle.
        source: Where it came from, for the message.

    Returns:
        The object.

    Raises:
        DataError: Truncated, not a pickle, or one that asks for any other class or function.

    Example:
        >>> read_pickled_arrays(pickle.dumps({"a": np.arange(2)}), "here")
        {'a': array([0, 1])}
    """
    try:
        return _ArrayUnpickler(io.BytesIO(content)).load()
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    except Exception as error:  # pickles fail in every way there is
        raise DataError(f"{source} is damaged or not a pickle ({error!r}). Download it again.") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the three names that pickled arrays use, by their NumPy 1 and NumPy 2 paths."""

    _reconstruct = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return self._reconstruct
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise DataError(f"the pickle asks for {module}.{name}, which is not array data. It was not opened.")


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


def _paths(relative: str) -> list[Path]:
    folders = [Path(os.environ["ACE_DATA"])] if os.environ.get("ACE_DATA") else []
    return [folder / relative for folder in (*folders, cache_folder())]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, AttributeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error!r}): it was truncated or altered. Replace it.") from error
