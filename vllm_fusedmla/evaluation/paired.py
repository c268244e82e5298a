# SPDX-License-Identifier: Apache-2.0
"""Paired statistics: what the same prompts, answered by two configurations, say about a difference.

Two runs over the same prompts share what makes prompts hard, so their difference is known far better than either
score. Differences are `other - base`, so negative is a loss. Sources: McNemar, Psychometrika 12 (1947) 153-157, in its
exact form; Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; Holm, Scand. J. Statist. 6 (1979)
65-70.

The verdict on a comparison, with `margin` the loss or gain that would not matter (0.01: one point):

- *worse* or *better*: the 95 % interval of the difference leaves 0 out, and the test rejects "no difference" at 5 %
  after Holm's correction for all comparisons of the report.
- *same*: the interval lies within the margin on both sides, and the smallest detectable loss is within it too. A score
  between 0 and 1 must itself be above the margin, or there is nothing to lose.
- *not enough data*: everything else. More prompts would decide it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10000
VERDICTS = ("same", "worse", "better", "not enough data")
Values = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison of one measure, larger values being better.

    Attributes:
        n: pairs.
        base, other: means.
        difference: `other - base`; low, high: its 95 % interval.
        p: two-sided; exact McNemar for values of 0 and 1, else a permutation test of the signs.
        lost, gained: pairs whose value fell or rose.
        detectable: the smallest loss that this many pairs, flipping to and fro as much as they did, would have shown.
        binary: whether all values are 0 or 1; bounded: between them.
    """

    n: int
    base: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    lost: int
    gained: int
    detectable: float
    binary: bool
    bounded: bool


def compare(base: Sequence[float], other: Sequence[float], seed: int = 0) -> Difference:
    """Compare the values of the same prompts in two runs, in the same order.

    Raises ValueError for lists of different lengths or without values.
    """
    x, y = np.asarray(base, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or not len(x):
        raise ValueError(f"pairs must be two equally long lists of values, got {x.shape} and {y.shape}")
    change = y - x
    binary = bool(np.isin(np.concatenate([x, y]), (0.0, 1.0)).all())
    bounded = bool((x >= 0).all() and (y >= 0).all() and (x <= 1).all() and (y <= 1).all())
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    low, high = bootstrap_interval(change, seed)
    return Difference(
        n=len(x),
        base=float(x.mean()),
        other=float(y.mean()),
        difference=float(change.mean()),
        low=low,
        high=high,
        p=mcnemar(lost, gained) if binary else sign_test(change, seed),
        lost=lost,
        gained=gained,
        detectable=detectable_flips(len(x), min(lost, gained)) if binary else detectable_shift(change, bounded),
        binary=binary,
        bounded=bounded,
    )


def bootstrap_interval(values: Values, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; the same for the same values and seed."""
    rng = np.random.default_rng(seed)
    n, means = len(values), []
    # How often a resample has each value; differences of scores have few values, so counting them is quicker.
    kinds, counts = np.unique(values, return_counts=True)
    chunk = max(1, 4_000_000 // len(kinds))
    for start in range(0, RESAMPLES, chunk):
        drawn = rng.multinomial(n, counts / n, size=min(chunk, RESAMPLES - start))
        means.append(drawn @ kinds / n)
    low, high = np.quantile(np.concatenate(means), [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p-value of McNemar's test: the pairs that changed went either way with equal probability."""
    return 1.0 if lost + gained == 0 else float(stats.binomtest(lost, lost + gained).pvalue)


def sign_test(change: Values, seed: int = 0) -> float:
    """Two-sided p-value of the mean under random signs of the differences."""
    changed = change[change != 0]
    if len(changed) < 2:  # one value: its opposite is as large
        return 1.0
    result = stats.permutation_test(
        (changed, np.zeros_like(changed)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES - 1,
        batch=max(1, 4_000_000 // len(changed)),
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def detectable_flips(n: int, back_and_forth: int) -> float:
    """The smallest loss that McNemar's test finds with a probability of 80 % among `n` pairs.

    Args:
        n: pairs.
        back_and_forth: pairs that flip each way for no reason, `min(lost, gained)`; the loss comes on top of them.

    Returns:
        a share of the pairs, 1.0 where even that would not be found.
    """
    noise = back_and_forth / n

    def power(loss: float) -> float:
        flips = 2 * noise + loss
        if flips > 1:
            return 1.0
        counts = np.arange(n + 1)
        weight = stats.binom.pmf(counts, n, flips)
        kept = counts[weight > 1e-9]
        share = (noise + loss) / flips if flips else 0.0
        # For each number of flips: the most gains with which the two-sided test still rejects.
        most = stats.binom.ppf(ALPHA / 2, kept, 0.5)
        most = np.where(stats.binom.cdf(most, kept, 0.5) * 2 > ALPHA, most - 1, most)
        found = np.where(most >= 0, stats.binom.cdf(most, kept, 1 - share), 0.0)
        return float((weight[kept] * found).sum())

    low, high = 0.0, 1.0
    if power(high) < POWER:
        return 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def detectable_shift(change: Values, bounded: bool) -> float:
    """The smallest loss of a mean that a paired test at 5 % finds with a probability of 80 %.

    Where values lie between 0 and 1 and hardly any changed, the spread says too little; then at least the largest
    share of pairs that could have lost everything with a probability of 5 % to be seen in none.
    """
    n = len(change)
    spread = float(change.std(ddof=1)) if n > 1 else float("inf")
    shift = float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) * spread / n**0.5
    return max(shift, 1 - ALPHA ** (1 / n)) if bounded else shift


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method, in the same order."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def verdict(found: Difference, adjusted_p: float, margin: float) -> str:
    """One of `VERDICTS`, see the module's description."""
    if adjusted_p < ALPHA and found.high < 0:
        return "worse"
    if adjusted_p < ALPHA and found.low > 0:
        return "better"
    within = -margin <= found.low and found.high <= margin and found.detectable <= margin
    within = within and not (found.bounded and found.base < margin)
    return "same" if within else "not enough data"
