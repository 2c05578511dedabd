"""Exact and valid p-values for a mean in [0, 1]: binomial tails, Hoeffding-Bentkus, and betting.

Each is super-uniform under the hypothesis that the mean is above epsilon (or equal): a p-value at most delta then
occurs with a probability of at most delta, for every sample size.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

# ln n! - Stirling's formula for n = 0..15, where the series is not exact to the last bits.
_SMALL = [
    0.0,
    *(math.lgamma(n + 1) - ((n + 0.5) * math.log(n) - n + 0.5 * math.log(2 * math.pi)) for n in range(1, 16)),
]


def _stirling_error(n: int) -> float:
    """ln n! less Stirling's formula."""
    if n < 16:
        return _SMALL[n]
    square = float(n) * n
    return (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / 1188 / square) / square) / square) / square) / n


def _deviance(x: float, mean: float) -> float:
    """x ln(x / mean) + mean - x without cancellation where both are close."""
    if abs(x - mean) < 0.1 * (x + mean):
        v = (x - mean) / (x + mean)
        total, term, j = (x - mean) * v, 2 * x * v, 1
        while True:
            term *= v * v
            following = total + term / (2 * j + 1)
            if following == total:
                return total
            total, j = following, j + 1
    return x * math.log(x / mean) + mean - x


def binomial_log_pmf(k: int, n: int, p: float) -> float:
    """ln P(X = k) for X ~ Binomial(n, p), 0 < p < 1, accurate to the last few bits for any n.

    Saddle-point form of C. Loader, "Fast and accurate computation of binomial probabilities" (2000).
    """
    if k == 0:
        return n * math.log1p(-p)
    if k == n:
        return n * math.log(p)
    core = _stirling_error(n) - _stirling_error(k) - _stirling_error(n - k)
    core -= _deviance(k, n * p) + _deviance(n - k, n * (1 - p))
    return core + 0.5 * math.log(n / (2 * math.pi * k * (n - k)))


def _from_here_down(k: int, n: int, p: float) -> float:
    """P(X <= k) as the term at k times the sum of the ratios of the smaller ones; for k below the mean."""
    total = 1.0
    ratio = 1.0
    top = k
    while top > 0:
        i = np.arange(top, max(top - 4096, 0), -1, dtype=np.float64)
        ratios = ratio * np.cumprod(i / (n - i + 1) * ((1 - p) / p))
        total += float(ratios.sum())
        ratio, top = float(ratios[-1]), top - len(i)
        if ratio < 1e-18 * total:
            break
    return math.exp(binomial_log_pmf(k, n, p)) * total


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(X <= k) for X ~ Binomial(n, p): exact, a sum of its terms from the largest one on.

    Args:
        k: successes; below 0 gives 0, from n on 1.
        n: trials, at least 0.
        p: within [0, 1].

    Raises:
        ValueError: ``n`` or ``p`` is out of its range.
    """
    if n < 0 or not 0 <= p <= 1:
        raise ValueError(f"binomial_cdf: n must be >= 0 and p within [0, 1], got {n} and {p}")
    if k < 0:
        return 0.0
    if k >= n or p == 0:
        return 1.0
    if p == 1:
        return 0.0
    if k <= n * p:
        return min(1.0, _from_here_down(k, n, p))
    return max(0.0, 1.0 - _from_here_down(n - k - 1, n, 1 - p))


def binomial_upper(k: int, n: int, delta: float) -> float:
    """Upper confidence bound of a probability after k of n: C. J. Clopper and E. S. Pearson (Biometrika 1934).

    The p at which P(X <= k) = delta; 1 without trials.
    """
    if not 0 < delta < 1 or not 0 <= k <= n:
        raise ValueError(f"binomial_upper: k must be within 0..n and delta within (0, 1), got {k}, {n} and {delta}")
    if k == n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if binomial_cdf(k, n, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def hoeffding_bentkus(mean: float, n: int, epsilon: float) -> float:
    """P-value for "the mean of a loss in [0, 1] is above epsilon": the smaller one of Hoeffding's and Bentkus' bounds.

    A. N. Angelopoulos, S. Bates, E. J. Candes, M. I. Jordan, L. Lei, "Learn then Test" (2021).

    Args:
        mean: of the losses.
        n: how many, at least 1.
        epsilon: within (0, 1).
    """
    if n < 1 or not 0 <= mean <= 1 or not 0 < epsilon < 1:
        raise ValueError(
            "hoeffding_bentkus: n must be >= 1, mean within [0, 1] and epsilon within (0, 1), "
            f"got {n}, {mean} and {epsilon}"
        )
    a = min(mean, epsilon)
    divergence = (1 - a) * math.log((1 - a) / (1 - epsilon)) + (a * math.log(a / epsilon) if a > 0 else 0.0)
    # A sum that is a whole number but for rounding is that number.
    successes = math.ceil(n * mean - 1e-9)
    return min(1.0, math.exp(-n * divergence), math.e * binomial_cdf(successes, n, epsilon))


def betting(values: ArrayLike, epsilon: float) -> NDArray[np.float64]:
    """P-values for "the mean of values in [0, 1] is above epsilon" by betting against it, one for each row.

    The capital of a gambler who stakes on small values grows as prod(1 - stake_i (x_i - epsilon)), each stake chosen
    from the values before; under the hypothesis it is a supermartingale, so 1 / max(capital) is a p-value (J. Ville).
    Stakes after those of I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting"
    (2024), capped at 3/4 of the stake that could ruin; for values with a small variance far stronger than Hoeffding's.

    Args:
        values: (M, n) or (n,), in an order that does not depend on them.
        epsilon: within (0, 1).

    Returns:
        (M,), or (1,) for a single row.
    """
    x = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if not 0 < epsilon < 1 or (x.size and not (x.min() >= 0 and x.max() <= 1)):
        raise ValueError(
            "betting: values must be within [0, 1] and epsilon within (0, 1), got "
            f"{x.min() if x.size else None}..{x.max() if x.size else None} and {epsilon}"
        )
    n = x.shape[1]
    if n == 0:
        return np.ones(len(x))
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(x, axis=1)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2, axis=1)) / (count + 1)
    # The stake at i may know only what came before i.
    known_variance = np.concatenate([np.full((len(x), 1), 0.25), variance[:, :-1]], axis=1)
    known_mean = np.concatenate([np.full((len(x), 1), 0.5), mean[:, :-1]], axis=1)
    # Kelly's stake for the evidence so far, but at least the predictable plug-in, which suits a fixed n.
    plug_in = np.sqrt(2 * math.log(10) / (n * known_variance))
    kelly = np.clip((epsilon - known_mean) / (known_variance + (epsilon - known_mean) ** 2), 0.0, None)
    stake = np.minimum(np.maximum(plug_in, kelly), 0.75 / (1 - epsilon))
    capital = np.cumsum(np.log1p(-stake * (x - epsilon)), axis=1)
    return np.minimum(1.0, np.exp(-np.maximum(capital.max(axis=1), 0.0)))
