"""Risk control: how far along a fixed path one may go with a finite-sample guarantee.

Both procedures hold for any network, any data distribution and any sample size, if the calibration data are independent
draws of the distribution that is met later, and if the path was fixed without looking at them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aep_ext.calibration.tails import betting, binomial_cdf, hoeffding_bentkus

P_VALUES = ("auto", "binomial", "hoeffding-bentkus", "betting")


@dataclass(frozen=True, eq=False)
class RiskTest:
    """How far a path may be followed.

    Attributes:
        accepted: how many steps from the start hold; 0: none does.
        tested: how many were looked at.
        p_values: (tested,) of learn-then-test; for conformal risk control the corrected mean losses.
        mean: (M,) mean loss at every step.
        method: which p-value, or "crc".
    """

    accepted: int
    tested: int
    p_values: NDArray[np.float64]
    mean: NDArray[np.float64]
    method: str


def _losses(function: str, losses: ArrayLike, lowest: float) -> NDArray[np.floating]:
    x = np.asarray(losses)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"{function}: losses must have shape [M, N] with both at least 1, got {list(x.shape)}")
    if not (x.min() >= lowest and x.max() <= 1):
        raise ValueError(f"{function}: losses must be within [{lowest:g}, 1], got {x.min()}..{x.max()}")
    return x


def learn_then_test(
    losses: ArrayLike, epsilon: float, delta: float, *, p_value: str = "auto", seed: int = 0
) -> RiskTest:
    """Fixed-sequence testing: with probability 1 - delta every accepted step has a risk of at most epsilon.

    The risk is the expected loss.

    Step after step, "the risk is above epsilon" is tested at level delta; the first step for which it cannot be
    rejected ends the sequence. A false rejection needs the first step that is really too risky to be rejected, which
    happens with probability delta at most, however many steps there are. A. N. Angelopoulos, S. Bates, E. J. Candes,
    M. I. Jordan, L. Lei, "Learn then Test: calibrating predictive algorithms to achieve risk control" (2021); for
    early exits M. Jazbec et al., "Fast yet safe: early-exiting with risk control" (2024).

    Args:
        losses: (M, N) the loss of each sample at each step, within [-1, 1]; the path careful first.
        epsilon, delta: within (0, 1).
        p_value: "binomial": exact, for losses of 0 and 1. "hoeffding-bentkus" and "betting": losses within [-1, 1]
            (scaled to [0, 1] where one is negative). "auto": binomial where that applies, else betting.
        seed: "betting" reads the samples one by one, and data in an order that has to do with their losses (class by
            class, say) would deceive it; so they are shuffled, all steps alike, with this seed.

    Raises:
        ValueError: losses or numbers are out of their range, or the p-value does not suit the losses.
    """
    x = _losses("learn_then_test", losses, -1)
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise ValueError(f"learn_then_test: epsilon and delta must be within (0, 1), got {epsilon} and {delta}")
    if p_value not in P_VALUES:
        raise ValueError(f"learn_then_test: p_value must be one of {', '.join(P_VALUES)}, got {p_value!r}")
    binary = bool(((x == 0) | (x == 1)).all())
    if p_value == "binomial" and not binary:
        raise ValueError("learn_then_test: losses must be 0 or 1 for p_value 'binomial', got others")
    method = ("binomial" if binary else "betting") if p_value == "auto" else p_value
    mean, n = x.mean(axis=1, dtype=np.float64), x.shape[1]
    signed = bool(x.min() < 0)
    found: list[float] = []
    if method == "betting":
        x = x[:, np.random.default_rng(seed).permutation(n)]
    for row in x:
        if method == "binomial":
            p = binomial_cdf(int(row.sum(dtype=np.int64)), n, epsilon)
        else:
            scaled, limit = ((row + 1.0) / 2, (epsilon + 1) / 2) if signed else (row.astype(np.float64), epsilon)
            p = (
                float(betting(scaled, limit)[0])
                if method == "betting"
                else hoeffding_bentkus(float(scaled.mean()), n, limit)
            )
        found.append(p)
        if p > delta:
            break
    accepted = len(found) - (found[-1] > delta)
    return RiskTest(accepted, len(found), np.array(found), mean, method)


def conformal_risk_control(losses: ArrayLike, epsilon: float) -> RiskTest:
    """The boldest step whose risk is at most epsilon in expectation, over calibration and later data together.

    For losses within [0, 1] that never fall along the path, step i holds where (sum of the losses + 1) / (N + 1) is at
    most epsilon.
    A. N. Angelopoulos, S. Bates, A. Fisch, L. Lei, T. Schuster, "Conformal risk control" (2022), theorem 1. The loss
    of an early exit need not be monotone (a bolder threshold may catch a right answer that a later exit loses), so
    each sample's loss is replaced by its largest one up to that step, which is monotone and at least the loss itself.

    Args:
        losses: (M, N) within [0, 1]; the path careful first.
        epsilon: within (0, 1).

    Raises:
        ValueError: losses or epsilon are out of their range.
    """
    x = _losses("conformal_risk_control", losses, 0)
    if not 0 < epsilon < 1:
        raise ValueError(f"conformal_risk_control: epsilon must be within (0, 1), got {epsilon}")
    largest = np.maximum.accumulate(x, axis=0)
    n = x.shape[1]
    corrected = (largest.sum(axis=1, dtype=np.float64) + 1) / (n + 1)
    # Non-descending, so the steps that hold are the first ones.
    accepted = int(np.searchsorted(corrected, epsilon, side="right"))
    return RiskTest(accepted, len(x), corrected, x.mean(axis=1, dtype=np.float64), "crc")
