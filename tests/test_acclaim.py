"""Acclaim recordings: kinematics against loops over small matrices, the reader on files, and the walking motions."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server import serving

from ace.errors import DataError
from benchmarks import data, motion
from benchmarks.acclaim import MOVES, TURNS, positions, read_amc, read_asf

# --- Skeletons and recordings, described bone by bone and written as files


class Bone(NamedTuple):
    """What an ASF file says of a bone; the motion, a value for each of ``dof``."""

    parent: int  # number of the joint at its beginning, 0 for the root
    direction: tuple[float, ...]
    length: float
    angles: tuple[float, ...]
    order: str
    dof: tuple[str, ...]


def name_of(joint: int) -> str:
    return f"bone{joint}" if joint else "root"


def write_asf(bones, root_order, end="\n"):
    """In the words and with the irregular blanks of the files of CMU."""
    lines = ["# AST/ASF file", ":version 1.10", ":name made", ":units", "  mass 1.0", "  length 0.45", "  angle deg"]
    lines += [":documentation", "   begin of nothing,", "   (written by a test)", ":root"]
    lines += [f"   order {' '.join(root_order)}", "   axis XYZ", "   position 0 0 0  ", "   orientation 0 0 0 "]
    lines.append(":bonedata")
    for joint, bone in enumerate(bones, 1):
        lines += ["  begin", f"     id {joint} ", f"     name {name_of(joint)}  # a bone"]
        lines += [f"     direction {' '.join(map(repr, bone.direction))}  ", f"     length {bone.length!r}"]
        lines.append(f"     axis {' '.join(map(repr, bone.angles))}   {bone.order}")
        if bone.dof:
            lines.append(f"    dof {' '.join(bone.dof)}")
            limits = [f"({-10.0 * place - 1} 170.0)" for place in range(len(bone.dof))]
            lines += [f"    limits {limits[0]}", *(f"           {limit}" for limit in limits[1:])]
        lines.append("  end" if joint % 2 else " end")
    lines += [":hierarchy", "  begin"]
    for parent in range(len(bones) + 1):
        if children := [name_of(joint) for joint, bone in enumerate(bones, 1) if bone.parent == parent]:
            lines.append(f"    {name_of(parent)} {' '.join(children)}")
    return end.join([*lines, "  end", ""])


def write_amc(bones, frames, first=1, end="\n"):
    """``frames``: of each, a list of values for the root and for every bone."""
    lines = ["#!OML:ASF F:\\VICON\\USERDATA\\made.ASF", ":FULLY-SPECIFIED", ":DEGREES"]
    for number, frame in enumerate(frames, first):
        lines.append(str(number))
        moving = [joint for joint in range(len(bones) + 1) if frame[joint]]
        moving[1:] = moving[:0:-1]  # not in the order of the hierarchy
        lines += [f"{name_of(joint)} {' '.join(map(repr, frame[joint]))}" for joint in moving]
    return end.join([*lines, ""])


def in_order(bones):
    """Joints by depth first."""

    def below(joint):
        return [joint, *(j for child, bone in enumerate(bones, 1) if bone.parent == joint for j in below(child))]

    return below(0)


# --- The oracle: one number after the other


def product(a, b):
    return [[sum(a[i][k] * b[k][j] for k in range(4)) for j in range(4)] for i in range(4)]


def shift(x, y, z):
    return [[1, 0, 0, x], [0, 1, 0, y], [0, 0, 1, z], [0, 0, 0, 1]]


def turn(axis, degrees):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return {
        "x": [[1, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0], [0, 0, 0, 1]],
        "y": [[c, 0, s, 0], [0, 1, 0, 0], [-s, 0, c, 0], [0, 0, 0, 1]],
        "z": [[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    }[axis.lower()]


def one_after_the_other(axes, angles):
    """The turn about the first axis is done first, so it is the last factor."""
    result = shift(0, 0, 0)
    for axis, angle in zip(axes, angles, strict=True):
        result = product(turn(axis, angle), result)
    return result


def slow_positions(bones, root_order, frame):
    """Joint number -> position, in one frame."""
    given_of_root = dict(zip((channel.lower() for channel in root_order), frame[0], strict=True))
    turns = [channel for channel in given_of_root if channel in TURNS]
    root_turn = one_after_the_other([channel[1] for channel in turns], [given_of_root[channel] for channel in turns])
    frames = {0: product(shift(*(given_of_root.get(move, 0.0) for move in MOVES)), root_turn)}
    for joint in in_order(bones)[1:]:
        bone = bones[joint - 1]
        there = one_after_the_other(bone.order, bone.angles)
        back = one_after_the_other(bone.order[::-1], [-angle for angle in bone.angles[::-1]])
        own = one_after_the_other([channel[1] for channel in bone.dof], frame[joint])
        along = shift(*(bone.length * part for part in bone.direction))
        frames[joint] = product(product(frames[bone.parent], product(product(there, own), back)), along)
    return {joint: [matrix[i][3] for i in range(3)] for joint, matrix in frames.items()}


# --- Kinematics

ORDER = ("TX", "TY", "TZ", "RX", "RY", "RZ")
ANGLE = st.floats(-180, 180).map(lambda angle: round(angle, 4))
PART = st.floats(-5, 5).map(lambda part: round(part, 5))


@st.composite
def moving_skeletons(draw, frames=3):
    """Bones, order of the root, and values of a few frames."""
    bones = [
        Bone(
            draw(st.integers(0, joint)),
            draw(st.tuples(PART, PART, PART)),
            draw(st.floats(0.1, 9).map(lambda length: round(length, 5))),
            draw(st.tuples(ANGLE, ANGLE, ANGLE)),
            draw(st.permutations("XYZ").map("".join)),
            draw(st.lists(st.sampled_from(TURNS), unique=True).map(tuple)),
        )
        for joint in range(draw(st.integers(1, 6)))
    ]
    root_order = draw(st.permutations([channel.upper() for channel in (*MOVES, *TURNS)]))

    def values(channels):
        return [draw(ANGLE if channel.lower() in TURNS else PART) for channel in channels]

    return bones, root_order, [[values(root_order), *(values(bone.dof) for bone in bones)] for _ in range(frames)]


def read(bones, root_order, frames, end="\n"):
    skeleton = read_asf(write_asf(bones, root_order, end), "made.asf")
    return skeleton, read_amc(write_amc(bones, frames, 7, end), skeleton, "made.amc")


@given(moving=moving_skeletons(), end=st.sampled_from(["\n", "\r\n"]))
def test_positions_are_the_products_of_matrices(moving, end):
    bones, root_order, frames = moving
    skeleton, recording = read(*moving, end)
    joints = in_order(bones)
    assert skeleton.names == tuple(map(name_of, joints))
    assert skeleton.parents.tolist() == [-1, *(joints.index(bones[joint - 1].parent) for joint in joints[1:])]
    assert recording.first == 7
    assert recording.values.dtype == np.float64
    found = positions(skeleton, recording.values)
    assert found.shape == (len(frames), len(joints), 3)
    for here, frame in zip(found, frames, strict=True):
        expected = slow_positions(bones, root_order, frame)
        np.testing.assert_allclose(here, [expected[joint] for joint in joints], rtol=1e-12, atol=1e-10)


@given(moving=moving_skeletons())
def test_bones_keep_their_lengths(moving):
    bones = moving[0]
    skeleton, recording = read(*moving)
    found = positions(skeleton, recording.values)
    for place, joint in enumerate(in_order(bones)[1:], 1):
        bone = bones[joint - 1]
        lengths = np.linalg.norm(found[:, place] - found[:, skeleton.parents[place]], axis=-1)
        np.testing.assert_allclose(lengths, bone.length * math.hypot(*bone.direction), rtol=1e-10, atol=1e-10)


@given(moving=moving_skeletons(frames=2))
def test_the_root_carries_the_rest_along(moving):
    """Frames that differ in the root only are turned and shifted against each other."""
    bones, root_order, (one, other) = moving
    other = [other[0], *one[1:]]
    skeleton, recording = read(bones, root_order, [one, other])
    before, after = positions(skeleton, recording.values)

    def of_root(frame):
        values = [(channel[1], value) for channel, value in zip(root_order, frame[0], strict=True) if channel[0] == "R"]
        return np.array(one_after_the_other(*zip(*values, strict=True)))[:3, :3]

    relative = of_root(other) @ of_root(one).T
    np.testing.assert_allclose(after - after[0], (before - before[0]) @ relative.T, rtol=1e-9, atol=1e-9)
    moves = {channel.lower(): value for channel, value in zip(root_order, other[0], strict=True)}
    np.testing.assert_allclose(after[0], [moves[move] for move in MOVES], rtol=1e-12, atol=1e-12)


def test_no_other_order_of_turns_will_do():
    """The oracle tells an order from its reverse, so the test above does."""
    bone = Bone(0, (1.0, 2.0, 3.0), 1.0, (0.0, 0.0, 0.0), "XYZ", ("rx", "rz"))
    forth = slow_positions([bone], ORDER, [[0.0] * 6, [40.0, 90.0]])[1]
    back = slow_positions([bone._replace(dof=("rz", "rx"))], ORDER, [[0.0] * 6, [90.0, 40.0]])[1]
    assert math.dist(forth, back) > 1


@pytest.mark.parametrize(("bend", "twist"), [(0, 0), (30, 40), (-75, 120), (90, 90)])
def test_two_bones_have_a_closed_form(bend, twist):
    """Both in a plane: the second is turned about its own x axis, which points to -z."""
    bones = [
        Bone(0, (0.0, 1.0, 0.0), 2.0, (0.0, 0.0, 0.0), "XYZ", ("rz",)),
        Bone(1, (0.0, 1.0, 0.0), 3.0, (0.0, 90.0, 0.0), "XYZ", ("rx",)),
    ]
    root = [1.0, 2.0, 3.0, 0.0, 0.0, 0.0]
    skeleton, recording = read(bones, ORDER, [[root, [bend], [twist]]])
    [[start, elbow, hand]] = positions(skeleton, recording.values)
    np.testing.assert_array_equal(start, [1, 2, 3])
    a, b = math.radians(bend), math.radians(bend - twist)
    np.testing.assert_allclose(elbow - start, [-2 * math.sin(a), 2 * math.cos(a), 0], atol=1e-14)
    np.testing.assert_allclose(hand - elbow, [-3 * math.sin(b), 3 * math.cos(b), 0], atol=1e-14)


# --- Files that are as they should be, and others

ASF = """\
# AST/ASF file generated using VICON BodyLanguage
# -----------------------------------------------
:version 1.10
:name VICON
:units
  mass 1.0
  length 0.45
  angle deg
