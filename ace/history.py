"""History: what happened at each step of training, as rows of a CSV file or in memory."""

from __future__ import annotations

import functools
import io
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, SupportsFloat, SupportsIndex

import pandas as pd
import torch
from torch import Tensor

from ace.errors import AceError, DataError, NotWritten

COLUMNS = ("step", "epoch", "layer", "quantity", "value")

_START = "\0"  # where the step and epoch of a line go; no name holds it
_HEADER = (",".join(COLUMNS) + "\n").encode()
_BUFFER = 1 << 13  # rows kept back before they are written: opening a file costs as much as a few steps
_PER_LAYER = ("gamma", "violation", "multiplier")


class _Step(NamedTuple):
    """What one item recorded: text, or the tensors that become text when somebody asks for it."""

    step: int
    rows: int
    write: Callable[[], str]


class History:
    """Rows (step, epoch, layer, quantity, value), one for each number recorded.

    With a path, rows are appended to that CSV file as they come, a buffer at a time; an existing file is
    continued, and a last line left half-written by a crash is cut before the next row is written. What is
    still in the buffer is written by :meth:`flush`, and when the history is dropped or the interpreter
    exits. Values are written so that they are read back as the same floating-point numbers.

    Args:
        path: The CSV file; its folder is created when the first row is written. None keeps everything
            in memory.
        every: :meth:`append` keeps the steps divisible by this number, and the first one.
        sink: Called with the step and a dict of what was recorded, such as ``{"loss": 0.5, "gamma/layers.0": 1.0}``,
            once it was: to send it to a tracker of experiments too.

    Raises:
        AceError: If ``every`` is not positive.
        DataError: If ``path`` exists and is not a history.

    Example:
        >>> history = History()
        >>> history.log(100, epoch=1, valid_relaxed=0.25, valid_restored=0.5)
        >>> history.frame()
           step  epoch layer        quantity  value
        0   100      1         valid_relaxed   0.25
        1   100      1        valid_restored   0.50
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        every: int = 1,
        sink: Callable[[int, dict[str, float]], Any] | None = None,
    ) -> None:
        if every < 1:
            raise AceError(f"every = {every}: a history keeps every n-th step, with n at least 1")
        self.path = None if path is None else Path(path).absolute()
        self.every = every
        self.sink = sink
        self._pending: list[_Step] = []
        self._rows = 0
        if self.path is not None:
            _check_header(self.path)
            weakref.finalize(self, _append, self.path, self._pending)

    @classmethod
    def load(cls, path: str | os.PathLike[str], every: int = 1) -> History:
        """Open a history that must exist, to read it or to continue it.

        Args:
            path: The CSV file.
            every: As for the class.

        Returns:
            The history; the file is not touched before something is recorded.

        Raises:
            DataError: If there is no such file, or it is not a history.

        Example:
            >>> import tempfile, pathlib
            >>> path = pathlib.Path(tempfile.mkdtemp()) / "history.csv"
            >>> history = History(path)
            >>> history.log(1, loss=0.5)
            >>> history.flush()
            >>> History.load(path).frame()["value"].tolist()
            [0.5]
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file; a history is written by History(path)")
        return cls(path, every)

    def append(self, rollout: Any, epoch: int | None = None) -> None:
        """Record one training step: the loss and, of every layer, γ, violation and multiplier.

        Args:
            rollout: What ``PrimalDual.roll`` returns. Its ``cmp_state.misc`` holds ``step``,
                ``task_loss``, ``layers`` and, each of shape (layers,), ``gamma``, ``violation`` and
                ``multiplier``; of these three those that are there are recorded. Where ``constraints`` names what
                is constrained, the last two are of its shape.
            epoch: The epoch the step belongs to, if there are epochs.

        Raises:
            NotWritten: If the buffer was full and could not be written. The row is kept in it.

        Example:
            >>> import torch
            >>> from types import SimpleNamespace
            >>> misc = {"step": 1, "task_loss": torch.tensor(0.5), "layers": ("a", "b"),
            ...         "gamma": torch.tensor([1.0, 0.75])}
            >>> history = History()
            >>> history.append(SimpleNamespace(cmp_state=SimpleNamespace(misc=misc)))
            >>> history.frame()[["step", "layer", "quantity", "value"]]
               step layer quantity  value
            0     1           loss   0.50
            1     1     a    gamma   1.00
            2     1     b    gamma   0.75
        """
        misc = rollout.cmp_state.misc
        step = misc["step"]
        if step % self.every and step > 1:
            return  # before any tensor is looked at: reading one from a GPU waits for it
        names = misc["layers"], misc.get("constraints", misc["layers"])
        for name in names:
            _fields(name)  # raises where it cannot be written
        columns = {quantity: misc[quantity].detach() for quantity in _PER_LAYER if quantity in misc}
        loss = torch.as_tensor(misc["task_loss"]).detach()
        # a number becomes text when the buffer is written: a step does not wait for it, nor for the GPU
        write = functools.partial(_lines, step, epoch, loss, columns, *names)
        self._record(_Step(step, 1 + sum(map(len, columns.values())), write))
        if self.sink is not None:
            values = {"loss": loss.item()}
            for quantity, column in columns.items():
                of = names[quantity != "gamma"]
                values |= {_joined(quantity, name): value for name, value in zip(of, column.tolist(), strict=True)}
            self.sink(step, values)

    def log(
        self,
        step: SupportsIndex,
        epoch: SupportsIndex | None = None,
        layer: str = "",
        **quantities: SupportsFloat,
    ) -> None:
        """Record any numbers, at any step: ``every`` does not thin them.

        Args:
            step: The training step.
            epoch: The epoch, if there are epochs.
            layer: The module path of the layer the numbers belong to; empty for the whole model.
            **quantities: Names and numbers; a tensor must have one element.

        Raises:
            AceError: If something is not a number, or a name holds a line break. Nothing is recorded.
            NotWritten: If the buffer was full and could not be written. The rows are kept in it.

        Example:
            >>> history = History()
            >>> history.log(5, layer="layers.0", gamma=0.125)
            >>> history.frame()["layer"].tolist()
            ['layers.0']
        """
        start = f"{operator.index(step)},{'' if epoch is None else operator.index(epoch)}"
        (layer_field,) = _fields((layer,))
        names = _fields(tuple(quantities))
        try:
            values = [float(value) for value in quantities.values()]
        except (TypeError, ValueError, RuntimeError) as error:
            raise AceError(f"step {step}: not a number among {quantities}: {error}") from error
        lines = "".join(f"{start},{layer_field},{name},{value!r}\n" for name, value in zip(names, values, strict=True))
        self._record(_Step(operator.index(step), len(names), lambda: lines))
        if self.sink is not None and quantities:
            of = f"/{layer}" if layer else ""
            self.sink(
                operator.index(step), {f"{name}{of}": value for name, value in zip(quantities, values, strict=True)}
            )

    def frame(self) -> pd.DataFrame:
        """All rows in the order they were recorded, those still in the buffer included.

        Returns:
            Columns ``step`` (int64), ``epoch`` (Int64, missing where none was given), ``layer`` and
            ``quantity`` (categories in order of appearance, so layers keep the order of the modules;
            ``layer`` is empty for what belongs to the whole model) and ``value`` (float64).

        Raises:
            DataError: If the file holds a line that is not a row.

        Example:
            >>> history = History()
            >>> history.log(1, loss=2.0)
            >>> history.log(2, loss=1.0)
            >>> history.frame().query("quantity == 'loss'")["value"].min()
            np.float64(1.0)
        """
        rows = b"" if self.path is None else _complete_rows(self.path)
        text = io.BytesIO(_HEADER + rows + _text(self._pending).encode())
        try:
            frame = pd.read_csv(
                text,
                dtype={"step": "int64", "epoch": "Int64", "layer": "str", "quantity": "str"},
                converters={"value": float},  # exact in every version of pandas; its own parser was not
                keep_default_na=False,  # a layer may be called "NA", and "" is the whole model
                na_values={"epoch": [""]},
                encoding="utf-8",
                index_col=False,
            )
            for column in ("layer", "quantity"):
                frame[column] = pd.Categorical(frame[column], categories=frame[column].unique())
        except ValueError as error:
            raise DataError(
                f"{self.path}: a line is not a row of a history ({str(error).strip()}); repair or remove the file"
            ) from error
        return frame.astype({"value": "float64"})  # without a row it would be object

    def flush(self) -> None:
        """Write the buffer to the file now; without a path, do nothing.

        Raises:
            NotWritten: If it cannot be written, say on a full disk. The file then ends where it ended
                before, the rows stay in the buffer, and the next attempt writes them.

        Example:
            >>> History().flush()
        """
        if self.path is not None:
            _append(self.path, self._pending)
            self._rows = 0

    def truncate(self, step: int) -> None:
        """Drop the rows of later steps, as when training goes back to the checkpoint of a step.

        The file is replaced as a whole, or, if something fails, left as it was.

        Args:
            step: The last step that is kept.

        Raises:
            NotWritten: If the new file cannot be written; nothing is dropped then.
            DataError: If the file holds a line that is not a row.

        Example:
            >>> history = History()
            >>> for step in range(1, 6):
            ...     history.log(step, loss=1 / step)
            >>> history.truncate(2)
            >>> history.frame()["step"].tolist()
            [1, 2]
        """
        if self.path is not None and self.path.exists():
            rows = _complete_rows(self.path).splitlines(keepends=True)
            try:
                kept = [row for row in rows if int(row[: row.index(b",")]) <= step]
            except ValueError as error:
                raise DataError(f"{self.path}: a line does not start with a step ({error})") from error
            if len(kept) < len(rows):
                replace_file(self.path, _HEADER + b"".join(kept))
        self._pending[:] = [item for item in self._pending if item.step <= step]
        self._rows = sum(item.rows for item in self._pending)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Save a figure of everything recorded: learning curves, γ, violations, multipliers, errors.

        Args:
            path: The image file; its suffix (``.png``, ``.pdf``, ``.svg``) decides the format.

        Raises:
            AceError: If there is nothing to plot.

        Example:
            >>> import tempfile
            >>> history = History()
            >>> history.log(1, loss=2.0)
            >>> history.log(2, loss=1.0)
            >>> history.plot(tempfile.mkdtemp() + "/trajectories.png")
        """
        from ace.plotting import plot_trajectories  # matplotlib is slow to import

        plot_trajectories(self.frame(), path)

    def _record(self, item: _Step) -> None:
        if not item.rows:
            return
        self._pending.append(item)
        self._rows += item.rows
        if self._rows >= _BUFFER:
            self.flush()


def _lines(
    step: int,
    epoch: int | None,
    loss: Tensor,
    columns: Mapping[str, Tensor],
    layers: tuple[str, ...],
    constraints: tuple[str, ...],
) -> str:
    """One step as text."""
    lines = [_template(("",), "loss", loss.dtype) % (loss.item(),)]
    for quantity, values in columns.items():
        names = layers if quantity == "gamma" else constraints
        lines.append(_template(names, quantity, values.dtype) % tuple(values.tolist()))
    return "".join(lines).replace(_START, f"{step},{'' if epoch is None else epoch},")


@functools.lru_cache(maxsize=64)
def _template(names: tuple[str, ...], quantity: str, dtype: torch.dtype) -> str:
    """Lines of a quantity with places for its values: a thousand layers have thousands of them in each step."""
    exact = "%r" if dtype == torch.float64 or not dtype.is_floating_point else "%.9g"  # enough digits for float32
    return "".join(f"{_START}{name},{quantity},".replace("%", "%%") + f"{exact}\n" for name in _fields(names))


def _joined(quantity: str, layer: str) -> str:
    """Name of a number for a sink."""
    return f"{quantity}/{layer}" if layer else quantity


def _text(pending: Iterable[_Step]) -> str:
    return "".join(item.write() for item in pending)


@functools.lru_cache(maxsize=64)  # the layers of a model are the same at every step
def _fields(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names as fields of a CSV line."""
    for name in names:
        if not name.isprintable():  # a line break in a field would make "the last complete line" ambiguous
            raise AceError(f"the name {name!r} holds a character that cannot be printed; rename it")
    return tuple('"' + name.replace('"', '""') + '"' if "," in name or '"' in name else name for name in names)


