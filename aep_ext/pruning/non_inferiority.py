"""Is a smaller network not worse? Paired non-inferiority of two classifiers on the same samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aep_ext.pruning.scores import SubsetScore, SubsetScores


@dataclass(frozen=True)
class NonInferiority:
    """Accuracy of a minus accuracy of b on the same samples, with its paired interval, as fractions of 1.

    Attributes:
        difference: the estimate.
        low, high: the two-sided interval at ``confidence``.
        margin: how much worse a may be.
        confidence: of the interval.
        n: samples.
        only_a, only_b: samples that a alone, b alone gets right.
        method: "newcombe" or "wald".
    """

    difference: float
    low: float
    high: float
    margin: float
    confidence: float
    n: int
    only_a: int
    only_b: int
    method: str

    @property
    def non_inferior(self) -> bool:
        """True where the whole interval lies above minus the margin."""
        return self.low > -self.margin

    def __bool__(self) -> bool:
        return self.non_inferior

    def to_dict(self) -> dict[str, float | int | bool | str]:
        """As plain values, for JSON."""
        return {
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
            "margin": self.margin,
            "confidence": self.confidence,
            "n": self.n,
            "only_a": self.only_a,
            "only_b": self.only_b,
            "method": self.method,
            "non_inferior": self.non_inferior,
        }


def _wilson(successes: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _newcombe(both: int, only_a: int, only_b: int, neither: int, z: float) -> tuple[float, float]:
    n = both + only_a + only_b + neither
    p1, p2 = (both + only_a) / n, (both + only_b) / n
    low1, high1 = _wilson(both + only_a, n, z)
    low2, high2 = _wilson(both + only_b, n, z)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance = both * neither - only_a * only_b
    if covariance > 0:  # the continuity correction of his method 10
        covariance = max(covariance - n / 2, 0)
    phi = covariance / math.sqrt(product) if product else 0.0
    difference = (only_a - only_b) / n

    def spread(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return (max(-1.0, difference - spread(p1 - low1, high2 - p2)), min(1.0, difference + spread(high1 - p1, p2 - low2)))


def _wald(only_a: int, only_b: int, n: int, z: float) -> tuple[float, float]:
    difference = (only_a - only_b) / n
    variance = (only_a + only_b) / n - difference * difference
    half = z * math.sqrt(max(variance, 0.0) / n)
    return max(-1.0, difference - half), min(1.0, difference + half)


def _as_correct(values: Tensor | Sequence[bool], name: str) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.dim() != 1 or tensor.dtype != torch.bool:
        raise ValueError(
            f"non_inferior: {name} must be a bool tensor with one dimension, "
            f"got {tensor.dtype} of shape {list(tensor.shape)}"
        )
    return tensor


def non_inferior(
    correct_a: Tensor | Sequence[bool],
    correct_b: Tensor | Sequence[bool],
    margin: float,
    confidence: float = 0.95,
    *,
    method: str = "newcombe",
) -> NonInferiority:
    """Is classifier a not worse than b by ``margin`` or more? Judged by a paired interval on the same samples.

    a is non-inferior where the lower end of the two-sided interval of accuracy(a) - accuracy(b) lies above
    ``-margin``. "newcombe" is method 10 of R. G. Newcombe, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", Statistics in Medicine 17 (1998) 2635-2650: Wilson's score
    limits of both proportions, combined with their correlation. "wald" is the textbook interval
    ``d +- z * sqrt((p10 + p01 - d^2) / n)``, too short where few samples differ.

    Args:
        correct_a: (N,) bool, whether a is right on each sample.
        correct_b: the same for b.
        margin: positive, a fraction of 1 (0.01 is one point).
        confidence: within (0, 1).

    Raises:
        ValueError: shapes differ, no sample, or a number out of range.
    """
    a, b = _as_correct(correct_a, "correct_a"), _as_correct(correct_b, "correct_b")
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(
            "non_inferior: correct_a and correct_b must have the same length, at least 1, "
            f"got {a.numel()} and {b.numel()}"
        )
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"non_inferior: margin must be positive, got {margin}")
    if not 0 < confidence < 1:
        raise ValueError(f"non_inferior: confidence must be within (0, 1), got {confidence}")
    if method not in ("newcombe", "wald"):
        raise ValueError(f"non_inferior: method must be 'newcombe' or 'wald', got {method!r}")
    n = a.numel()
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    if method == "newcombe":
        low, high = _newcombe(both, only_a, only_b, n - both - only_a - only_b, z)
    else:
        low, high = _wald(only_a, only_b, n, z)
    return NonInferiority((only_a - only_b) / n, low, high, float(margin), float(confidence), n, only_a, only_b, method)


def smallest_non_inferior(
    scores: SubsetScores, reference: Tensor | Sequence[bool], margin: float, confidence: float = 0.95
) -> tuple[SubsetScore, NonInferiority] | None:
    """The cheapest subset that is not worse than a reference by ``margin``, and the interval that says so.

    Cheapest: fewest multiply-adds, then fewest parameters, then most right answers. The interval is not corrected
    for the choice among the subsets: choose on one set of samples and confirm on another.

    Args:
        scores: of ``score_subsets(..., keep_correct=True)`` or ``score_logits(..., keep_correct=True)``.
        reference: (N,) bool, whether the reference is right on the same samples in the same order.

    Returns:
        None where no subset qualifies.

    Raises:
        ValueError: the scores were taken without ``keep_correct``.
    """
    if scores.correct is None:
        raise ValueError("smallest_non_inferior: scores must hold the answers per sample (keep_correct=True), got none")
    for score in scores.cheapest_first():
        verdict = non_inferior(scores.correct[score.mask - 1], reference, margin, confidence)
        if verdict:
            return score, verdict
    return None