:documentation
   .ast/.asf automatically generated from VICON data
:root
   order TX TY TZ RX RY RZ
   axis XYZ
   position 0 0 0
   orientation 0 0 0
:bonedata
  begin
     id 1
     name hip
     direction 0.6 -0.8 0
     length 2.5
     axis 0 0 0  XYZ
  end
  begin
     id 2
     name femur
     direction 0 -1 0   # down
     length 7.41015
     axis -90 7.62852e-016 20   XYZ
    dof rx rz
    limits (-160.0 20.0)
           (-70.0 70.0)
 end
:hierarchy
  begin
    root hip
    hip femur
  end
"""

AMC = """\
#!OML:ASF F:\\VICON\\USERDATA\\INSTALL\\rory3\\rory3.ASF
:FULLY-SPECIFIED
:DEGREES
3
root 0.325465 18.176 -22.5512 -3.57814 -1.61409 -3.91252
femur -9.69075e-016 60
4
root 0.30077 18.1965 -22.3815 -3.61587 -1.64896 -4.03821
femur 1 61.5
"""


def test_the_files_of_the_format_are_read():
    skeleton = read_asf(ASF, "35.asf")
    assert skeleton.names == ("root", "hip", "femur")
    assert skeleton.parents.tolist() == [-1, 0, 1]
    assert skeleton.channels == ((*MOVES, *TURNS), (), ("rx", "rz"))
    np.testing.assert_allclose(skeleton.offsets, [[0, 0, 0], [1.5, -2, 0], [0, -7.41015, 0]])
    np.testing.assert_array_equal(skeleton.axes[:2], np.stack([np.eye(3)] * 2))
    expected = np.array(one_after_the_other("xyz", [-90, 7.62852e-16, 20]))[:3, :3]
    np.testing.assert_allclose(skeleton.axes[2], expected, atol=1e-15)
    recording = read_amc(AMC, skeleton, "35_01.amc")
    assert recording.first == 3
    assert recording.values[0].tolist() == [0.325465, 18.176, -22.5512, -3.57814, -1.61409, -3.91252, -9.69075e-16, 60]
    assert recording.values[1, -2:].tolist() == [1, 61.5]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# AST", "<html> AST", r", line 1: found '<html>', expected a keyword such as :root"),
        (ASF[ASF.index(":bonedata") :], "", r" has no section :bonedata, :hierarchy\."),
        (ASF[ASF.index("  begin\n     id 2") :], "", r" has no section :hierarchy\."),
        ("angle deg", "angle rad", r", line 8: found angles in rad, expected 'angle deg'"),
        ("   order TX TY TZ RX RY RZ\n", "", r" has no order in the section :root\."),
        ("TX TY TZ RX", "TX TX TZ RX", r", line 12: found order TX TX TZ RX RY RZ, expected each of tx ty tz rx ry rz"),
        ("position 0 0 0", "position 0 1 0", r", line 14: found position 0 1 0 of the root, expected 0 0 0"),
        ("orientation 0 0 0", "orientation 0 0", r", line 15: found 2 numbers of orientation, expected 3"),
        ("     name hip\n", "", r", line 17: found a bone without name"),
        (" end\n:hier", " end\n end\n:hier", r", line 34: found 'end', expected begin"),
        ("  end\n  begin\n     id 2", "     id 2", r", line 34: found hip in the hierarchy, of which there is no bone"),
        ("  end\n  begin\n     id 2", "  begin\n     id 2", r", line 23: found 'begin', expected end"),
        (" end\n:hierarchy", ":hierarchy", r", line 24: found begin without end"),
        ("0.6 -0.8 0\n", "0.6 -0.8\n", r", line 20: found 2 numbers of direction, expected 3"),
        ("length 2.5", "length 2.5m", r", line 21: found '2.5m' of length, expected numbers"),
        ("length 2.5", "length nan", r", line 21: found 'nan' of length, expected numbers"),
        ("20   XYZ", "20", r", line 29: found axis order '20', expected one such as XYZ"),
        ("20   XYZ", "XYZ", r", line 29: found 2 numbers of axis, expected 3"),
        ("20   XYZ", "20   XYX", r", line 29: found axis order 'XYX', expected one such as XYZ"),
        ("dof rx rz", "dof rx l", r", line 30: found dof rx l, expected each of rx ry rz at most once"),
        ("dof rx rz", "dof rx rx", r", line 30: found dof rx rx, expected each of rx ry rz at most once"),
        ("name femur", "name hip", r", line 24: found a second hip"),
        ("name femur", "name thigh", r", line 37: found femur in the hierarchy, of which there is no bone"),
        ("    hip femur\n", "", r": the hierarchy does not lead from the root to femur\."),
        ("root hip", "root hip femur", r", line 37: found femur in the hierarchy a second time"),
        (
            "root hip\n    hip femur",
            "hip femur\n    femur hip",
            r": the hierarchy does not lead from the root to hip, f",
        ),
        ("hip femur", "hip femur root", r", line 37: found root in the hierarchy a second time"),
    ],
)
def test_a_skeleton_of_another_layout_is_refused(old, new, message):
    assert old in ASF
    with pytest.raises(DataError, match=r"^http://there/35\.asf" + message) as caught:
        read_asf(ASF.replace(old, new, 1), "http://there/35.asf")
    assert str(caught.value).endswith("get it again.")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (AMC, "", r" has no frame\."),
        (":DEGREES", ":RADIANS", r", line 3: found :RADIANS, expected :FULLY-SPECIFIED or :DEGREES"),
        ("#!OML", "<!DOCTYPE html>", r", line 1: found '<!DOCTYPE', expected the number of a frame"),
        ("\n3\n", "\n", r", line 4: found 'root', expected the number of a frame"),
        ("\n4\n", "\n5\n", r", line 7: found frame 5 after frame 3"),
        ("\n4\n", "\n3\n", r", line 7: found frame 3 after frame 3"),
        ("\n4\n", "\n", r", line 7: found 'root' a second time in frame 3"),
        ("femur -9.69075e-016 60\n", "", r", line 4: found frame 3, which begins here, without femur"),
        ("femur 1 61.5\n", "", r", line 7: found frame 4, which begins here, without femur"),
        ("femur 1 61.5\n", "fem", r", line 9: found 'fem', of which the skeleton has no channels"),
        ("femur 1 61.5\n", "femur 1", r", line 9: found 1 numbers of femur, expected 2"),
        ("femur 1 61.5\n", "femur 1 61.5 2\n", r", line 9: found 3 numbers of femur, expected 2"),
        (AMC[AMC.index("root 0.30077") :], "", r", line 7: found frame 4, which begins here, without root, femur"),
        ("18.176", "18,176", r", line 5: found 7 numbers of root, expected 6"),
        ("18.176", "18.l76", r", line 5: found '0.325465 18.l76 .*' of root, expected numbers"),
        ("18.176", "-1.#IND", r", line 5: found 2 numbers of root, expected 6"),
        ("18.176", "inf", r", line 5: found '0.325465 inf .*' of root, expected numbers"),
        ("femur 1", "hip 1", r", line 9: found 'hip', of which the skeleton has no channels"),
    ],
)
def test_a_recording_of_another_layout_is_refused(old, new, message):
    assert old in AMC
    skeleton = read_asf(ASF, "35.asf")
    with pytest.raises(DataError, match=r"^35_01\.amc" + message) as caught:
        read_amc(AMC.replace(old, new, 1), skeleton, "35_01.amc")
    assert str(caught.value).endswith("get it again.")


# --- The walking motions

BONES = [
    Bone(0, (0.0, -0.6, 0.8), 2.0, (0.0, 0.0, 20.0), "XYZ", ("rx", "ry", "rz")),
    Bone(1, (0.0, -1.0, 0.0), 3.0, (-90.0, 0.0, 20.0), "XYZ", ("rx", "rz")),
    Bone(0, (0.0, 1.0, 0.0), 1.0, (0.0, 0.0, 0.0), "XYZ", ()),
]
TRIALS = {"35_01": (40, 0), "35_10": (36, 6), "35_28": (45, 0)}  # frames, and how many are left out before them


def walking(trial, length):
    """Values of each frame: steps, other ones in each trial."""
    step = 0.1 + 0.02 * int(trial[-2:])
    return [
        [
            [0.3, 17 + 0.1 * math.sin(step * t), 0.2 * t, 2.0, step * t, -3.0],
            [30 * math.sin(step * t), 10 * math.cos(step * t), 5.0],
            [40 * math.sin(2 * step * t), 20.0],
            [],
        ]
        for t in range(length)
    ]


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Files of a small walking subject: name below the address -> content; the published numbers are theirs."""
    files, trials = {"35/35.asf": write_asf(BONES, ORDER, "\r\n").encode()}, []
    skeleton = read_asf(files["35/35.asf"].decode(), "35.asf")
    walks = {}
    for trial, (length, left_out) in TRIALS.items():
        frames = walking(trial, 60)
        files[f"35/{trial}.amc"] = write_amc(BONES, frames, 1, "\r\n").encode()
        slow = [slow_positions(BONES, ORDER, frame) for frame in frames[left_out : left_out + length]]
        trials.append(np.array([[joints[joint] for joint in in_order(BONES)] for joints in slow]))
        speed = np.linalg.norm(np.diff(trials[-1], axis=0), axis=-1).mean()
        walks[trial] = (length, *trials[-1].mean((0, 1)).round(5).tolist(), round(float(speed), 5))
    starts = [np.arange(5), np.arange(3, 8)]
    split = ({1: starts[0]}, {0: starts[1]}, {2: starts[0]})
    files[motion.WALK_SPLIT_FILE] = pickle.dumps(split, 4)
    arrays = {
        "xyz": np.concatenate(trials).astype(np.float32),
        "trial_offset": np.array([0, 40, 76, 121]),
        "edges": np.array([[1, 0], [2, 1], [3, 0]]),
        **{f"{part}_trial": np.array([trial]) for part, trial in (("train", 1), ("val", 0), ("test", 2))},
        **{f"{part}_start": starts[row][None] for part, row in (("train", 0), ("val", 1), ("test", 0))},
    }
    monkeypatch.delenv("ACE_DATA", raising=False)
    monkeypatch.setenv("ACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(motion, "WALKS", walks)
    monkeypatch.setattr(motion, "JOINTS", " ".join(skeleton.names))
    monkeypatch.setattr(motion, "WALK_REST", data.checksum({k: v for k, v in arrays.items() if k != "xyz"}))
    monkeypatch.setitem(data.CHECKSUMS, "walk35", data.checksum(arrays))
    return files, arrays


@pytest.fixture
def download(site, tmp_path):
    """Download from a server with the files, once more each time it is called."""
    pytest.importorskip("pooch", reason="downloads need the extra 'bench'")
    root = tmp_path / "server"
    with serving(root) as address:

        def fetch():
            for name, content in site[0].items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
            return motion.download_walk(address, f"{address}/35")

        yield fetch


def test_walking_motions_are_computed_and_verified(site, download, tmp_path):
    path = download()
    assert path == tmp_path / "cache" / "mocap" / "walk35.npz"
    assert sorted(file.name for file in path.parent.iterdir()) == ["walk35.npz", "walk35.npz.sha256"]
    loaded = motion.load_motion("walk35")
    assert set(loaded) == set(motion.MOTION_ARRAYS)
    for name, array in site[1].items():
        if name == "xyz":
            np.testing.assert_allclose(loaded[name], array, rtol=1e-6, atol=1e-6)
            assert loaded[name].dtype == np.float32
        else:
            np.testing.assert_array_equal(loaded[name], array, strict=True)


def exchanged(files):
    files["35/35_01.amc"], files["35/35_28.amc"] = files["35/35_28.amc"], files["35/35_01.amc"]


def later_start(files):
    files["35/35_10.amc"] = write_amc(BONES, walking("35_10", 60)[1:]).encode()


def other_order_of_turns(files):
    files["35/35.asf"] = files["35/35.asf"].replace(b"dof rx rz", b"dof rz rx")


def longer_bone(files):
    files["35/35.asf"] = files["35/35.asf"].replace(b"length 1.0\r", b"length 1.001\r")


def one_wrong_number(files):
    files["35/35_28.amc"] = files["35/35_28.amc"].replace(b"\r\n20\r\nroot 0.3 ", b"\r\n20\r\nroot 0.4 ")


def other_split(files):
    files[motion.WALK_SPLIT_FILE] = pickle.dumps(({2: np.arange(5)}, {0: np.arange(3, 8)}, {1: np.arange(5)}), 4)


def no_split(files):
    files[motion.WALK_SPLIT_FILE] = pickle.dumps([1, 2, 3])


def truncated_split(files):
    files[motion.WALK_SPLIT_FILE] = files[motion.WALK_SPLIT_FILE][:-30]


def too_short(files):
    files["35/35_28.amc"] = write_amc(BONES, walking("35_28", 44)).encode()


def starts_too_late(files):
    files["35/35_10.amc"] = write_amc(BONES, walking("35_10", 60)[8:], 9).encode()


def other_joint(files):
    files["35/35.asf"] = files["35/35.asf"].replace(b"bone3", b"tail")


def page(files):
    files["35/35_10.amc"] = b"<!DOCTYPE html>\n<title>Moved \xe4</title>"


def cut(files):
    files["35/35_28.amc"] = files["35/35_28.amc"][:-20]


def lost(files):
    del files["35/35_28.amc"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (exchanged, r"do not give the published numbers of walk35: the joints in trial 35_01 have the mean position"),
        (
            later_start,
            r"the joints in trial 35_10 have the mean position and speed \[.*\], expected \[.*\]\. Try again",
        ),
        (other_order_of_turns, r"the joints in trial 35_01 have the mean position"),
        (longer_bone, r"the joints in trial 35_01 have the mean position"),
        (one_wrong_number, r"the joints in trial 35_28 have the mean position"),
        (other_split, r"walk35: the bones, the split, or the shape of the positions are other ones\. Try again"),
        (no_split, r"the motion files are not laid out as published .*Try again"),
        (truncated_split, r"split\.pkl is damaged or not a pickle"),
        (too_short, r"35/35_28\.amc has the frames 1 to 44; needed are 1 to 45\. Try again"),
        (starts_too_late, r"35/35_10\.amc has the frames 9 to 60; needed are 7 to 42\. Try again"),
        (other_joint, r"35/35\.asf has the joints root .* tail; expected are root .* bone3\. Try again"),
        (page, r"35/35_10\.amc, line 1: found '<!DOCTYPE', expected the number of a frame"),
        (cut, r"35/35_28\.amc, line \d+: found "),
        (lost, r"35/35_28\.amc could not be downloaded.*404.* Try again.*put walk35\.npz and walk35\.npz\.sha256"),
    ],
)
def test_other_recordings_are_refused_and_nothing_is_written(site, download, tmp_path, change, message):
    change(site[0])
    with pytest.raises(DataError, match=message):
        download()
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_leaves_what_was_there(site, download):
    path = download()
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    later_start(site[0])
    with pytest.raises(DataError, match="35_10"):
        download()
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_what_was_made_elsewhere_may_differ_by_rounding(site, tmp_path):
    """And the published file needs no checksum beside it, but must be the published numbers."""
    arrays, path = site[1], tmp_path / "cache" / "mocap" / "walk35.npz"
    rounded = {**arrays, "xyz": np.nextafter(arrays["xyz"], np.float32(np.inf))}
    assert motion.walk_fault(rounded) == ""
    data.save_arrays(path, rounded)
    np.testing.assert_array_equal(motion.load_motion("walk35")["xyz"], rounded["xyz"])
    checksum = data.checksum_file(path)
    stated = checksum.read_text()
    for wrong, message in (("0" * 64, "truncated or altered"), (None, "does not hold the published numbers of walk35")):
        checksum.unlink() if wrong is None else checksum.write_text(wrong)
        with pytest.raises(DataError, match=message):
            motion.load_motion("walk35")
    checksum.write_text(stated)
    for change in (
        {"xyz": arrays["xyz"] + np.float32(1e-3)},
        {"xyz": arrays["xyz"][::-1]},
        {"xyz": arrays["xyz"].astype(float)},
        {"xyz": arrays["xyz"][:-1]},
        {"train_start": arrays["train_start"] + 1},
        {"edges": arrays["edges"][::-1]},
    ):
        data.save_arrays(path, {**arrays, **change})
        assert motion.walk_fault({**arrays, **change})
        with pytest.raises(DataError, match="does not hold the published numbers of walk35"):
            motion.load_motion("walk35")
    data.save_arrays(path, arrays)
    checksum.unlink()
    np.testing.assert_array_equal(motion.load_motion("walk35")["xyz"], arrays["xyz"])


