"""Recordings of moving skeletons in the Acclaim format: skeletons (ASF), their motion (AMC), and where the joints are.

A skeleton is a tree of bones; each begins where its parent ends and is turned about that joint by up to three angles,
which the recording has for each frame. The format: M. Schafer, Acclaim Skeleton File Definition V1.10.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from ace.errors import DataError

ROOT = "root"
REMEDY = "The file was truncated or altered, or is laid out in another way: get it again."
BLANK = str.maketrans("(),", "   ")
"""What the format takes for blanks."""
TURNS, MOVES = ("rx", "ry", "rz"), ("tx", "ty", "tz")

Lines = list[tuple[int, list[str]]]
"""Numbers of lines, and the words on them."""


class Bone(NamedTuple):
    """What a skeleton has of each of its bones, or of its root."""

    offset: np.ndarray
    axes: np.ndarray
    channels: tuple[str, ...]


class Skeleton(NamedTuple):
    """Joints in the order of the hierarchy, depth first: the root, then the end of each bone.

    Attributes:
        names: Names of the n joints; a bone is called as the joint at its end.
        parents: Number of the joint that each bone begins at, shape (n,), int64; -1 for the root.
        offsets: From there to the joint while all angles are 0, shape (n, 3), in units of the file; 0 for the root.
        axes: Columns are the axes that each bone is turned about, shape (n, 3, 3), orthogonal.
        channels: The numbers that a recording has of each joint, such as ``("rx", "rz")``, in the order in which they
            are recorded and applied.
    """

    names: tuple[str, ...]
    parents: np.ndarray
    offsets: np.ndarray
    axes: np.ndarray
    channels: tuple[tuple[str, ...], ...]


class Recording(NamedTuple):
    """What was recorded of a skeleton.

    Attributes:
        first: Number of the first frame; the others follow it one by one.
        values: The channels of all joints, one joint after the other, shape (frames, channels): angles in degrees,
            positions in units of the skeleton.
    """

    first: int
    values: np.ndarray


def read_asf(text: str, source: str) -> Skeleton:
    r"""Read a skeleton.

    Limits of angles, masses and the units of mass and length are left out: numbers are those of the file.

    Args:
        text: The file.
        source: Its name, for the message.

    Returns:
        The skeleton.

    Raises:
        DataError: It is laid out otherwise, has angles in radians, or a root with an offset of its own.

    Example:
        >>> arm = ":root\n order TX TY TZ RX RY RZ\n:bonedata\n begin\n name arm\n direction 0 1 0\n length 2\n"
        >>> arm += " axis 0 0 90 XYZ\n dof rx\n end\n:hierarchy\n begin\n root arm\n end"
        >>> skeleton = read_asf(arm, "arm.asf")
        >>> skeleton.names, skeleton.parents.tolist(), skeleton.offsets[1].tolist(), skeleton.channels[1]
        (('root', 'arm'), [-1, 0], [0.0, 2.0, 0.0], ('rx',))
    """
    sections = _sections(text, source)
    for number, words in sections.get(":units", []):
        if words[0] == "angle" and words[1:] != ["deg"]:
            raise _wrong(source, number, f"angles in {' '.join(words[1:]) or 'no unit'}, expected 'angle deg'")
    bones = {ROOT: _root(sections[":root"], source)}
    for block in _blocks(sections[":bonedata"], source):
        name, bone = _bone(block, source)
        if name in bones:
            raise _wrong(source, block[0][0], f"a second {name}")
        bones[name] = bone
    children = _children(sections[":hierarchy"], bones, source)
    parents, stack = dict[str, int](), [(ROOT, -1)]
    while stack:
        name, parent = stack.pop()
        number = len(parents)
        parents[name] = parent
        stack += [(child, number) for child in reversed(children.get(name, []))]
    if lost := [name for name in bones if name not in parents]:
        raise DataError(f"{source}: the hierarchy does not lead from the root to {', '.join(lost)}. {REMEDY}")
    offsets, axes, channels = zip(*(bones[name] for name in parents), strict=True)
    return Skeleton(tuple(parents), np.array(list(parents.values())), np.stack(offsets), np.stack(axes), channels)


def read_amc(text: str, skeleton: Skeleton, source: str) -> Recording:
    r"""Read a recording.

    Args:
        text: The file: the number of each frame, then a line for each joint that has channels.
        skeleton: The skeleton that was recorded.
        source: Name of the file, for the message.

    Returns:
        The recording, float64.

    Raises:
        DataError: It is laid out otherwise, is one of another skeleton, or lacks a frame or a part of one.

    Example:
        >>> axes, offsets = np.stack([np.eye(3)] * 2), np.array([[0, 0, 0], [0, 2, 0]])
        >>> arm = Skeleton(("root", "arm"), np.array([-1, 0]), offsets, axes, ((), ("rz",)))
        >>> recording = read_amc(":DEGREES\n7\narm 90\n8\narm 45.5", arm, "arm.amc")
        >>> recording.first, recording.values.tolist()
        (7, [[90.0], [45.5]])
    """
    counts = {name: len(channels) for name, channels in zip(skeleton.names, skeleton.channels, strict=True) if channels}
    first, rows = 0, list[list[float]]()
    for start, frame, lines in _frames(text, source):
        first = first if rows else frame
        if frame != first + len(rows):
            raise _wrong(source, start, f"frame {frame} after frame {first + len(rows) - 1}")
        row = dict[str, list[float]]()
        for number, (joint, *words) in lines:
            if joint not in counts:
                raise _wrong(source, number, f"{joint!r}, of which the skeleton has no channels")
            if joint in row:
                raise _wrong(source, number, f"{joint!r} a second time in frame {frame}")
            row[joint] = _numbers(joint, words, counts[joint], source, number)
        if missing := [joint for joint in counts if joint not in row]:
            raise _wrong(source, start, f"frame {frame}, which begins here, without {', '.join(missing)}")
        rows.append([value for joint in counts for value in row[joint]])
    return Recording(first, np.array(rows))


def positions(skeleton: Skeleton, values: np.ndarray) -> np.ndarray:
    """Positions of the joints.

    Args:
        skeleton: The skeleton.
        values: Its channels, as in `Recording`, shape (frames, channels).

    Returns:
        Shape (frames, joints, 3), float64, in units of the skeleton.

    Example:
        >>> axes, offsets = np.stack([np.eye(3)] * 2), np.array([[0, 0, 0], [0, 2, 0]])
        >>> arm = Skeleton(("root", "arm"), np.array([-1, 0]), offsets, axes, (("tx", "ty", "tz"), ("rz",)))
        >>> positions(arm, np.array([[5.0, 6.0, 7.0, 90.0]])).round(6).tolist()
        [[[5.0, 6.0, 7.0], [3.0, 6.0, 7.0]]]
    """
    found, turns, nothing = list[np.ndarray](), list[np.ndarray](), np.zeros(len(values))
    parts = np.split(values, np.cumsum([len(channels) for channels in skeleton.channels])[:-1], axis=1)
    for part, parent, offset, axes, channels in zip(
        parts, skeleton.parents, skeleton.offsets, skeleton.axes, skeleton.channels, strict=True
    ):
        turn = np.broadcast_to(np.eye(3), (len(values), 3, 3))
        if angles := [place for place, channel in enumerate(channels) if channel in TURNS]:
            turn = axes @ _turns("".join(channels[place][1] for place in angles), part[:, angles]) @ axes.T
        moved = np.stack([part[:, channels.index(move)] if move in channels else nothing for move in MOVES], -1)
        turns.append(turns[parent] @ turn if found else turn)
        found.append((found[parent] if found else 0) + moved + turns[-1] @ offset)
    return np.stack(found, 1)


def _turns(order: str, angles: np.ndarray) -> np.ndarray:
    """Rotations, (..., 3, 3), by angles, (..., m), in degrees, one after the other about axes that stay in place."""
    from scipy.spatial.transform import Rotation  # a quarter of a second, which no run needs

    matrices: np.ndarray = Rotation.from_euler(order, angles, degrees=True).as_matrix()
    return matrices


def _lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Numbers and words of the lines that have any."""
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.partition("#")[0].translate(BLANK).split():
            yield number, words


