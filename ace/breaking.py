r"""Which transformations do data break? A test on the residuals of an equivariant model.

The data keep a group H if the law of the targets is equivariant, :math:`p(h y \mid h x) = p(y \mid x)`. Whether the
inputs look the same from all sides is another question, and not asked. With f equivariant under the whole group and
:math:`r = y - f(x)` on samples that f was not trained on, r has the symmetries of the data. For each subgroup H:

1. :math:`g_H`, the best fit of r under H: ridge regression on polynomials of the vectors x and f(x), fitted to samples
   moved by random elements of H; its predictions are pulled back and averaged over elements.
2. :math:`a = g_K - P_H g_K`, a part that H forbids: the fit under another group K (or none), less its average over H.
   Of all K, the one that promises most.
3. The score of a sample, :math:`s = \langle r - g_H(x),\; a(x) \rangle`. If the data keep H, it is 0 in expectation
   as soon as *either* the inputs are evenly spread under H (then a is orthogonal to all that is equivariant) *or* g_H
   is all that can be known of r. If they break H, and a found something of it, it is positive: a t-test, one-sided.
4. Are the inputs evenly spread under H? The means of all features are compared with those of moved samples. If they
   differ, the score must not decide: what f and g_H miss may be nearer to hand for a fit that knows, say, that all
   poses are upright, and yet be equivariant. Then H is broken only if the best of all fits has an error that is lower
   than g_H's by surely more than a margin. Translations cannot be even.

No sample is judged by a fit that it took part in, and no pair of samples counts twice: the second half of the samples
comes in blocks, each tested on fits to the blocks before it. Residuals are divided by the size that the lengths of the
row's vectors let expect, and cut down where they are much larger still. Neither changes a symmetry of their law, and
noisy samples do not drown the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ace.comparison import holm
from ace.errors import AceError
from ace.groups import E3, O3, Element, Group, Translations
from ace.symmetry import act_by_sample, by_sample

LEVEL = 0.05
"""Share of data sets that keep the whole group and of which it is said that they do not."""
BLOCKS = 8
"""Blocks of samples; the second half is tested."""
COPIES = 8
"""Random elements of a group for each sample."""
POOL = 240
"""Elements drawn for a group; the samples share them. Every element of each finite group up to the cube's is there."""
FAR = 3.0
"""Vectors are shrunk smoothly to at most this many times their usual length."""
OUTLIER = 10.0
"""Residuals longer than this many times the median, both in units of what is expected, are cut down to it."""
SHORT = 0.01
"""Lengths below this share of the usual one count as it, so that their logarithms are finite."""
MIXES = 16
"""Random combinations of the vectors, and of the directions, of which the cubic features are made."""
PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Ridge penalties, in units of the features' mean squares; cross-validation chooses."""
MARGIN = 0.25
"""Where inputs are uneven, the least share by which the best of all fits must be better than that under the group."""
UNEVEN = 0.01
"""Level of the test whether inputs are even."""
ROUNDING = 1e-9
"""Features, of order 1, that differ by less are the same."""
SLIGHT = 0.02
"""A subgroup counts as broken only if it costs surely more than this share of what the whole group costs, which is what
rotations about an axis 8° from the one that is kept cost."""
FEWEST = 40
"""With fewer samples nothing is said."""
KEPT = 0.25
"""A group counts as kept if it costs surely less than this share of what the whole group costs; with uneven inputs,
if the best of all fits is surely not better by the margin."""

Verdict = Literal["broken", "kept", "undecided"]


@dataclass(frozen=True)
class Finding:
    """What the data say about one group of transformations.

    Attributes:
        name: Name of the group.
        verdict: ``"broken"``, if p is below 5 %; ``"kept"``, if the group costs surely little; else ``"undecided"``.
        p: Probability of evidence as strong as this if the data keep the group; for a subgroup, if it costs at most
            2 % of what the whole group costs; with uneven inputs, if no fit is better by more than 25 %. Adjusted for
            the number of groups by Holm's rule; that of the whole group is not, but for E(3), where it is twice the
            smaller one of those of O(3) and of translations.
        t: What p was computed from: a mean in units of its standard error.
        error: Mean squared residual after the best fit under the group, relative to that before any fit.
        excess: By which share ``error`` exceeds the error with the forbidden part added, negative if that part only
            adds noise; where inputs are uneven, the error of the best of all fits.
        even: Whether the inputs look the same from all sides, as far as this group goes.
    """

    name: str
    verdict: Verdict
    p: float
    t: float
    error: float
    excess: float
    even: bool


