"""Is a smaller network not worse? Paired non-inferiority test of two classifiers on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NonInferiority:
    """Accuracy of a minus accuracy of b on the same samples, with its paired interval, as fractions of 1.

    Attributes:
        difference: the estimate.
        low, high: the two-sided interval at ``confidence``.
        margin: how much worse a may be.
        confidence: of the interval.
        seeds: trained networks of each kind.
        samples: images that each was asked.
        only_a, only_b: pairs (seed, image) that a alone, b alone gets right.
    """

    difference: float
    low: float
    high: float
    margin: float
    confidence: float
    seeds: int
    samples: int
    only_a: int
    only_b: int

    @property
    def p_value(self) -> float:
        """McNemar's exact test that both are right equally often (two-sided), on the pairs where one alone is."""
        from scipy.stats import binomtest

        pairs = self.only_a + self.only_b
        return float(binomtest(self.only_a, pairs).pvalue) if pairs else 1.0

    @property
    def non_inferior(self) -> bool:
        """True where the whole interval lies above minus the margin."""
        return self.low > -self.margin

    def __bool__(self) -> bool:
        return self.non_inferior

    def to_dict(self) -> dict[str, float | int | bool]:
        """As plain values, for JSON; with ``non_inferior`` and ``p_value``."""
        return {**asdict(self), "non_inferior": self.non_inferior, "p_value": self.p_value}


def _newcombe(both: int, only_a: int, only_b: int, neither: int, confidence: float) -> tuple[float, float]:
    """Newcombe's method 10: Wilson's limits of both proportions, combined with their correlation."""
    from scipy.stats import binomtest  # here, since it takes half a second to import

    n = both + only_a + only_b + neither
    p1, p2 = (both + only_a) / n, (both + only_b) / n
    low1, high1 = binomtest(both + only_a, n).proportion_ci(confidence, method="wilson")
    low2, high2 = binomtest(both + only_b, n).proportion_ci(confidence, method="wilson")
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covariance: float = both * neither - only_a * only_b
    if covariance > 0:  # his continuity correction
        covariance = max(covariance - n / 2, 0)
    phi = covariance / math.sqrt(product) if product else 0.0
    difference = (only_a - only_b) / n

    def spread(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return (max(-1.0, difference - spread(p1 - low1, high2 - p2)), min(1.0, difference + spread(high1 - p1, p2 - low2)))


def _over_images(a: Tensor, b: Tensor, confidence: float) -> tuple[float, float]:
    """Normal interval of the images' mean differences over the seeds, which share their images; (S, N) each."""
    from scipy.stats import norm

    differences = (a.double() - b.double()).mean(0)
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    low, high = (float(differences.mean()) + error * norm.ppf(0.5 + side * confidence / 2) for side in (-1, 1))
    return max(-1.0, float(low)), min(1.0, float(high))


def _as_correct(values: Tensor | Sequence[bool], name: str) -> Tensor:
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.dim() not in (1, 2) or tensor.dtype != torch.bool:
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"non_inferiority_test: {name} must be a bool tensor of shape [N] or [S, N], got {found}")
    return tensor


def non_inferiority_test(
    correct_a: Tensor | Sequence[bool], correct_b: Tensor | Sequence[bool], margin: float, confidence: float = 0.95
) -> NonInferiority:
    """Test whether classifier a is not worse than b by ``margin`` or more, by a paired interval on the same samples.

    a is non-inferior where the lower end of the two-sided interval of accuracy(a) - accuracy(b) lies above
    ``-margin``. The interval is method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between
    binomial proportions based on paired data", Statistics in Medicine 17 (1998) 2635-2650. Over S seeds it is taken
    over all S * N pairs, and so is a normal interval over the N images' mean differences, which knows that the seeds
    share their images; the wider end of each counts. Neither covers the choice of the data set's split.

    Args:
        correct_a: (N,) bool, whether a is right on each sample; or (S, N), for the networks of S seeds.
        correct_b: the same for b.
        margin: positive, a fraction of 1 (0.01 is one point).
        confidence: within (0, 1).

    Raises:
        ValueError: shapes differ, no sample, or a number out of range.
    """
    a, b = _as_correct(correct_a, "correct_a"), _as_correct(correct_b, "correct_b")
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(
            "non_inferiority_test: correct_a and correct_b must have the same shape and at least one sample, "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"non_inferiority_test: margin must be positive, got {margin}")
    if not 0 < confidence < 1:
        raise ValueError(f"non_inferiority_test: confidence must be within (0, 1), got {confidence}")
    pairs = a.numel()
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    low, high = _newcombe(both, only_a, only_b, pairs - both - only_a - only_b, confidence)
    if a.dim() == 2:
        lower, higher = _over_images(a, b, confidence)
        low, high = min(low, lower), max(high, higher)
    return NonInferiority(
        difference=(only_a - only_b) / pairs,
        low=low,
        high=high,
        margin=float(margin),
        confidence=float(confidence),
        seeds=a.shape[0] if a.dim() == 2 else 1,
        samples=a.shape[-1],
        only_a=only_a,
        only_b=only_b,
    )