def _wrong(source: str, line: int, what: str) -> DataError:
    return DataError(f"{source}, line {line}: found {what}. {REMEDY}")


def _sections(text: str, source: str) -> dict[str, Lines]:
    """Lines of each section of a skeleton, by its keyword."""
    sections, lines = dict[str, Lines](), None
    for number, words in _lines(text):
        if words[0].startswith(":"):
            lines = sections.setdefault(words[0].lower(), [])
        elif lines is None:
            raise _wrong(source, number, f"{words[0]!r}, expected a keyword such as :root")
        else:
            lines.append((number, words))
    if missing := [keyword for keyword in (":root", ":bonedata", ":hierarchy") if keyword not in sections]:
        raise DataError(f"{source} has no section {', '.join(missing)}. {REMEDY}")
    return sections


def _blocks(lines: Lines, source: str) -> Iterator[Lines]:
    """What is between each begin and its end, with the line of the begin before it."""
    block: Lines | None = None
    for number, words in lines:
        if (words[0] == "begin") == (block is not None):
            raise _wrong(source, number, f"{words[0]!r}, expected {'begin' if block is None else 'end'}")
        if words[0] == "end":
            assert block is not None
            yield block
            block = None
        else:
            block = [*(block or []), (number, words)]
    if block is not None:
        raise _wrong(source, block[0][0], "begin without end")