@dataclass(frozen=True)
class Rows:
    """What the test sees: one row for each node, or for each sample.

    Attributes:
        vectors: Vectors of the row, translations taken out, shape (N, k, 3).
        origin: Where the row's sample is, shape (N, 3); None without positions.
        residual: y - f(x), shape (N, ...).
        kind: Type of the residual, see `ace.groups`.
        index: Sample of each row, int64 of shape (N,), every sample from 0 on has a row.
        slot: Place of the row in its sample, shape (N,), where all samples have as many; None else.
        near: Vectors from the row to the nearest one of its sample, and differences of their other vectors, shape
            (N, m, 3); None without positions.
    """

    vectors: Tensor
    origin: Tensor | None
    residual: Tensor
    kind: str
    index: Tensor
    slot: Tensor | None = None
    near: Tensor | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.index.max()) + 1

    def sorted(self, order: Tensor) -> Rows:
        """Return the rows in another order."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: of[order] for name, of in tensors.items() if isinstance(of, Tensor)}
        return replace(self, **moved)


def judge(rows: Rows, group: Group, subgroups: Mapping[str, Group], seed: int = 0) -> list[Finding]:
    """Test which groups the data keep: the whole one first, and only if it is broken the others.

    Args:
        rows: The residuals and what they may depend on.
        group: The whole group, under which the model is equivariant.
        subgroups: Subgroups by name. They are also the groups K under which a broken group's forbidden part is
            sought, so the smaller the group that the data keep, the better it is to have it among them.
        seed: Seed of the blocks and of the elements.

    Returns:
        The finding on the whole group and, if the data break it, those on the subgroups.

    Raises:
        AceError: Fewer than 40 samples.

    Example:
        >>> from ace.groups import O3, SO2, SO3
        >>> random = torch.Generator().manual_seed(0)
        >>> x, noise = torch.randn(2, 400, 1, 3, generator=random)
        >>> blown = Rows(x, None, noise[:, 0] + torch.tensor([0.0, 0.0, 1.0]), "vector", torch.arange(400))
        >>> found = judge(blown, O3(), {"rotations": SO3(), "rotations about z": SO2()})
        >>> [(finding.name, finding.verdict) for finding in found]
        [('O(3)', 'broken'), ('rotations', 'broken'), ('rotations about z', 'kept')]
    """
    if rows.samples < FEWEST:
        raise AceError(
            f"{rows.samples} samples to test on: at least {FEWEST} are needed, better a thousand. Graphs joined into "
            "one batch are told apart by an integer input named 'batch', dense inputs by their first axis"
        )
    probe = _Probe(rows, seed)
    common = probe.fit(group)[0]
    probe.residual = probe.residual - probe.average(group, [common])[0]
    gates: dict[str, Group] = {str(group): group}
    if isinstance(group, E3):  # translations cannot be even: they must not spoil the test of the rest
        gates = {"rotations and reflections": O3(), "translations": Translations(group.translation)}
    groups = {**gates, **subgroups}
    fits = {name: probe.fit(subgroup) for name, subgroup in groups.items() if name != str(group)}
    fits |= {str(group): [[torch.zeros_like(weights) for weights in common]], "": probe.fit(None)}

    def test(name: str, slight: float = 0.0) -> _Test:
        others = [fit for other, both in fits.items() if other not in (name, str(group)) for fit in both]
        return probe.test(groups[name], fits[name][0], others, slight)

    tests = {name: test(name) for name in gates}
    worst = min(tests.values(), key=lambda of: of.p)
    gate = min(1.0, len(gates) * worst.p)
    whole = Finding(
        str(group), "broken", gate, worst.t, worst.error, worst.excess, all(of.even for of in tests.values())
    )
    if gate >= LEVEL:
        return [replace(whole, verdict="kept")]
    tests |= {name: test(name, SLIGHT * worst.gain) for name in subgroups}
    adjusted = holm({name: of.p for name, of in tests.items()}, gate)
    findings = [whole]
    for name, of in tests.items():
        verdict: Verdict = "undecided"
        if adjusted[name] < LEVEL:
            verdict = "broken"
        elif of.most < (KEPT * worst.gain if of.even else 0):
            verdict = "kept"
        if name != str(group):
            findings.append(Finding(name, verdict, adjusted[name], of.t, of.error, of.excess, of.even))
    return findings


@dataclass(frozen=True)
class _Test:
    t: float
    gain: float  # what the forbidden part, or the best of all fits, is worth
    most: float  # upper end of the confidence interval of the mean score, for the rival for which it is largest
    error: float
    excess: float
    even: bool

    @property
    def p(self) -> float:
        return _tail(self.t)


def _tail(t: float) -> float:
    """Probability that a standard normal variable exceeds t."""
    return 0.5 * math.erfc(t / math.sqrt(2))


def _t_values(values: Tensor) -> Tensor:
    """Means over the last axis in units of their standard errors; 0 where all values are the same."""
    spread = values.std(-1) / math.sqrt(values.shape[-1])
    return torch.where(spread > 0, values.mean(-1) / spread.clamp_min(1e-300), 0.0)


_Fit = list[Tensor]
"""Weights, (features, outputs), with which to predict each block."""
_Move = Callable[[Tensor, str], Tensor]


class _Probe:
    """Fits of the residuals, and predictions of each block from the blocks before it.

    Before the half of the blocks, where nothing is tested, each is predicted from the other blocks of that half.
    """

    def __init__(self, rows: Rows, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.count = rows.samples
        block = (torch.randperm(self.count, generator=self.random) * BLOCKS // self.count)[rows.index]
        self.rows = rows = rows.sorted(block.argsort(stable=True))
        self.blocks = torch.bincount(block, minlength=BLOCKS).tolist()
        self.late = torch.zeros(self.count, dtype=torch.bool)
        self.late[rows.index[sum(self.blocks[: BLOCKS // 2]) :]] = True
        self.residual = _standardized(rows)
        size = self.by_sample(self.residual.square()).sqrt()
        cut = (OUTLIER * size.median() / size.clamp_min(1e-300)).clamp(max=1.0)[rows.index]
        self.residual = self.residual * cut.view(-1, *[1] * (self.residual.dim() - 1))
        self.before = self.by_sample(self.residual.square())
        self.vectors = [(rows.vectors.double(), "vector")]
        if rows.origin is not None:
            self.vectors.append((rows.origin.double()[:, None], "position"))
        channels = torch.cat([vector for vector, _ in self.vectors], 1)
        self.scale = channels.square().sum(-1).mean(0).sqrt().clamp_min(1e-300)[:, None]
        self.mix = self.mixes(channels)
        self.near = channels[:, :0] if rows.near is None else rows.near.double()
        self.mix_near = self.mixes(self.near)
        self.of_near = 1 + 3 * self.near.shape[1] + 10 * MIXES  # features: 1, linear, ten cubes of each combination

    def mixes(self, channels: Tensor) -> Tensor:
        """Draw random combinations of channels."""
        mix = torch.randn(MIXES, channels.shape[1], generator=self.random, dtype=torch.float64)
        return torch.nn.functional.normalize(mix, dim=1)

    def by_sample(self, values: Tensor) -> Tensor:
        """Sum the entries of each sample."""
        return by_sample(values, self.rows.index, self.count)

    def features(self, move: _Move) -> Iterator[Tensor]:
        """Yield, for each block, 1 and polynomials of the moved vectors.

        First linear and cubic ones of the directions of what is near (seen from the other row of a pair they change
        sign), then linear ones, products of two, and cubic ones in random combinations of the vectors.
        """
        near = torch.nn.functional.normalize(move(self.near, "vector"), dim=-1)
        v = torch.cat([move(vector, kind) for vector, kind in self.vectors], 1) / self.scale
        v = v / (1 + v.square().sum(-1, keepdim=True) / FAR**2).sqrt()
        slots = v[:, 0, :0] if self.rows.slot is None else torch.nn.functional.one_hot(self.rows.slot)[:, 1:].to(v)
        first, second = torch.triu_indices(3 * v.shape[1], 3 * v.shape[1])
        for u, w, slot in zip(*(tensor.split(self.blocks) for tensor in (near, v, slots)), strict=True):
            flat = w.flatten(1)
            parts = [torch.ones_like(flat[:, :1])]
            if u.shape[1]:
                parts += [u.flatten(1), _cubes(u, self.mix_near)]
            parts += [flat, flat[:, first] * flat[:, second], _cubes(w, self.mix), slot]
            yield torch.cat(parts, 1)

    def moves(self, group: Group | None, seed: int) -> Iterator[tuple[_Move, _Move]]:
        """Yield, several times, functions that move each sample by an element of its own, and back."""
        if group is None:
            yield (lambda tensor, _: tensor), (lambda tensor, _: tensor)
            return
        pool = group.sample(POOL, seed)
        inverse = [element.inverse() for element in pool]
        for _ in range(COPIES):
            drawn = torch.randint(POOL, (self.count,), generator=self.random).tolist()
            yield self.mover([pool[i] for i in drawn]), self.mover([inverse[i] for i in drawn])

    def mover(self, elements: list[Element]) -> _Move:
        """Return the function that moves each sample by its element."""
        return lambda tensor, kind: act_by_sample(elements, self.rows.index, tensor, kind)

    def fit(self, group: Group | None) -> list[_Fit]:
        """Fit the residuals by ridge regression, on samples moved by elements of the group.

        Returns:
            The fit to all features and, if there are such, that to the directions to the nearest row alone: what little
            these show drowns in the noise of the others' many weights.
        """
        grams: list[list[Tensor]] = [[torch.zeros(()), torch.zeros(())] for _ in range(BLOCKS)]
        for move, _ in self.moves(group, 0):
            y = move(self.residual, self.rows.kind).flatten(1).split(self.blocks)
            for gram, x, product in zip(grams, self.features(move), y, strict=True):
                gram[:] = [gram[0] + x.T @ x, gram[1] + x.T @ product]
        fits = [_cross_validated(grams)]
        if self.near.shape[1]:
            few, none = slice(self.of_near), len(fits[0][0]) - self.of_near
            near = _cross_validated([[square[few, few], product[few]] for square, product in grams])
            fits.append([torch.nn.functional.pad(weights, (0, 0, 0, none)) for weights in near])
        return fits

    def predict(self, fits: list[_Fit], move: _Move, back: _Move) -> list[Tensor]:
        """Predict the residuals of the moved samples, and move them back."""
        blocks = zip(self.features(move), zip(*fits, strict=True), strict=True)
        predictions = torch.cat([x @ torch.cat(weights, 1) for x, weights in blocks])
        parts = predictions.chunk(len(fits), 1)
        return [back(part.reshape(self.residual.shape), self.rows.kind) for part in parts]

    def average(self, group: Group | None, fits: list[_Fit], seed: int = 0) -> list[Tensor]:
        """Average predictions over elements of the group."""
        copies = [self.predict(fits, *moves) for moves in self.moves(group, seed)]
        return [torch.stack(of_fit).mean(0) for of_fit in zip(*copies, strict=True)]

    def test(self, group: Group, fit: _Fit, others: list[_Fit], slight: float) -> _Test:
        """Test whether something that the group forbids predicts what the best fit under it leaves."""
        left = self.residual - self.average(group, [fit])[0]
        plain, averaged = self.average(None, others), self.average(group, others, seed=1)  # other elements than above
        forbidden = [here - mean for here, mean in zip(plain, averaged, strict=True)]
        error, even = self.by_sample(left.square()), self.is_even(group)
        scores = torch.stack([self.by_sample(left * part) for part in forbidden])
        if even:
            best = int(_t_values(scores[:, ~self.late]).argmax())
            score, without = scores[best], self.by_sample((left - forbidden[best]).square())
            chances = scores[:, self.late]  # what is kept has no chance of a score, whatever its rival
        else:
            errors = torch.stack([self.by_sample((self.residual - fit).square()) for fit in plain])
            without = errors[int(errors[:, ~self.late].mean(1).argmin())]
            score = error - without - MARGIN * error
            chances = score[self.late][None]
        score, error, without = score[self.late], error[self.late], without[self.late]
        return _Test(
            t=float(_t_values(score - slight if even else score)),
            gain=float(score.mean()) if even else float((error - without).mean()),
            most=float((chances.mean(1) + 1.645 * chances.std(1) / math.sqrt(len(score))).max()),
            error=float(error.sum() / self.before[self.late].sum()),
            excess=float(error.sum() / without.sum()) - 1,
            even=even,
        )

    def means(self, move: _Move) -> Tensor:
        """Mean features of each sample."""
        sums = [
            x.new_zeros(self.count, x.shape[1]).index_add(0, index, x)
            for x, index in zip(self.features(move), self.rows.index.split(self.blocks), strict=True)
        ]
        return torch.stack(sums).sum(0) / torch.bincount(self.rows.index)[:, None]

    def is_even(self, group: Group) -> bool:
        """Whether no feature's mean differs from that over moved samples."""
        moved = torch.stack([self.means(move) for move, _ in self.moves(group, seed=2)]).mean(0)
        mean = self.means(lambda tensor, _: tensor) - moved
        mean[mean.abs() < ROUNDING] = 0.0
        largest = float(_t_values(mean.T).abs().max())
        return 2 * mean.shape[1] * _tail(largest) > UNEVEN


