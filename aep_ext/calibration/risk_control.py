"""Risk control: how far along a fixed path one may go with a finite-sample guarantee.

Both procedures hold for any network, any data distribution and any sample size, if the calibration data are independent
draws of the distribution that is met later, and if the path was fixed without looking at them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def learn_then_test(losses: ArrayLike, epsilon: float, delta: float, *, seed: int = 0) -> int:
    """Fixed-sequence testing: with probability 1 - delta every accepted step has an expected loss of at most epsilon.

    Step after step, "the risk is above epsilon" is tested at level delta; the first step for which it cannot be
    rejected ends the sequence. A false rejection needs the first step that is really too risky to be rejected, which
    happens with probability delta at most, however many steps there are. A. N. Angelopoulos, S. Bates, E. J. Candes, M.
    I. Jordan, L. Lei, "Learn then Test: calibrating predictive algorithms to achieve risk control" (2021); for early
    exits M. Jazbec et al., "Fast yet safe: early-exiting with risk control" (2024).

    The p-values: for losses of 0 and 1 the binomial tail, which is exact; else :func:`betting_p_value`.

    Args:
        losses: (M, N) the loss of each sample at each step, within [-1, 1]; the path careful first.
        epsilon, delta: within (0, 1).
        seed: betting reads the samples one by one, and data in an order that has to do with their losses (class by
            class, say) would deceive it; so they are shuffled, all steps alike.

    Returns:
        How many steps from the start are accepted; 0: none is.
    """
    from scipy.stats import binom  # here, since it takes half a second to import

    x = np.asarray(losses)
    n = x.shape[1]
    binary = bool(((x == 0) | (x == 1)).all())
    order = np.random.default_rng(seed).permutation(n)
    for step, row in enumerate(x):
        if binary:
            p = binom.cdf(row.sum(), n, epsilon)
        else:  # from [-1, 1] to [0, 1]
            p = betting_p_value((row[order] + 1.0) / 2, (epsilon + 1) / 2)
        if p > delta:
            return step
    return len(x)


def betting_p_value(values: ArrayLike, epsilon: float) -> float:
    """A p-value for "the mean of values in [0, 1] is above epsilon", by betting against it.

    The capital of a gambler who stakes on small values grows as prod(1 - stake_i (x_i - epsilon)), each stake chosen
    from the values before; under the hypothesis it is a supermartingale, so 1 / max(capital) is a p-value (J. Ville).
    Stakes after those of I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting"
    (2024), capped at 3/4 of the stake that could ruin; for values with a small variance far stronger than Hoeffding's.

    Args:
        values: (N,) in an order that does not depend on them.
        epsilon: within (0, 1).
    """
    x = np.asarray(values, dtype=np.float64)
    n = len(x)
    if not n:
        return 1.0
    count = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(x)) / (count + 1)
    variance = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    # The stake at i may know only what came before i.
    mean, variance = np.append(0.5, mean[:-1]), np.append(0.25, variance[:-1])
    # Kelly's stake for the evidence so far, but at least the predictable plug-in, which suits a fixed n.
    plug_in = np.sqrt(2 * math.log(10) / (n * variance))
    kelly = np.clip((epsilon - mean) / (variance + (epsilon - mean) ** 2), 0.0, None)
    stake = np.minimum(np.maximum(plug_in, kelly), 0.75 / (1 - epsilon))
    capital = np.cumsum(np.log1p(-stake * (x - epsilon)))
    return float(np.exp(-max(capital.max(), 0.0)))


def conformal_risk_control(losses: ArrayLike, epsilon: float) -> int:
    """How many steps have an expected loss of at most epsilon, over calibration and later data together.

    For losses within [0, 1] that never fall along the path, step i holds where (sum of the losses + 1) / (N + 1) is at
    most epsilon. A. N. Angelopoulos, S. Bates, A. Fisch, L. Lei, T. Schuster, "Conformal risk control" (2022),
    theorem 1. The loss of an early exit need not be monotone (a bolder threshold may catch a right answer that a later
    exit loses), so each sample's loss is replaced by its largest one up to that step.

    Args:
        losses: (M, N) within [0, 1]; the path careful first.
        epsilon: within (0, 1).

    Returns:
        How many steps from the start hold.
    """
    x = np.asarray(losses)
    largest = np.maximum.accumulate(x, axis=0)
    corrected = (largest.sum(axis=1, dtype=np.float64) + 1) / (x.shape[1] + 1)
    return int(np.searchsorted(corrected, epsilon, side="right"))