def _frames(text: str, source: str) -> Iterator[tuple[int, int, Lines]]:
    """Each frame of a recording: the line that it begins with, the number there, and the lines of its joints."""
    frame: tuple[int, int, Lines] | None = None
    for number, words in _lines(text):
        if words[0].startswith(":"):
            if words[0].lower() not in {":fully-specified", ":degrees"}:
                raise _wrong(source, number, f"{words[0]}, expected :FULLY-SPECIFIED or :DEGREES")
        elif len(words) == 1 and words[0].isdecimal():
            if frame is not None:
                yield frame
            frame = number, int(words[0]), []
        elif frame is None:
            raise _wrong(source, number, f"{words[0]!r}, expected the number of a frame")
        else:
            frame[2].append((number, words))
    if frame is None:
        raise DataError(f"{source} has no frame. {REMEDY}")
    yield frame


def _bone(block: Lines, source: str) -> tuple[str, Bone]:
    fields = {words[0]: (number, words[1:]) for number, words in block}
    if missing := [key for key in ("name", "direction", "length", "axis") if not fields.get(key, (0, []))[1]]:
        raise _wrong(source, block[0][0], f"a bone without {', '.join(missing)}")
    (name, *_), (number, (*angles, order)) = fields["name"][1], fields["axis"]
    if sorted(order.lower()) != ["x", "y", "z"]:
        raise _wrong(source, number, f"axis order {order!r}, expected one such as XYZ")
    axes = _turns(order.lower(), np.array(_numbers("axis", angles, 3, source, number)))
    direction, length = (
        _numbers(key, fields[key][1], count, source, fields[key][0]) for key, count in (("direction", 3), ("length", 1))
    )
    number, channels = fields.get("dof", (0, []))
    return name, Bone(np.array(direction) * length, axes, _channels("dof", channels, TURNS, source, number))


def _root(lines: Lines, source: str) -> Bone:
    fields = {words[0]: (number, words[1:]) for number, words in lines}
    if "order" not in fields:
        raise DataError(f"{source} has no order in the section :root. {REMEDY}")
    for key in ("position", "orientation"):
        number, words = fields.get(key, (0, ["0"] * 3))
        if any(_numbers(key, words, 3, source, number)):
            raise _wrong(source, number, f"{key} {' '.join(words)} of the root, expected 0 0 0")
    number, channels = fields["order"]
    return Bone(np.zeros(3), np.eye(3), _channels("order", channels, (*MOVES, *TURNS), source, number))


def _channels(key: str, words: list[str], known: tuple[str, ...], source: str, line: int) -> tuple[str, ...]:
    channels = tuple(word.lower() for word in words)
    if len(set(channels)) < len(channels) or not set(channels) <= set(known):
        raise _wrong(source, line, f"{key} {' '.join(words)}, expected each of {' '.join(known)} at most once")
    return channels


def _children(lines: Lines, bones: Collection[str], source: str) -> dict[str, list[str]]:
    """The bones at the end of each, in the order of the file."""
    children, attached = dict[str, list[str]](), {ROOT}
    for number, words in lines:
        if words in (["begin"], ["end"]):
            continue
        if unknown := [name for name in words if name not in bones]:
            raise _wrong(source, number, f"{', '.join(unknown)} in the hierarchy, of which there is no bone")
        for name in words[1:]:
            if name in attached:
                raise _wrong(source, number, f"{name} in the hierarchy a second time")
            attached.add(name)
        children.setdefault(words[0], []).extend(words[1:])
    return children


def _numbers(name: str, words: list[str], count: int, source: str, line: int) -> list[float]:
    if len(words) != count:
        raise _wrong(source, line, f"{len(words)} numbers of {name}, expected {count}")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise _wrong(source, line, f"{' '.join(words)!r} of {name}, expected numbers")
    return numbers
