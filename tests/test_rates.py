"""Sensitivity to the learning rate, from curves whose best rate, range and failures are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import narrow

from benchmarks.studies.rates import FAILED, RATE, report, sensitivity

RATES = 10.0 ** np.arange(-4, 0)


def runs(**curves):
    """Rows of two seeds around the error at each rate; a missing one is a run that failed."""
    rows = [
        (method, seed, rate, error + 0.01 * (-1) ** seed, error + 0.01 * (-1) ** seed)
        for method, errors in curves.items()
        for rate, error in zip(RATES, errors, strict=True)
        for seed in range(2)
    ]
    return pd.DataFrame(rows, columns=["method", "seed", RATE, "valid_shipped", "test_shipped"])


def test_range_is_that_around_the_best_rate_and_failures_are_counted():
    nan = np.nan
    found = sensitivity(runs(strict=[1.05, 2.0, 1.0, 1.02], ace=[9.0, 1.08, 1.0, nan], cr=[1.0, 1.0, 1.0, 1.0]))
    assert found.index.tolist() == ["strict", "ace", "cr"]
    assert found["best rate"].tolist() == [RATES[2], RATES[2], RATES[0]]
    np.testing.assert_allclose(found["good decades"], [1, 1, 3])  # 1.05 is beyond the bad rate between
    assert found["failed"].tolist() == [0, 0.5, 0]
    np.testing.assert_allclose(found["test"], 1)
    np.testing.assert_allclose(found["error"], 0.01)


def test_the_rate_is_chosen_without_looking_at_the_test_split():
    frame = runs(strict=[2.0, 1.0, 1.5, 3.0])
    frame["test_shipped"] = np.repeat([1.0, 1.3, 1.4, 1.5], 2)
    [row] = sensitivity(frame).itertuples()
    assert row[1] == RATES[1]
    assert row.test == 1.3


@given(st.lists(st.floats(0.5, 20), min_size=4, max_size=4), st.floats(0.1, 10))
def test_nothing_depends_on_the_unit(curve, unit):
    one = sensitivity(runs(strict=[1.0] * 4, ace=curve))
    frame = runs(strict=[1.0] * 4, ace=curve)
    other = sensitivity(frame.assign(test_shipped=unit * frame["test_shipped"]))
    pd.testing.assert_frame_equal(one[["good decades"]], other[["good decades"]])
    assert one.loc["ace", "failed"] == pytest.approx(np.mean(frame["test_shipped"][8:] > FAILED * min([1.0, *curve])))


def test_the_table_has_a_line_for_each_method(tmp_path):
    frame = runs(strict=[1.0, 1.0, 1.0, np.nan], ace=[1.0, 1.5, 1.0, 1.0]).assign(task="broken", model="vector")
    frame.to_csv(tmp_path / "rates.csv", index=False)
    report(tmp_path)
    lines = narrow((tmp_path / "rates-sensitivity.md").read_text()).splitlines()
    assert lines[4] == "| strict | 0.0001 | 1.0000 ± 0.01 | 2.0 | 25 % |"
    assert lines[5] == "| ace | 0.0001 | 1.0000 ± 0.01 | 0.0 | 0 % |"