def _cubes(v: Tensor, mix: Tensor) -> Tensor:
    """Products of three components of random combinations of the vectors."""
    mixed = torch.einsum("mk,nka->nam", mix, v)
    mixed = mixed / mixed.square().sum(1, keepdim=True).clamp_min(1e-30) ** (1 / 3)  # cubes grow linearly
    i, j, k = torch.combinations(torch.arange(3), 3, with_replacement=True).T
    return (mixed[:, i] * mixed[:, j] * mixed[:, k]).flatten(1)


def _standardized(rows: Rows) -> Tensor:
    """Divide residuals by what the lengths of the row's vectors let expect of their size: by no direction, no place."""
    residual = rows.residual.double()
    vectors = rows.vectors if rows.near is None else torch.cat([rows.vectors, rows.near], 1)
    lengths = vectors.double().norm(dim=-1)
    usual = lengths.square().mean(0).sqrt().clamp_min(1e-300)
    x = (lengths / usual).clamp_min(SHORT).log()
    x = torch.cat([torch.ones_like(x[:, :1]), x - x.mean(0)], 1)
    first, second, third = torch.combinations(torch.arange(x.shape[1]), 3, with_replacement=True).T
    x = x[:, first] * x[:, second] * x[:, third]  # with the leading 1: all powers up to the third
    size = residual.flatten(1).norm(dim=1)
    y = size.clamp_min(SHORT * float(size.median()) or 1e-300).log()
    weights = _ridge([[x.T @ x, x.T @ y[:, None]]], [0], [1e-3])[0]
    expected = (x @ weights)[:, 0]
    expected = expected.clamp(float(y.min()), float(y.max())).exp()
    return residual / expected.view(-1, *[1] * (residual.dim() - 1))


