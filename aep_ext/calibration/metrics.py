"""How good an exit's probabilities are: ECE, NLL, Brier, and whether they tell right answers from wrong ones.

A lower ECE alone does not make a better exit: a network that always answers with its mean accuracy has ECE 0 and
cannot be gated at all. What a gate needs is the order of the confidences, which the failure-prediction AUROC measures
(and which a temperature hardly changes).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.temperature import check_labelled, judged_logits

_ROWS = 8192


@dataclass(frozen=True)
class ExitMetrics:
    """Quality of one exit's probabilities.

    Attributes:
        accuracy: fraction right at top-1; a row that holds a NaN is wrong.
        ece: expected calibration error, equal-width bins, as a fraction of 1.
        ece_mass: the same with bins of equal counts.
        nll: mean negative log-likelihood in nats.
        brier: mean over the samples of the squared distance between probabilities and label, within 0..2.
        auroc: probability that a right answer is more confident than a wrong one, ties counted half; NaN where all
            answers are right, or all wrong.
        confidence: mean of the largest probability.
        n: samples.
        invalid: rows without probabilities (NaN), left out of everything but the accuracy.
    """

    accuracy: float
    ece: float
    ece_mass: float
    nll: float
    brier: float
    auroc: float
    confidence: float
    n: int
    invalid: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; None where a number does not exist."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def expected_calibration_error(
    confidence: Tensor | NDArray[np.floating],
    correct: Tensor | NDArray[np.bool_],
    *,
    bins: int = 15,
    scheme: str = "width",
) -> float:
    """ECE: over the bins, the distance between mean confidence and accuracy, weighted by the bin's share of samples.

    "width" is Guo et al.'s (2017): ``bins`` intervals ((b-1)/bins, b/bins], 0 itself in the first. "mass": bins of
    equal counts by rising confidence (A. Nixon et al., "Measuring calibration in deep learning", 2019); samples of
    equal confidence stand for one another, so the order of the samples does not matter.

    Args:
        confidence: (N,) within 0..1.
        correct: (N,) bool.

    Returns:
        A fraction of 1; NaN without samples.

    Raises:
        ValueError: a shape, the number of bins or the scheme breaks the rules.
    """
    sure, right = _pair("expected_calibration_error", confidence, correct)
    if len(sure) and not 0 <= sure.min() <= sure.max() <= 1 + 1e-6:
        raise ValueError(
            f"expected_calibration_error: confidence must be within 0..1, got {sure.min():g}..{sure.max():g}"
        )
    if bins < 1:
        raise ValueError(f"expected_calibration_error: bins must be at least 1, got {bins}")
    if scheme not in ("width", "mass"):
        raise ValueError(f"expected_calibration_error: scheme must be 'width' or 'mass', got {scheme!r}")
    if not len(sure):
        return math.nan
    if scheme == "width":
        index = np.searchsorted(np.arange(1, bins) / bins, sure, side="left")
        gaps = np.bincount(index, weights=right, minlength=bins) - np.bincount(index, weights=sure, minlength=bins)
        return float(np.abs(gaps).sum() / len(sure))
    order = np.argsort(sure, kind="stable")
    sure, right = sure[order], right[order]
    _, group, size = np.unique(sure, return_inverse=True, return_counts=True)
    right = (np.bincount(group, weights=right) / size)[group]
    parts = np.array_split(right - sure, bins)
    return float(sum(abs(part.sum()) for part in parts) / len(sure))


def failure_auroc(confidence: Tensor | NDArray[np.floating], correct: Tensor | NDArray[np.bool_]) -> float:
    """Probability that a right answer is more confident than a wrong one, ties counted half (Mann and Whitney).

    Args:
        confidence: (N,).
        correct: (N,) bool.

    Returns:
        Within 0..1; NaN where there is no right or no wrong answer.
    """
    sure, right = _pair("failure_auroc", confidence, correct)
    positives, negatives = float(right.sum()), float(len(right) - right.sum())
    if not positives or not negatives:
        return math.nan
    _, group, size = np.unique(sure, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(size) - (size - 1) / 2  # from 1; equal values share the mean of their ranks
    return float((middle_rank[group][right > 0].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _pair(function: str, confidence: Any, correct: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sure = np.asarray(torch.as_tensor(confidence).detach().cpu(), dtype=np.float64)
    right = np.asarray(torch.as_tensor(correct).detach().cpu())
    if sure.ndim != 1 or right.shape != sure.shape:
        raise ValueError(
            f"{function}: confidence and correct must have the same shape [N], "
            f"got {list(sure.shape)} and {list(right.shape)}"
        )
    if np.isnan(sure).any():
        raise ValueError(f"{function}: confidence must not be NaN, got NaN at position {int(np.isnan(sure).argmax())}")
    if not np.isin(right, (0, 1)).all():
        raise ValueError(f"{function}: correct must be bool (or 0 and 1), got {right.min()}..{right.max()}")
    return sure, right.astype(np.float64)


def probability_metrics(logits: Tensor, target: Tensor, temperature: float = 1.0, *, bins: int = 15) -> ExitMetrics:
    """The metrics of ``softmax(logits / temperature)``, computed in float64.

    Args:
        logits: (N, K) floating.
        target: (N,) int64 within 0..K-1.
        temperature: positive.
        bins: of both ECEs.

    Raises:
        ValueError: a shape, a label or the temperature breaks these rules.
    """
    check_labelled("probability_metrics", logits, target)
    if not 0 < temperature < math.inf:
        raise ValueError(f"probability_metrics: temperature must be positive and finite, got {temperature}")
    n = len(target)
    answer = logits.argmax(dim=1)
    right = (answer == target) & ~logits.isnan().any(dim=1)
    sure, losses, squares = [], [], []
    for rows, labels in zip(logits.split(_ROWS), target.split(_ROWS), strict=True):
        log_p = torch.log_softmax(rows.double() / temperature, dim=1)
        p = log_p.exp()
        own = labels[:, None]
        sure.append(p.amax(dim=1))
        losses.append(-log_p.gather(1, own)[:, 0])
        squares.append(p.square().sum(dim=1) - 2 * p.gather(1, own)[:, 0] + 1)
    if not n:
        return ExitMetrics(*[math.nan] * 7, n=0, invalid=0)
    confidence = torch.cat(sure)
    valid = ~confidence.isnan()
    known, hits = confidence[valid], right[valid]
    if not len(known):
        return ExitMetrics(0.0, *[math.nan] * 6, n=n, invalid=n)
    return ExitMetrics(
        accuracy=float(right.sum()) / n,
        ece=expected_calibration_error(known, hits, bins=bins),
        ece_mass=expected_calibration_error(known, hits, bins=bins, scheme="mass"),
        nll=float(torch.cat(losses)[valid].mean()),
        brier=float(torch.cat(squares)[valid].mean()),
        auroc=failure_auroc(known, hits),
        confidence=float(known.mean()),
        n=n,
        invalid=n - len(known),
    )


def exit_metrics(
    cache: ExitCache, temperatures: Sequence[float] | Tensor | float = 1.0, *, on: str = "ensemble", bins: int = 15
) -> tuple[ExitMetrics, ...]:
    """The metrics of every exit: of its normalised prefix ensemble, or with ``on="exit"`` of its own logits.

    Args:
        temperatures: E positive numbers, or one for all (1.0: before calibration).

    Raises:
        ValueError: the number of temperatures, or as :func:`probability_metrics`.
    """
    values = temperatures.tolist() if isinstance(temperatures, Tensor) else temperatures
    scales = [float(values)] * cache.num_exits if isinstance(values, numbers.Real) else [float(v) for v in values]
    if len(scales) != cache.num_exits:
        raise ValueError(f"exit_metrics: temperatures must have {cache.num_exits} entries, got {len(scales)}")
    return tuple(
        probability_metrics(logits, cache.target, scale, bins=bins)
        for logits, scale in zip(judged_logits(cache, on), scales, strict=True)
    )