def test_without_the_walking_motions_the_running_ones_are_kept(site, monkeypatch, tmp_path):
    run, walk = tmp_path / "mocap" / "run09.npz", tmp_path / "mocap" / "walk35.npz"
    monkeypatch.setattr(motion, "download_run", lambda: run)
    monkeypatch.setattr(motion, "download_walk", lambda: walk)
    assert motion.download_motion() == tmp_path / "mocap"

    def fail():
        raise DataError("35.asf could not be downloaded. Try again.")

    monkeypatch.setattr(motion, "download_walk", fail)
    with pytest.raises(DataError, match=rf"Try again\. The running motions are there: {re.escape(str(run))}\.$"):
        motion.download_motion()


# --- The real numbers

real_data = pytest.mark.skipif(not os.environ.get("ACE_DATA"), reason="ACE_DATA is not set")


@pytest.mark.data
@real_data
def test_the_published_walking_motions_have_the_numbers_that_are_asked_for():
    arrays = motion.load_motion("walk35")
    assert motion.walk_fault(arrays) == ""
    offset = arrays["trial_offset"]
    numbers = [*range(1, 17), *range(28, 35)]
    assert list(motion.WALKS) == [f"35_{number:02}" for number in numbers]
    assert [frames for frames, *_ in motion.WALKS.values()] == np.diff(offset).tolist()
    xyz = arrays["xyz"].copy()
    first, second = (slice(offset[trial], offset[trial + 1]) for trial in (2, 3))  # both have 401 frames
    xyz[first], xyz[second] = arrays["xyz"][second], arrays["xyz"][first]
    assert "35_03" in motion.walk_fault({**arrays, "xyz": xyz})
    for trial, joint in itertools.product((0, 9, 22), (0, 5, 22, 30)):
        xyz = arrays["xyz"].copy()
        xyz[offset[trial] : offset[trial + 1], joint, 1] += 1e-3  # a twentieth of a millimetre
        assert list(motion.WALKS)[trial] in motion.walk_fault({**arrays, "xyz": xyz})
