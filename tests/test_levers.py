"""Levers: settings are named by what is unusual in them, ratios are those of the seeds, p-values those of a t-test."""

from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from runs import narrow
from scipy.stats import ttest_rel

from benchmarks.studies.levers import ACE, SAME, STRICT, levers, report

SETTINGS = [
    ("strict", 600, 0.0, None),
    ("ace", 600, 0.0, None),
    ("ace", 600, 0.0, 8),
    ("strict", 200, 0.0, None),
    ("ace", 200, 0.0, None),
]
"""Method, steps, average and rank."""


def runs(errors):
    """Rows of three seeds of each of the settings; strict training has no term, terms have no rank as a rule."""
    rows = [
        (method, seed, steps, average, None if method == "strict" else "linear", rank, error)
        for (method, steps, average, rank), of_setting in zip(SETTINGS, errors, strict=True)
        for seed, error in enumerate(of_setting)
    ]
    options = [f"config.{name}" for name in ("steps", "average", "method.term", "method.rank")]
    columns = ["method", "seed", *options, "test_shipped"]
    return pd.DataFrame(rows, columns=columns)


ERRORS = st.lists(st.lists(st.floats(0.5, 2), min_size=3, max_size=3, unique=True), min_size=5, max_size=5)


@given(ERRORS, st.randoms())
def test_ratios_and_p_values(errors, random):
    frame = runs(errors)
    found = levers(frame).set_index("lever")
    assert found.index.tolist() == ["none", "method.rank=8", "steps=200"]
    strict, ace, ranked, strict_short, ace_short = map(np.array, errors)
    expected = {
        ("none", SAME): (ace, strict),
        ("none", STRICT): (ace, strict),
        ("method.rank=8", STRICT): (ranked, strict),
        ("method.rank=8", ACE): (ranked, ace),
        ("steps=200", SAME): (ace_short, strict_short),
        ("steps=200", STRICT): (ace_short, strict),
        ("steps=200", ACE): (ace_short, ace),
    }
    for (lever, what), (one, other) in expected.items():
        apart = np.ptp(np.log(one / other)) > 1e-9
        assert apart or np.isnan(found.loc[lever, f"{what} p"])
        assert np.isclose(found.loc[lever, what], (one / other).mean())
        assert np.isclose(found.loc[lever, f"{what} ±"], (one / other).std(ddof=1) / np.sqrt(3))
        if apart:
            p = ttest_rel(np.log(one), np.log(other)).pvalue
            number = sum(compared == what for _, compared in expected)
            assert p - 1e-9 <= found.loc[lever, f"{what} p"] <= min(1, number * p) + 1e-9
    assert np.isnan(found.loc["method.rank=8", SAME])
    assert found.loc["none", ACE] == 1
    shuffled = list(range(len(frame)))
    random.shuffle(shuffled)
    again = levers(frame.iloc[shuffled]).set_index("lever").loc[found.index]
    pd.testing.assert_frame_equal(again, found)


def test_report(tmp_path):
    frame = runs([[1.0, 1.1, 1.3], [0.9, 1.0, 1.1], [0.8, 0.7, 0.9], [2.0, 2.1, 2.3], [2.2, 2.0, 2.4]])
    frame.assign(task="nbody", model="egnn").to_csv(tmp_path / "levers.csv", index=False)
    report(tmp_path)
    lines = narrow((tmp_path / "levers.md").read_text()).splitlines()
    assert lines[0] == "### nbody, egnn"
    assert lines[2].startswith(f"| lever | ace / {SAME} | ace / {STRICT} | ace / {ACE} |")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| none", "| method.rank=8", "| steps=200"]
    assert lines[4].endswith("| 1.000 |")
