r"""Is a method better than another, or did the seeds fall that way? Paired tests within a task, ranks over tasks.

Within a task, each method is compared with that of the lowest mean by a t-test paired by seeds, one-sided, on
logarithms where all values are positive. The variance of the differences of two methods has n - 1 degrees of freedom
for n seeds, too few to tell anything from three; one variance for all methods would let a single one that fails now
and then hide all others. So each is drawn towards those of the others as far as they are alike (``moderated``). For
two methods it is the paired t-test. P-values are adjusted for the number of methods by Holm's rule. The method
compared with is chosen by its mean, so of methods that are equally good one is called worse more often than in 5 % of
the cases, about twice as often.

Over tasks, by mean ranks: Friedman's test, and the critical difference of Nemenyi,
:math:`q_\alpha \sqrt{k (k+1) / (6 N)}` for k methods on N tasks (Demšar, JMLR 7, 2006): methods whose mean ranks differ
by less cannot be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ace.errors import AceError

LEVEL = 0.05
"""Level of all tests."""
EXACT = 1e-5
"""A relative equivariance error below it is rounding, in float32."""
OPTION = "config."
"""Prefix of the columns of a summary that hold the options of its run."""
_CASE = ("task", "model")


def by_setting(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Tell runs of one task, model, method and seed apart by the options that were swept.

    Args:
        results: One row per run, as ``load_results`` gives them.

    Returns:
        The rows, with the swept options of a method in its name ("ace-tolerance, eps=0.1"), and its other swept
        options, such as ``lr`` or ``task.train``, as columns without their prefix, empty where a task has no such
        option; and the names of those columns, the conditions under which methods are to be compared.

    Example:
        >>> results = pd.DataFrame(
        ...     [("nbody", "egnn", "penalty", 0, rate, weight, error)
        ...      for rate in (0.1, 0.2) for weight, error in ((1, 3.0), (2, 4.0))],
        ...     columns=["task", "model", "method", "seed", "config.lr", "config.method.weight", "test"])
        >>> named, conditions = by_setting(results)
        >>> print(conditions, *named["method"].unique(), sep="; ")
        ['lr']; penalty, weight=1; penalty, weight=2
    """
    swept = _varying(results, [column for column in map(str, results) if column.startswith(OPTION)])
    settings = [column for column in swept if column.startswith(f"{OPTION}method.")]
    names = results["method"].astype(str).copy()
    for places in results.groupby("method", observed=True).indices.values():  # an index may have values twice
        of_method = results.iloc[places]
        for column in _varying(of_method, settings):
            option = column.removeprefix(f"{OPTION}method.")
            names.iloc[places] += [f", {option}={written(value)}" for value in of_method[column]]
    conditions = {column: column.removeprefix(OPTION) for column in swept if column not in settings}
    twice = results.columns.intersection(list(conditions.values()))  # the steps that were done, and those asked for
    named = results.drop(columns=twice).assign(method=names).rename(columns=conditions)
    for column in conditions.values():  # an option that other tasks do not have
        named[column] = named[column].astype(object).where(named[column].notna(), "")
    return named, list(conditions.values())


def _varying(results: pd.DataFrame, columns: list[str]) -> list[str]:
    """Columns with several values in some task, model and method."""
    distinct = results.groupby([*_CASE, "method"], sort=False, observed=True)[columns].nunique(dropna=False)
    return [column for column in columns if (distinct[column] > 1).any()]


def written(value: object) -> str:
    """Write the value of an option.

    Example:
        >>> written(0.001), written(100), written("relative")
        ('0.001', '100', 'relative')
    """
    return f"{value:g}" if isinstance(value, float) else str(value)


def case_names(cases: Sequence[tuple[Any, ...]], conditions: Sequence[str]) -> list[list[str]]:
    """Name what is compared separately: task and model, then the conditions that tell it from others of these two.

    Args:
        cases: Task, model and the values of the conditions.
        conditions: Names of the conditions.

    Example:
        >>> case_names([("nbody", "egnn", 0.1), ("nbody", "egnn", 0.2), ("md", "mace", 0.1)], ["lr"])
        [['nbody egnn', 'lr=0.1'], ['nbody egnn', 'lr=0.2'], ['md mace']]
    """
    names = []
    for task, model, *values in cases:
        alike = [other[2:] for other in cases if other[:2] == (task, model)]
        several = [len(set(of_condition)) > 1 for of_condition in zip(*alike, strict=True)]
        differ = zip(conditions, values, several, strict=True)
        names.append([f"{task} {model}", *(f"{name}={written(value)}" for name, value, many in differ if many)])
    return names


