"""Tables where options were swept, tables over tasks, and numbers relative to a method."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ace import plotting
from ace.comparison import by_setting, compare, relative
from ace.errors import AceError
from ace.tables import table, wide_table


def swept() -> pd.DataFrame:
    """Two learning rates on one task; sizes of the training set, and weights of one method, on another."""
    generator, rows = np.random.default_rng(0), []

    def add(task, method, **options):
        common = {"config.lr": 1e-3, "config.method.rank": 8, "test": generator.uniform(1, 2)}
        rows.append({"task": task, "model": "egnn", "method": method} | common | options)

    for seed in range(3):
        for method, rate in itertools.product(("strict", "ace"), (1e-2, 1e-3)):
            add("nbody", method, seed=seed, **{"config.lr": rate})
        for method, size in itertools.product(("strict", "ace"), (300, 100)):
            add("mocap", method, seed=seed, **{"config.task.train": size})
        for weight in (1.0, 10.0):
            add("mocap", "penalty", seed=seed, **{"config.task.train": 100, "config.method.weight": weight})
    return pd.DataFrame(rows)


def body(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_options_that_differ_tell_runs_apart_and_those_of_a_method_are_in_its_name():
    named, conditions = by_setting(swept())
    assert sorted(conditions) == ["lr", "task.train"]
    assert list(named["method"].unique()) == ["strict", "ace", "penalty, weight=1", "penalty, weight=10"]
    heading, _, *rows = body(table(swept(), "test"))
    assert heading == ["task", "model", *conditions, "method", "n", "test"]
    assert [row[:-1] for row in rows] == [
        *(["nbody", "egnn", rate, "", method, "3"] for rate in ("0.001", "0.01") for method in ("strict", "ace")),
        *(
            ["mocap", "egnn", "0.001", size, method, "3"]
            for size in ("100", "300")
            for method in ("strict", "ace", "penalty, weight=1", "penalty, weight=10")[: 4 if size == "100" else 2]
        ),
    ]
    assert [sum(row[-1].startswith("**") for row in rows[start:end]) for start, end in ((0, 2), (2, 4), (4, 8))] == [
        1
    ] * 3


def test_settings_of_a_method_are_in_the_order_of_their_values():
    frame = swept()
    extra = frame[frame["config.method.weight"] == 1].assign(**{"config.method.weight": 2.0})
    for order in (1, -1):
        rows = pd.concat([frame, extra][::order])
        names = dict.fromkeys(row[3] for row in body(table(rows[rows["task"] == "mocap"], "test"))[2:])
        weights = [name for name in names if name.startswith("penalty")]
        assert weights == [f"penalty, weight={weight}" for weight in (1, 2, 10)]
        assert next(iter(names)) == ("strict" if order == 1 else weights[0])  # methods in order of appearance


def test_without_swept_options_nothing_is_added():
    frame = swept()
    frame = frame[(frame["config.lr"] == 1e-3) & frame["config.task.train"].isna()]
    named, conditions = by_setting(frame)
    assert conditions == []
    pd.testing.assert_frame_equal(named, frame)
    assert table(frame, "test") == table(frame.filter(regex="^(?!config)"), "test")


def test_a_wide_table_has_the_cells_of_the_long_one():
    heading, _, *rows = body(wide_table(swept(), "test"))
    assert heading == [
        *(
            "method",
            "nbody egnn lr=0.001",
            "nbody egnn lr=0.01",
            "mocap egnn task.train=100",
            "mocap egnn task.train=300",
        )
    ]
    long = body(table(swept(), "test"))[2:]
    assert [row[0] for row in rows] == ["strict", "ace", "penalty, weight=1", "penalty, weight=10"]
    cells = {(row[2], row[3], row[4]): row[-1] for row in long}
    for method, *found in rows:
        places = [("0.001", ""), ("0.01", ""), ("0.001", "100"), ("0.001", "300")]
        assert found == [cells.get((*place, method), "") for place in places]
    values = pd.read_csv(io.StringIO(wide_table(swept(), "test", "csv")), index_col="method")
    expected = swept()
    expected = expected[(expected["method"] == "ace") & (expected["config.lr"] == 1e-2)]["test"]
    np.testing.assert_allclose(values.loc["ace", "nbody egnn lr=0.01 mean"], expected.mean())
    np.testing.assert_allclose(values.loc["ace", "nbody egnn lr=0.01 error"], expected.std() / np.sqrt(3))
    assert wide_table(swept(), "test", "latex").startswith("\\begin{tabular}{lrrrr}\n")


def test_relative_numbers_divide_by_the_same_seed_under_the_same_conditions():
    frame = swept()
    found = relative(frame, "test")
    assert len(found) == len(frame)
    for row, ratio in zip(frame.itertuples(index=False), found["test"], strict=True):
        own = frame[(frame["method"] == "strict") & (frame["task"] == row.task) & (frame["seed"] == row.seed)]
        own = own[(own["config.lr"] == row[frame.columns.get_loc("config.lr")])]
        size = row[frame.columns.get_loc("config.task.train")]
        [reference] = own[own["config.task.train"].fillna(0) == (0 if np.isnan(size) else size)]["test"]
        assert ratio == row.test / reference
    gone = frame[(frame["method"] != "strict") | (frame["seed"] > 0)]
    assert sorted(relative(gone, "test")["seed"].unique()) == [1, 2]
    with pytest.raises(AceError, match="'cr'"):
        relative(frame, "test", to="cr")


@given(st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_two_methods_against_each_other_are_a_two_sided_paired_t_test(seeds, seed):
    from scipy import stats

    x, y = np.random.default_rng(seed).uniform(0.5, 2, (2, seeds))
    frame = pd.DataFrame(
        [
            ("t", "m", name, number, value)
            for name, of in (("strict", x), ("ace", y))
            for number, value in enumerate(of)
        ],
        columns=["task", "model", "method", "seed", "test"],
    )
    found = compare(frame, "test", against="strict")["p"]
    assert found["t", "m", "strict"] == 1
    np.testing.assert_allclose(found["t", "m", "ace"], stats.ttest_rel(np.log(y), np.log(x)).pvalue, rtol=1e-6)
    assert compare(frame, "test", against="cr")["p"].isna().all()


def test_a_sweep_is_drawn_method_by_method():
    frame = swept()
    of_task = frame[(frame["task"] == "mocap") & (frame["method"] != "penalty")]
    ax = plotting.plot_sweep(of_task, "task.train", "test", Figure().subplots())
    means = of_task.groupby(["method", "config.task.train"])["test"].mean()
    drawn = {container.get_label(): container.lines[0].get_xydata() for container in ax.containers}
    assert set(drawn) == {"strict", "ace"}
    for method, points in drawn.items():
        np.testing.assert_allclose(points, means[method].reset_index().to_numpy())
    with pytest.raises(AceError, match=r"against lr: swept were task\.train"):
        plotting.plot_sweep(of_task, "lr", "test", Figure().subplots())
    with pytest.raises(AceError, match="2 tasks"):
        plotting.plot_sweep(frame, "lr", "test", Figure().subplots())


def test_all_methods_on_all_tasks_are_one_figure_with_ratios_and_colours_of_their_symmetry(tmp_path):
    errors = {"strict": 1e-7, "ace": 2e-7, "unconstrained": 0.3, "ace-paper": 1e-7}
    ratios = {"strict": 1.0, "ace": 1.0, "unconstrained": 0.5, "ace-paper": 36.0}
    rows = [
        {"task": task, "model": "egnn", "method": method, "seed": seed, "equivariance_rms": errors[method]}
        | {"test": (1 + seed) * scale * ratios[method], "config.task.train": size}
        for task, scale, sizes in (("nbody", 1e-3, (1.0,)), ("mocap", 40.0, (1.0, 2.0)))
        for method in errors
        for seed in range(3)
        for size in sizes
    ]
    drawn = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plotting, "_save", lambda figure, path: drawn.update({path.name: figure}))
        plotting.plot_comparison(pd.DataFrame(rows), tmp_path / "all.png", "test")
    *panels, bar = drawn["all.png"].axes
    assert "black: exact" in bar.get_ylabel()
    assert [ax.get_title() for ax in panels] == [
        "nbody egnn",
        "mocap egnn\ntask.train=1",
        "mocap egnn\ntask.train=2",
    ]
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == list(errors)
    for ax in panels:
        points = {
            names[int(y)]: (x, line)
            for line in ax.lines
            for x, y in [line.get_xydata()[0]]
            if line.get_marker() != "None"
        }
        assert {name: x for name, (x, _) in points.items()} == {**ratios, "ace-paper": 3.0}  # at the edge
        assert [text.get_text() for text in ax.texts] == ["36"]
        assert {name: line.get_marker() for name, (_, line) in points.items()} == {
            "strict": "D",
            "ace": "D",
            "unconstrained": "o",
            "ace-paper": ">",
        }
        assert points["strict"][1].get_color() == points["ace"][1].get_color() != points["unconstrained"][1].get_color()


def test_a_comparison_is_saved_and_says_what_is_missing(tmp_path):
    frame = swept().assign(equivariance_rms=0.1)
    plotting.plot_comparison(frame, tmp_path / "all.svg", "test")
    text = (tmp_path / "all.svg").read_text()
    assert all(word in text for word in ("penalty, weight=10", "lr=0.01", "task.train=300", "relative to strict"))
    with pytest.raises(AceError, match="no column equivariance_rms"):
        plotting.plot_comparison(swept(), tmp_path / "no.svg", "test")
    with pytest.raises(AceError, match="no run of 'cr'"):
        plotting.plot_comparison(frame, tmp_path / "no.svg", "test", to="cr")
    assert not (tmp_path / "no.svg").exists()
