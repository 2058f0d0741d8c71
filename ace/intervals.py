"""Confidence intervals from independent samples, without an assumption on their distribution."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RESAMPLES = 1000
"""Bootstrap samples of an interval."""


def ratio_interval(a: Tensor, b: Tensor, confidence: float, seed: int = 0) -> tuple[float, float] | None:
    r"""Studentized bootstrap interval of a ratio of means, :math:`R = E[a] / E[b]`.

    With :math:`\hat R = \sum a / \sum b` and its standard error
    :math:`s = \sqrt{\tfrac{n}{n-1} \sum (a - \hat R b)^2} / \sum b`, the same two numbers of each bootstrap sample give
    :math:`t^* = (R^* - \hat R) / s^*`, and the interval is
    :math:`[\hat R - s\,q_{1-\alpha/2}(t^*),\ \hat R - s\,q_{\alpha/2}(t^*)]`, cut at 0. Unlike an interval from the
    quantiles of :math:`R^*` it allows for skewed samples.

    Args:
        a: Independent samples, not negative, shape (n,).
        b: Shape (n,), paired with ``a``; ones for the interval of a mean.
        confidence: Probability that the interval holds the ratio, between 0 and 1.
        seed: Seed of the bootstrap samples.

    Returns:
        Lower and upper end; None for a single sample, which has none.

    Example:
        >>> x = torch.arange(1.0, 101.0)
        >>> low, high = ratio_interval(x, torch.ones(100), 0.95)
        >>> low < 50.5 < high
        True
    """
    n = len(a)
    if n < 2:
        return None
    a, b = a.double().cpu(), b.double().cpu()
    ratio, error = _ratio(a, b)
    if error == 0:
        return float(ratio), float(ratio)
    random = torch.Generator().manual_seed(seed)
    deviations = []
    for count in [100] * (RESAMPLES // 100):  # at once they would fill the memory
        chosen = torch.randint(n, (count, n), generator=random)
        there, error_there = _ratio(a[chosen], b[chosen])
        deviations.append((there - ratio) / error_there)
    t = torch.cat(deviations)
    tail = (1 - confidence) / 2
    # a sample drawn n times over has no error: no deviation can be told from it
    low, high = torch.quantile(t[t.isfinite()], torch.tensor([tail, 1 - tail], dtype=t.dtype))
    return max(0.0, float(ratio - high * error)), max(0.0, float(ratio - low * error))


def _ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ratio of the sums over the last axis, and its standard error."""
    n = a.shape[-1]
    total = b.sum(-1)
    ratio = a.sum(-1) / total
    error = ((a - ratio[..., None] * b).square().sum(-1) * n / (n - 1)).sqrt() / total
    return ratio, error


def quantile_interval(x: Tensor, share: float, confidence: float) -> tuple[float, float, float | None]:
    r"""Quantile of the entries of all rows, and an interval for it from order statistics.

    Of n independent numbers, the l-th and u-th smallest enclose the p-quantile with probability at least
    :math:`P(l \le K < u)`, where K is binomial with n and p; l and u are chosen so that each tail is at most α/2.
    The rows are independent, the m entries of a row need not be: the ends are the entries of ranks m (l - 1) + 1 and
    m u among all n m. For m = 1, and for equal entries in each row, that is the interval above; the less they depend on
    each other, the wider it is than it need be.

    Args:
        x: Shape (n, m).
        share: The quantile p, between 0 and 1.
        confidence: Probability that the interval holds the quantile.

    Returns:
        The quantile (an entry of x), the lower end (0 where there are too few samples for one: x is not negative), and
        the upper end (None where there are too few samples for one).

    Example:
        >>> quantile_interval(torch.arange(1.0, 101.0)[:, None], 0.5, 0.95)
        (50.0, 40.0, 61.0)
        >>> quantile_interval(torch.arange(1.0, 11.0)[:, None], 0.95, 0.95)
        (10.0, 8.0, None)
    """
    n, m = x.shape
    ordered = x.double().cpu().flatten().sort().values
    k = torch.arange(n + 1, dtype=torch.float64)
    log = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    below = (log + k * math.log(share) + (n - k) * math.log1p(-share)).exp().cumsum(0)  # P(K <= k)
    tail = (1 - confidence) / 2
    lower = int((below <= tail).sum())  # the largest l with P(K < l) <= tail
    upper = int((below < 1 - tail).sum()) + 1  # the smallest u with P(K >= u) <= tail
    estimate = float(ordered[max(0, math.ceil(share * n * m - 1e-9) - 1)])
    low = float(ordered[m * (lower - 1)]) if lower else 0.0
    return estimate, low, float(ordered[m * upper - 1]) if upper <= n else None


def share_above_max(n: int, confidence: float) -> float:
    r"""Largest share of new samples that exceeds the maximum of n independent ones, at a confidence.

    If a share p of the distribution lies above the maximum, all n samples lay below: with probability at most
    :math:`(1 - p)^n`. Setting that to 1 - c gives :math:`p = 1 - (1 - c)^{1/n}`.

    Args:
        n: Number of samples.
        confidence: The confidence c.

    Returns:
        The share p.

    Example:
        >>> round(share_above_max(1000, 0.95), 4)
        0.003
    """
    return -math.expm1(math.log1p(-confidence) / n)