def relative(results: pd.DataFrame, metric: str, to: str = "strict") -> pd.DataFrame:
    """Divide a metric of each run by that of a reference method with the same seed, task and model.

    Seeds differ by more than methods do, and tasks have units of their own.

    Args:
        results: One row per run, as ``load_results`` gives them.
        metric: The column.
        to: The reference method.

    Returns:
        The rows whose reference is there, with the ratio in the column.

    Raises:
        AceError: No run has a reference.

    Example:
        >>> results = pd.DataFrame(
        ...     [("nbody", "egnn", method, seed, error * (1 + seed))
        ...      for method, error in (("strict", 0.8), ("ace", 0.4)) for seed in range(2)],
        ...     columns=["task", "model", "method", "seed", "test"])
        >>> relative(results, "test")["test"].tolist()
        [1.0, 1.0, 0.5, 0.5]
    """
    named, conditions = by_setting(results)
    cases = [*_CASE, *conditions]
    check_seeds(named, [*cases, "method", "seed"])
    reference = named[named["method"] == to].set_index([*cases, "seed"])[metric].astype(float)
    beside = reference.reindex(pd.MultiIndex.from_frame(named[[*cases, "seed"]])).to_numpy()
    kept = results.assign(**{metric: results[metric].astype(float) / beside})[~np.isnan(beside)]
    if kept.empty:
        raise AceError(f"no run of {to!r} with the same task, model and seed stands beside any, so nothing is relative")
    return kept


def check_seeds(named: pd.DataFrame, run: Sequence[str]) -> None:
    """Refuse two rows that are the same in the columns ``run``: their mean would mean nothing.

    Raises:
        AceError: There are such rows; it lists them.
    """
    twice = named[named.duplicated(run, keep=False)]
    if not twice.empty:
        columns = [*run, *twice.columns.intersection(["run"])]
        lines = ["  " + " ".join(map(str, row)) for row in twice[columns].to_numpy()]
        raise AceError(
            f"these seeds appear more than once ({', '.join(columns)}), as runs of different "
            "configurations do: select the rows of one configuration\n" + "\n".join(lines)
        )


def compare(
    results: pd.DataFrame,
    metric: str = "test_shipped",
    cases: Sequence[str] = _CASE,
    against: str | None = None,
) -> pd.DataFrame:
    """Compare the methods of each task and model with the best one, or with one that is named.

    Args:
        results: One row per run, as ``load_results`` gives them; of each case and method, each seed once.
        metric: The column to compare, of which lower is better.
        cases: Columns that tell apart what is compared separately.
        against: The method to compare with; tests are then two-sided. Cases without it have no ``p``.

    Returns:
        One row per case and method, indexed by them in order of appearance: ``mean``; ``best``, whether it is
        the lowest of the methods with a value for every seed; and ``p``, the adjusted probability of a difference
        as large as this, or larger, between methods that are equally good. ``p`` is 1 for the method compared with,
        and missing for those with a run without a finite value, and where the others share fewer than two seeds.

    Example:
        >>> results = pd.DataFrame(
        ...     [("nbody", "egnn", method, seed, error + 0.01 * seed + noise * (-1) ** seed)
        ...      for method, error, noise in (("ace", 0.5, 0), ("cr", 0.51, 0.05), ("strict", 0.7, 0.01))
        ...      for seed in range(5)],
        ...     columns=["task", "model", "method", "seed", "test"])
        >>> compare(results, "test")["p"].round(3).tolist()
        [1.0, 0.231, 0.0]
    """
    parts = {}
    for case, runs in results.groupby(list(cases), sort=False, observed=True):
        values = {str(method): of.set_index("seed")[metric].astype(float) for method, of in _by_method(runs)}
        means = pd.Series({method: x.mean() for method, x in values.items()})
        complete = means[[method for method, x in values.items() if np.isfinite(x).all()]]
        shared = pd.DataFrame({method: values[str(method)] for method in complete.index}).dropna()
        reference = against or (str(complete.idxmin()) if len(complete) else "")
        p = _against(shared, reference, 1 if against is None else 2) if reference in shared else {}
        lowest = [method in complete and complete[method] == complete.min() for method in means.index]
        parts[case] = pd.DataFrame({"mean": means, "best": lowest, "p": pd.Series(p, dtype=float)}, means.index)
    return pd.concat(parts, names=[*cases, "method"])