def _check_header(path: Path) -> None:
    """Refuse a file that is not a history; an empty one, or one with half a header, may become one."""
    try:
        with path.open("rb") as file:
            first = file.readline(len(_HEADER))
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path}: cannot be read as a history ({error.strerror})") from error
    if first != _HEADER and not (_HEADER.startswith(first) and not first.endswith(b"\n")):
        raise DataError(
            f"{path}: not a history: its first line starts with {first!r}, not {_HEADER.decode().strip()!r}; "
            "give another path or remove the file"
        )


def _complete_rows(path: Path) -> bytes:
    """The rows of a file, without the header and without a half-written last line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return b""
    return content[len(_HEADER) : content.rfind(b"\n") + 1]


def _last_line_end(file: IO[bytes]) -> int:
    """Position after the last line break of a file, found from its end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _append(path: Path, pending: list[_Step]) -> None:
    """Write all pending lines at the end of the file and forget them, or change nothing."""
    if not pending:
        return
    data = _text(pending).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = _last_line_end(file)
            file.truncate(end)
            try:
                _write(file, data if end else _HEADER + data)
            except BaseException:
                file.truncate(end)
                raise
    except OSError as error:
        raise NotWritten(
            f"{path}: could not be written ({error.strerror}); {len(data)} bytes are kept in memory: "
            "make room and call flush()"
        ) from error
    pending.clear()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once: a reader finds the old content or the new, never a part.

    Args:
        path: The file, new or existing, in a folder that exists.
        content: All of it.

    Raises:
        NotWritten: If it cannot be written; what was there is then as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> replace_file(path, b"done")
        >>> path.read_text()
        'done'
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb", buffering=0) as file:
                _write(file, content)
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NotWritten(f"{path}: could not be written ({error.strerror}) and is as it was") from error


def _write(file: IO[bytes], data: bytes) -> None:
    """Write all of the data: a single call may write a part of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(file.fileno(), view) :]
