from __future__ import annotations

import contextlib
import errno
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ace.errors import AceError, DataError, NotWritten
from ace.history import COLUMNS, History

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
floats = st.floats(allow_nan=True, allow_infinity=True)
rows = st.lists(
    st.tuples(
        st.integers(0, 20),
        st.none() | st.integers(0, 5),
        st.just("") | names | st.sampled_from(["NA", "nan", "null", "0", 'a,"b"']),
        names.filter(lambda name: name not in {"self", "step", "epoch", "layer"}),
        floats,
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("histories")


def fresh(folder: Path) -> Path:
    path = folder / "history.csv"
    path.unlink(missing_ok=True)
    return path


def record(history: History, rows) -> None:
    for step, epoch, layer, quantity, value in rows:
        history.log(step, epoch, layer, **{quantity: value})


def listed(frame: pd.DataFrame) -> list[tuple]:
    """Rows as Python objects; nan as its repr, since nan != nan, and the sign of zero kept."""
    return [
        (step, None if pd.isna(epoch) else epoch, layer, quantity, repr(value))
        for step, epoch, layer, quantity, value in frame.itertuples(index=False)
    ]


def expected(rows) -> list[tuple]:
    return [(*row[:4], repr(row[4])) for row in rows]


def rollout(step: int, layers: int = 3, dtype=torch.float32, **extra):
    generator = torch.Generator().manual_seed(step)
    misc = {
        "step": step,
        "task_loss": torch.rand((), generator=generator, dtype=dtype),
        "layers": tuple(f"layers.{i}" for i in range(layers)),
        **{
            quantity: torch.randn(layers, generator=generator, dtype=dtype)
            for quantity in ("gamma", "violation", "multiplier")
        },
        "skipped": False,
        **extra,
    }
    return SimpleNamespace(cmp_state=SimpleNamespace(misc=misc))


@contextlib.contextmanager
def file_size_limit(size: int):
    """A real error of the operating system in the middle of a write: files may not grow past a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@settings(max_examples=40, deadline=None)
@given(rows, st.booleans())
def test_every_value_comes_back_exactly(folder, rows, on_disk):
    history = History(fresh(folder) if on_disk else None)
    record(history, rows)
    assert listed(history.frame()) == expected(rows)
    history.flush()
    assert listed(history.frame()) == expected(rows)
    if on_disk and rows:
        assert listed(History.load(history.path).frame()) == expected(rows)


@settings(max_examples=40, deadline=None)
@given(rows, rows)
def test_an_existing_file_is_continued(folder, before, after):
    path = fresh(folder)
    first = History(path)
    record(first, before)
    first.flush()
    second = History(path)
    record(second, after)
    second.flush()
    assert listed(History(path).frame()) == expected(before + after)


@settings(max_examples=40, deadline=None)
@given(rows, rows, st.integers(-1, 21))
def test_truncate_keeps_exactly_the_rows_up_to_the_step(folder, written, pending, step):
    path = fresh(folder)
    on_disk, in_memory = History(path), History()
    record(on_disk, written)
    on_disk.flush()
    record(on_disk, pending)
    record(in_memory, written + pending)
    kept = expected([row for row in written + pending if row[0] <= step])
    for history in (on_disk, in_memory):
        history.truncate(step)
        assert listed(history.frame()) == kept
    on_disk.flush()
    if written or kept:
        assert listed(History.load(path).frame()) == kept
    assert set(folder.iterdir()) <= {path}  # no temporary file is left


@settings(max_examples=40, deadline=None)
@given(rows.filter(bool), rows, st.data())
def test_a_file_cut_anywhere_loses_at_most_the_cut_line(folder, before, after, data):
    path = fresh(folder)
    history = History(path)
    record(history, before)
    history.flush()
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    complete = max(0, content[:cut].count(b"\n") - 1)

    resumed = History.load(path)
    assert listed(resumed.frame()) == expected(before[:complete])
    assert path.read_bytes() == content[:cut]  # reading never changes a file
    record(resumed, after)
    resumed.flush()
    assert listed(History.load(path).frame()) == expected(before[:complete] + after)


def test_a_half_written_line_longer_than_one_block_is_cut(tmp_path):
    path = tmp_path / "history.csv"
    history = History(path)
    history.log(1, loss=1.0)
    history.flush()
    with path.open("a") as file:
        file.write("2,," + "x" * 10_000)
    history.log(2, loss=2.0)
    history.flush()
    assert history.frame()["value"].tolist() == [1.0, 2.0]


def test_rows_of_a_rollout(tmp_path):
    history = History(tmp_path / "history.csv")
    first, second = rollout(1), rollout(2, dtype=torch.float64)
    history.append(first, epoch=4)
    history.append(second)
    frame = history.frame()
    assert len(frame) == 2 * (1 + 3 * 3)
    assert frame["epoch"].isna().sum() == 10
    assert frame["epoch"][0] == 4
    for step, misc in ((1, first.cmp_state.misc), (2, second.cmp_state.misc)):
        of_step = frame[frame["step"] == step]
        loss = of_step[of_step["quantity"] == "loss"]
        assert loss["layer"].tolist() == [""]
        assert torch.equal(column(loss, misc["task_loss"]), misc["task_loss"].reshape(1))
        for quantity in ("gamma", "violation", "multiplier"):
            of_quantity = of_step[of_step["quantity"] == quantity]
            assert of_quantity["layer"].tolist() == list(misc["layers"])
            assert torch.equal(column(of_quantity, misc[quantity]), misc[quantity])


def column(rows, like):
    """The values in the precision in which they were recorded: none of their bits is lost."""
    return torch.tensor(rows["value"].to_numpy(), dtype=like.dtype)


def test_names_and_numbers_of_every_kind_survive(tmp_path):
    names = ("100%", "%s", 'a"b', "a,b", "{0}")
    values = torch.tensor([1e-38, -0.1, float("inf"), float("nan"), 16777217.0])
    misc = {"step": 1, "task_loss": torch.tensor(3.0), "layers": names, "gamma": values}
    history = History(tmp_path / "history.csv")
    history.append(SimpleNamespace(cmp_state=SimpleNamespace(misc=misc)))
    history.append(SimpleNamespace(cmp_state=SimpleNamespace(misc={**misc, "step": 2, "gamma": values.double() / 3})))
    history.flush()
    gamma = History.load(tmp_path / "history.csv").frame().query("quantity == 'gamma'")
    assert gamma["layer"].tolist() == 2 * list(names)
    torch.testing.assert_close(column(gamma[:5], values), values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(column(gamma[5:], values.double()), values.double() / 3, rtol=0, atol=0, equal_nan=True)


def test_a_rollout_without_multipliers():
    history = History()
    given = rollout(1)
    del given.cmp_state.misc["multiplier"]
    history.append(given)
    assert set(history.frame()["quantity"]) == {"loss", "gamma", "violation"}


def test_every_thins_steps_but_not_logged_numbers(tmp_path):
    history = History(tmp_path / "history.csv", every=10)
    for step in range(1, 31):
        history.append(rollout(step))
        history.log(step, valid_relaxed=1.0)
    frame = history.frame()
    assert sorted(set(frame[frame["quantity"] == "loss"]["step"])) == [1, 10, 20, 30]
    assert (frame["quantity"] == "valid_relaxed").sum() == 30


def test_thinning_does_not_depend_on_where_training_was_resumed(tmp_path):
    straight, split = History(every=3), tmp_path / "history.csv"
    for step in range(1, 21):
        straight.append(rollout(step))
    first = History(split, every=3)
    for step in range(1, 15):
        first.append(rollout(step))
    first.flush()
    second = History(split, every=3)
    second.truncate(11)
    for step in range(12, 21):
        second.append(rollout(step))
    pd.testing.assert_frame_equal(second.frame(), straight.frame())


def test_types_of_the_columns():
    empty, history = History(), History()
    history.append(rollout(1, layers=12), epoch=1)
    for frame in (empty.frame(), history.frame()):
        assert tuple(frame.columns) == COLUMNS
        assert frame["step"].dtype == "int64"
        assert frame["epoch"].dtype == "Int64"
        assert frame["value"].dtype == "float64"
        assert isinstance(frame["layer"].dtype, pd.CategoricalDtype)
        assert isinstance(frame["quantity"].dtype, pd.CategoricalDtype)
    layers = list(history.frame()["layer"].cat.categories)
    assert layers == ["", *(f"layers.{i}" for i in range(12))]  # not "layers.10" before "layers.2"


@pytest.mark.parametrize("partial", [0, 7, 2000])
@pytest.mark.parametrize("already", [0, 5])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, partial, already):
    path = tmp_path / "history.csv"
    history = History(path)
    for step in range(1, already + 1):
        history.append(rollout(step))
    history.flush()
    before = path.read_bytes() if already else b""
    for step in range(already + 1, already + 30):
        history.append(rollout(step))
    rows = listed(history.frame())

    write = os.write

    def full(file, data):
        room.append(room.pop() - len(data))
        if room[0] < 0 and room[0] + len(data) <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data[: room[0] + len(data)] if room[0] < 0 else data)

    room = [partial]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(NotWritten, match="No space left on device") as caught:
            history.flush()
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, AceError)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == before
    assert listed(history.frame()) == rows
    history.flush()
    assert listed(History.load(path).frame()) == rows


def test_a_write_stopped_by_the_operating_system_loses_nothing(tmp_path):
    path = tmp_path / "history.csv"
    history = History(path)
    for step in range(1, 11):
        history.append(rollout(step))
    history.flush()
    before = path.read_bytes()
    for step in range(11, 50):
        history.append(rollout(step))
    rows = listed(history.frame())
    with file_size_limit(len(before) + 1000), pytest.raises(NotWritten, match=r"history\.csv"):
        history.flush()
    assert path.read_bytes() == before
    with file_size_limit(len(before) // 2), pytest.raises(NotWritten, match="is as it was"):
        history.truncate(8)
    assert path.read_bytes() == before
    assert listed(history.frame()) == rows
    assert list(tmp_path.iterdir()) == [path]
    history.flush()
    assert listed(History.load(path).frame()) == rows


def test_an_error_while_truncating_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "history.csv"
    history = History(path)
    record(history, [(step, None, "", "loss", 1.0) for step in range(5)])
    history.flush()
    record(history, [(step, None, "", "loss", 2.0) for step in range(5, 9)])
    rows, before = listed(history.frame()), path.read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(NotWritten, match="is as it was"):
            history.truncate(2)
    assert path.read_bytes() == before
    assert listed(history.frame()) == rows
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_buffer_is_written(tmp_path):
    history = History(tmp_path / "history.csv")
    for step in range(1, 2001):
        history.append(rollout(step))
    written = len(History.load(history.path).frame())
    assert 10_000 < written < 20_000
    assert len(history.frame()) == 20_000


SCRIPT = """
import sys
from ace.history import History
history = History(sys.argv[1])
history.log(1, loss=0.5)
{}
"""


@pytest.mark.parametrize(("end", "rows"), [("", 1), ("raise SystemExit(3)", 1), ("import os; os._exit(0)", 0)])
def test_what_is_buffered_is_written_when_the_interpreter_exits(tmp_path, end, rows):
    path = tmp_path / "deep" / "er" / "history.csv"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", SCRIPT.format(end), str(path)], check=False, cwd=root)
    assert len(History(path).frame()) == rows


def test_what_is_buffered_is_written_when_the_history_is_dropped(tmp_path):
    history = History(tmp_path / "history.csv")
    history.log(1, loss=0.5)
    del history
    assert len(History.load(tmp_path / "history.csv").frame()) == 1


def test_foreign_files_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    for content in (b"a,b,c\n1,2,3\n", b"step,epoch\n", b"\n", b"\x89PNG\r\n\x1a\n", b"x"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"other\.csv: not a history"):
            History(path)
        assert path.read_bytes() == content
    with pytest.raises(DataError, match="cannot be read"):
        History(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        History.load(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "line",
    ["1,,a,loss", "1,,a", "1,,a,loss,x", "1,,a,loss,1,2", "x,,a,loss,1", "1,y,a,loss,1", '1,,"a,loss,1'],
)
def test_a_damaged_line_is_reported(tmp_path, line):
    path = tmp_path / "history.csv"
    history = History(path)
    history.log(1, loss=0.5)
    history.flush()
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=r"history\.csv: a line is not a row"):
        history.frame()


def test_truncating_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("step,epoch,layer,quantity,value\nx,,a,loss,1\n")
    with pytest.raises(DataError, match="does not start with a step"):
        History(path).truncate(1)


@pytest.mark.parametrize("value", ["a", None, torch.ones(2), [1.0]])
def test_what_is_not_a_number_is_refused_and_nothing_is_recorded(value):
    history = History()
    with pytest.raises(AceError, match="step 3: not a number"):
        history.log(3, good=1.0, bad=value)
    assert history.frame().empty


def test_names_with_line_breaks_and_bad_thinning_are_refused():
    for name in ("a\nb", "a\rb", "a\0b"):
        with pytest.raises(AceError, match="cannot be printed"):
            History().log(1, layer=name, loss=1.0)
    with pytest.raises(AceError, match="every = 0"):
        History(every=0)


def test_tensors_are_numbers():
    history = History()
    history.log(torch.tensor(3), epoch=torch.tensor(1), loss=torch.tensor(0.1))
    assert listed(history.frame()) == [(3, 1, "", "loss", repr(torch.tensor(0.1).item()))]


def test_recording_a_step_is_cheap(tmp_path):
    history = History(tmp_path / "history.csv")
    given, steps = rollout(1, layers=16), 1500
    history.append(given)
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        for _ in range(steps):
            history.append(given, epoch=1)
        best = min(best, (time.process_time() - start) / steps)
    assert best < 100e-6  # 30 µs on a quiet machine; a data frame built at each step costs ten times the bound


def test_a_sink_gets_what_is_recorded():
    sent = []
    history = History(every=2, sink=lambda step, values: sent.append((step, values)))
    for step in range(1, 5):
        misc = {
            "step": step,
            "task_loss": torch.tensor(0.5),
            "layers": ("", "a,b"),
            "constraints": ("O3",),
            "gamma": torch.tensor([1.0, 0.25]),
            "multiplier": torch.tensor([float(step)]),
        }
        history.append(SimpleNamespace(cmp_state=SimpleNamespace(misc=misc)))
    history.log(4, layer="a,b", error=2)
    assert [step for step, _ in sent] == [1, 2, 4, 4]
    assert sent[2][1] == {"loss": 0.5, "gamma": 1.0, "gamma/a,b": 0.25, "multiplier/O3": 4.0}
    assert sent[3][1] == {"error/a,b": 2.0}
    frame = history.frame()
    assert frame["value"].tolist() == [value for _, values in sent for value in values.values()]