def _by_method(runs: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    return runs.groupby("method", sort=False, observed=True)


def _against(values: pd.DataFrame, reference: str, sides: int) -> dict[str, float]:
    """Adjusted p-values of the columns, from rows of seeds that all of them have."""
    from scipy.special import stdtr  # scipy.stats would take a second to import

    others = [str(method) for method in values if method != reference]
    seeds = len(values)
    p: dict[str, float] = {}
    if seeds > 1 and others:
        x = values.map(math.log) if (values > 0).all(axis=None) else values
        gaps = x[others].sub(x[reference], axis=0)
        least = max(1e-12 * float(x.abs().to_numpy().max()), 1e-150)  # rounding, where seeds change nothing
        variance, freedom = moderated(gaps.var().clip(lower=least**2).to_numpy(), seeds - 1)
        gap = gaps.mean() if sides == 1 else gaps.mean().abs()
        raw = sides * stdtr(freedom, -gap.to_numpy() / np.sqrt(variance / seeds))
        p = holm(dict(zip(others, raw.tolist(), strict=True)))
    return p | {reference: 1.0}


def moderated(variances: NDArray[np.float64], freedom: float) -> tuple[NDArray[np.float64], float]:
    r"""Draw variances towards what they have in common, as far as they have something in common.

    With few seeds a variance of its own says little, and one variance for all lets a method that diverges now and then
    hide the differences of all others. The empirical Bayes estimate of Smyth (2004) lies between the two: from
    :math:`s^2 \sim \sigma^2 \chi^2_d / d` and :math:`1/\sigma^2 \sim \chi^2_{d_0} / (d_0 s_0^2)`

    .. math:: \tilde s^2 = \frac{d_0 s_0^2 + d s^2}{d_0 + d}, \qquad
        \psi'(d_0/2) = \mathrm{Var}(\log s^2) - \psi'(d/2), \qquad
        \log s_0^2 = \mathrm{E} \log s^2 - \psi(d/2) + \log(d/2) + \psi(d_0/2) - \log(d_0/2)

    Args:
        variances: Estimates s², each above 0, with the same number of degrees of freedom.
        freedom: That number, d.

    Returns:
        The moderated variances, and the degrees of freedom of a t-test with one of them: d₀ + d, at most those of all
        together.

    Example:
        >>> moderated(np.array([1.0, 1.1, 0.9, 1.05]), 2)[0].round(2)  # alike: one variance for all
        array([1.01, 1.01, 1.01, 1.01])
        >>> moderated(np.array([1.0, 0.002, 40.0, 5.0]), 2)[1] < 3  # not alike: little is shared
        True
    """
    from scipy.special import digamma, polygamma

    count = len(variances)
    if count < 2:
        return variances, freedom
    logs = np.log(variances)
    excess = float(logs.var(ddof=1)) - float(polygamma(1, freedom / 2))
    if excess <= 0:  # no more different than chance makes them
        return np.full(count, variances.mean()), count * freedom
    half = _inverse_trigamma(excess)
    center = logs.mean() - digamma(freedom / 2) + math.log(freedom / 2) + digamma(half) - math.log(half)
    prior = 2 * half
    drawn = (prior * math.exp(center) + freedom * variances) / (prior + freedom)
    return drawn, min(prior, (count - 1) * freedom) + freedom


def _inverse_trigamma(value: float) -> float:
    """Return the x > 0 with trigamma(x) = value, by Newton's method on 1 / trigamma, which is nearly a line."""
    from scipy.special import polygamma

    x = 0.5 + 1 / value
    for _ in range(50):
        slope = float(polygamma(1, x))
        step = slope * (1 - slope / value) / float(polygamma(2, x))
        x += step
        if -step < 1e-12 * x:
            break
    return x


def holm(values: Mapping[str, float], least: float = 0.0) -> dict[str, float]:
    """Adjust p-values for their number by Holm's rule, none below ``least``.

    Example:
        >>> holm({"a": 0.04, "b": 0.01})
        {'b': 0.02, 'a': 0.04}
    """
    largest, adjusted = least, {}
    for place, name in enumerate(sorted(values, key=lambda name: values[name])):
        largest = max(largest, min(1.0, (len(values) - place) * values[name]))
        adjusted[name] = largest
    return adjusted


@dataclass(frozen=True)
class Ranks:
    """Ranks of methods over tasks.

    Attributes:
        mean: Mean rank of each method, ascending; 1 is best.
        cases: Number of pairs of a task and a model.
        p: p-value of Friedman's test that all methods are equally good.
        critical: Critical difference: mean ranks that differ by less cannot be told apart at 5 %.
        left_out: Methods that were not run in every case.
    """

    mean: pd.Series[float]
    cases: int
    p: float
    critical: float
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = ["| method | mean rank |", "| ------ | --------- |"]
        lines += [f"| {method} | {rank:.2f} |" for method, rank in self.mean.items()]
        friedman = "" if math.isnan(self.p) else f"; Friedman's test: p = {self.p:.2g}"
        lines += ["", f"{self.cases} pairs of task and model; critical difference {self.critical:.2f}{friedman}"]
        lines += [f"not told apart: {', '.join(clique)}" for clique in self.cliques]
        lines += [f"not run everywhere: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join(lines)

    @property
    def cliques(self) -> list[list[str]]:
        """Largest groups of methods that cannot be told apart, of two at least, from the best on."""
        names = list(self.mean.index)
        found: list[list[str]] = []
        for first, rank in enumerate(self.mean):
            group = [name for name in names[first:] if self.mean[name] - rank < self.critical]
            if len(group) > 1 and not (found and set(group) <= set(found[-1])):
                found.append(group)
        return found


def rank(results: pd.DataFrame, metric: str = "test_shipped", cases: Sequence[str] = _CASE) -> Ranks:
    """Rank the methods in each task and model by the mean over seeds, and average the ranks.

    Args:
        results: As for ``compare``.
        metric: The column to compare, of which lower is better. A method with a run without a value is ranked last.
        cases: As for ``compare``.

    Returns:
        The ranks of the methods that were run in every case.

    Raises:
        AceError: Fewer than two methods or two cases have all in common.

    Example:
        >>> results = pd.DataFrame(
        ...     [(task, "egnn", method, 0, error)
        ...      for task in "abcdefgh" for method, error in (("ace", 1.0), ("cr", 2.0), ("strict", 3.0))],
        ...     columns=["task", "model", "method", "seed", "test"])
        >>> ranks = rank(results, "test")
        >>> ranks.mean.to_dict(), round(ranks.critical, 2), ranks.cliques
        ({'ace': 1.0, 'cr': 2.0, 'strict': 3.0}, 1.17, [['ace', 'cr'], ['cr', 'strict']])
    """
    from scipy import stats

    means = pd.DataFrame(
        {
            case: {str(method): of[metric].astype(float).fillna(math.inf).mean() for method, of in _by_method(runs)}
            for case, runs in results.groupby(list(cases), sort=False, observed=True)
        }
    ).T
    everywhere = means.columns[means.notna().all()]
    left_out = tuple(str(method) for method in means if method not in everywhere)
    count, methods = len(means), len(everywhere)
    if count < 2 or methods < 2:
        raise AceError(
            f"{methods} methods were run in each of {count} pairs of task and model"
            + (f" (not everywhere: {', '.join(left_out)})" if left_out else "")
            + ": ranks need two of both"
        )
    ranks = means[everywhere].rank(axis=1)
    average = ranks.mean().sort_values(kind="stable")
    p = float(stats.friedmanchisquare(*ranks.T.to_numpy()).pvalue) if methods > 2 else math.nan
    q = float(stats.studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    critical = q * math.sqrt(methods * (methods + 1) / (6 * count))
    return Ranks(average, count, p, critical, left_out)
