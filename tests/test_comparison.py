from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from ace.comparison import by_setting, compare, rank
from ace.errors import AceError
from ace.plotting import plot_ranks
from ace.tables import table

COLUMNS = ["task", "model", "method", "seed", "test"]


def runs(values, task="nbody"):
    """A frame from method -> values by seed."""
    rows = [
        (task, "egnn", method, seed, value) for method, column in values.items() for seed, value in enumerate(column)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def random_runs(seed, methods=4, seeds=5):
    random = np.random.default_rng(seed)
    return {f"m{i}": random.normal(1 + 0.3 * i, 0.2, seeds) for i in range(methods)}


def slow_tests(values):
    """One-sided t-tests of each method against the best, variances moderated as Smyth (2004) has it."""
    names, x = list(values), {name: np.log(column) for name, column in values.items()}
    best = min(names, key=lambda name: np.mean(values[name]))
    others = [name for name in names if name != best]
    seeds = len(x[best])
    own = seeds - 1
    variance = {name: np.var(x[name] - x[best], ddof=1) for name in others}
    prior, common = 0.0, 1.0
    if len(others) > 1:
        logs = np.log(list(variance.values()))
        excess = np.var(logs, ddof=1) - special.polygamma(1, own / 2)
        if excess <= 0:
            prior, common = math.inf, np.mean(list(variance.values()))
        else:
            prior = 2 * optimize.brentq(lambda half: special.polygamma(1, half) - excess, 1e-8, 1e8, xtol=1e-14)
            shift = special.digamma(own / 2) - math.log(own / 2) - special.digamma(prior / 2) + math.log(prior / 2)
            common = math.exp(np.mean(logs) - shift)
    raw = {}
    for name in others:
        moderated = common if prior == math.inf else (prior * common + own * variance[name]) / (prior + own)
        freedom = min(prior + own, own * len(others))
        raw[name] = stats.t.sf(np.mean(x[name] - x[best]) / math.sqrt(moderated / seeds), freedom)
    return best, raw


@given(seed=st.integers(0, 1000), methods=st.integers(2, 6), uneven=st.sampled_from([1.0, 2.0, 20.0]))
@settings(deadline=None, max_examples=40)
def test_p_values_are_those_of_a_slow_loop_adjusted_one_by_one(seed, methods, uneven):
    """Whether the methods scatter alike or not."""
    values = {
        name: np.exp(0.1 * x * uneven ** (place / methods))
        for place, (name, x) in enumerate(random_runs(seed, methods).items())
    }
    found = compare(runs(values), "test").loc["nbody", "egnn"]
    best, raw = slow_tests(values)
    assert found["best"].to_dict() == {method: method == best for method in values}
    least = 0.0
    for place, method in enumerate(sorted(raw, key=raw.get)):
        least = max(least, min(1.0, (len(raw) - place) * raw[method]))
        assert found["p"][method] == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert found["p"][best] == 1


def test_a_method_that_scatters_does_not_hide_the_others():
    close = {"a": [1.00, 1.10, 0.90], "b": [1.21, 1.30, 1.09], "c": [1.02, 1.08, 0.91], "d": [1.10, 1.22, 0.99]}
    alone = compare(runs(close), "test")["p"].droplevel([0, 1])
    beside = compare(runs(close | {"wild": [30.0, 1.4, 5.0]}), "test")["p"].droplevel([0, 1])
    assert alone["b"] < 0.05
    assert beside["b"] < 0.05
    assert beside["c"] > 0.05


def test_two_methods_are_compared_by_the_paired_t_test():
    a, b = np.array([-1.0, 0.2, 0.5, 0.1]), np.array([-0.7, 0.3, 1.1, 0.2])  # not all positive: no logarithms
    p = compare(runs({"a": a, "b": b}), "test")["p"]["nbody", "egnn", "b"]
    assert p == pytest.approx(stats.ttest_rel(b, a, alternative="greater").pvalue)


@pytest.mark.parametrize("wild", [1.0, 30.0])
def test_the_level_holds(wild):
    """Of methods that are equally good, the best of the others is rarely called worse, also where one scatters."""
    random = np.random.default_rng(0)
    repeats = 120
    worse = 0
    for _ in range(repeats):
        data = random.normal(size=(4, 5)) * np.array([[1.0], [1.0], [1.0], [wild]])
        data = data - data[3].mean() * (np.arange(4) == 3)[:, None] + random.normal(size=5)  # some seeds are harder
        p = compare(runs(dict(zip("abcd", data, strict=True))), "test")["p"]
        worse += (p < 0.05).any()
    # the best is chosen by its mean, so the level is not kept exactly: it is near twice 5 %
    assert worse / repeats < 0.2
    clear = compare(runs({"a": [1.0, 1.1, 1.2, 1.0, 1.1], "b": [2.0, 2.1, 2.3, 2.0, 2.2]}), "test")["p"]
    assert clear["nbody", "egnn", "b"] < 1e-4


def test_missing_values_are_never_good():
    nan = math.nan
    found = compare(runs({"a": [1.0, nan, 1.2], "b": [2.0, 2.1, 2.2], "c": [2.1, 2.2, 2.4]}), "test").droplevel([0, 1])
    assert found["best"].tolist() == [False, True, False]
    assert math.isnan(found["p"]["a"])
    assert found["p"]["b"] == 1
    none = compare(runs({"a": [nan], "b": [nan]}), "test")
    assert not none["best"].any()
    assert none["p"].isna().all()
    single = compare(runs({"a": [1.0], "b": [2.0]}), "test")["p"]
    assert single.isna().tolist() == [False, True]
    infinite = compare(runs({"a": [1.0, 1.1], "b": [math.inf, 2.0]}), "test")["p"]
    assert infinite.isna().tolist() == [False, True]
    equal = compare(runs({"a": [1.0, 1.5], "b": [1.0, 1.5], "c": [2.0, 2.5]}), "test")
    assert equal["best"].tolist() == [True, True, False]
    assert equal["p"].tolist()[:2] == pytest.approx([1, 0.5])
    assert equal["p"].iloc[2] < 0.1


def test_the_table_marks_what_is_close():
    values = {"ace": [1.0, 1.1, 1.2], "cr": [0.9, 1.4, 1.3], "strict": [2.0, 2.1, 2.2]}
    text = table(runs(values), "test")
    lines = {line.split("|")[3].strip(): line.split("|")[5].strip() for line in text.splitlines()[2:]}
    assert lines["ace"].startswith("**1.1")
    assert lines["cr"].startswith("_1.2")
    assert lines["cr"].endswith("_")
    assert lines["strict"].startswith("2.1")
    latex = table(runs(values), "test", "latex")
    assert latex.count(r"\mathbf") == latex.count(r"\underline") == 1


@given(seed=st.integers(0, 1000), methods=st.integers(2, 6), cases=st.integers(2, 8))
@settings(deadline=None, max_examples=8)
def test_ranks_are_those_of_scipy(seed, methods, cases):
    random = np.random.default_rng(seed)
    means = random.integers(0, 5, (cases, methods)).astype(float)  # with ties
    means[0] = np.arange(methods)
    frame = pd.concat(
        runs({f"m{j}": [means[i, j] - 0.5, means[i, j] + 0.5] for j in range(methods)}, task=f"t{i}")
        for i in range(cases)
    )
    found = rank(frame.sample(frac=1, random_state=seed), "test")
    expected = np.mean([stats.rankdata(row) for row in means], 0)
    assert found.mean.is_monotonic_increasing
    assert found.mean.to_dict() == pytest.approx({f"m{j}": expected[j] for j in range(methods)})
    if methods > 2:
        assert found.p == pytest.approx(stats.friedmanchisquare(*means.T).pvalue)
    else:
        assert math.isnan(found.p)
    for clique in found.cliques:
        assert found.mean[clique[-1]] - found.mean[clique[0]] < found.critical
    for a in found.mean.index:
        for b in found.mean.index:
            together = any({a, b} <= set(clique) for clique in found.cliques)
            assert together or a == b or abs(found.mean[a] - found.mean[b]) >= found.critical


@pytest.mark.parametrize(("methods", "q"), [(2, 1.960), (3, 2.343), (5, 2.728), (10, 3.164)])  # Demšar, table 5 (a)
def test_critical_differences_are_the_published_ones(methods, q):
    frame = pd.concat(runs(random_runs(i, methods, 1), task=f"t{i}") for i in range(14))
    assert rank(frame, "test").critical == pytest.approx(q * math.sqrt(methods * (methods + 1) / (6 * 14)), abs=2e-3)


def test_a_diverged_run_is_last_and_a_method_not_run_everywhere_left_out(tmp_path):
    frame = pd.concat(
        [
            runs({"a": [1.0, math.nan], "b": [2.0, 2.0], "c": [3.0, 3.0]}, task="t0"),
            runs({"a": [1.0], "b": [2.0], "c": [3.0], "d": [0.0]}, task="t1"),
        ]
    )
    found = rank(frame, "test")
    assert found.mean.to_dict() == {"b": 1.5, "a": 2.0, "c": 2.5}
    assert found.left_out == ("d",)
    assert "not run everywhere: d" in str(found)
    plot_ranks(found, tmp_path / "ranks.svg")
    drawn = (tmp_path / "ranks.svg").read_text()
    assert all(
        f">{name}  {value:.2f}" in drawn.replace("\u00a0", " ") or name in drawn for name, value in found.mean.items()
    )
    with pytest.raises(AceError, match="1 pairs"):
        rank(runs({"a": [1.0], "b": [2.0]}), "test")
    with pytest.raises(AceError, match="not everywhere: a, b"):
        rank(pd.concat([runs({"a": [1.0]}, "t0"), runs({"b": [1.0]}, "t1")]), "test")


def test_steps_that_were_swept_are_a_condition_once():
    rows = [("nbody", "egnn", m, s, steps, steps, 1.0) for m in ("strict", "ace") for s in (0, 1) for steps in (10, 30)]
    columns = ["task", "model", "method", "seed", "steps", "config.steps", "test_shipped"]
    named, conditions = by_setting(pd.DataFrame(rows, columns=columns))
    assert conditions == ["steps"]
    assert named["steps"].tolist() == [10, 30] * 4