def _cross_validated(grams: list[list[Tensor]]) -> _Fit:
    """Fit each block of the first half to its others, each later one to all before it; penalty from the first half."""
    half = range(BLOCKS // 2)
    paths = [_ridge(grams, [other for other in half if other != number], PENALTIES) for number in half]
    errors = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for path, (square, product) in zip(paths, grams, strict=False):
        errors += torch.stack([((square @ w) * w).sum() - 2 * (w * product).sum() for w in path])
    best = int(errors.argmin())
    later = [_ridge(grams, range(number), [PENALTIES[best]])[0] for number in range(BLOCKS // 2, BLOCKS)]
    return [path[best] for path in paths] + later


def _ridge(grams: list[list[Tensor]], blocks: Iterable[int], penalties: Iterable[float]) -> list[Tensor]:
    """Solve ridge regression on some blocks, for each penalty."""
    chosen = list(blocks)
    square = torch.stack([grams[number][0] for number in chosen]).sum(0)
    product = torch.stack([grams[number][1] for number in chosen]).sum(0)
    unit = square.diagonal().clamp_min(1e-300).sqrt()[:, None]
    square, product = square / unit / unit.T, product / unit
    identity = torch.eye(len(square), dtype=square.dtype)
    return [torch.linalg.solve(square + penalty * identity, product) / unit for penalty in penalties]
