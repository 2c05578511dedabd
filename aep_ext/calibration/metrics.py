"""How good an exit's probabilities are: ECE, NLL, Brier, and whether they tell right answers from wrong ones.

A lower ECE alone does not make a better exit: a network that always answers with its mean accuracy has ECE 0 and cannot
be gated at all. What a gate needs is the order of the confidences, which the failure-prediction AUROC measures (and
which a temperature hardly changes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from aep_ext._utils import per_exit
from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.calibration.temperature import prefix_ensembles

_CHUNK = 1 << 21


@dataclass(frozen=True)
class ExitMetrics:
    """Quality of one exit's probabilities. NaN where a number does not exist.

    Attributes:
        accuracy: fraction right at top-1; a row that holds a NaN is wrong, and is left out of all else.
        ece: expected calibration error, 15 equal-width bins, as a fraction of 1.
        nll: mean negative log-likelihood in nats.
        brier: mean squared distance between probabilities and label, within 0..2.
        auroc: see :func:`failure_auroc`.
    """

    accuracy: float
    ece: float
    nll: float
    brier: float
    auroc: float

    def to_dict(self) -> dict[str, float | None]:
        """As plain values for JSON; None where a number does not exist."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Over the bins ((b-1)/bins, b/bins], the distance between mean confidence and accuracy, weighted by the bin's
    share of samples (Guo et al. 2017). 0 itself is in the first bin.

    Args:
        confidence: (N,) within 0..1.
        correct: (N,) bool.

    Returns:
        A fraction of 1; NaN without samples.
    """
    if not len(confidence):
        return math.nan
    confidence = confidence.double()
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    gaps = torch.bincount(torch.bucketize(confidence, edges), weights=confidence - correct.double(), minlength=bins)
    return float(gaps.abs().sum()) / len(confidence)


def failure_auroc(confidence: Tensor, correct: Tensor) -> float:
    """Probability that a right answer is more confident than a wrong one, ties counted half (Mann and Whitney).

    Args:
        confidence: (N,).
        correct: (N,) bool.

    Returns:
        Within 0..1; NaN where there is no right or no wrong answer.
    """
    right = int(correct.sum())
    wrong = len(correct) - right
    if not right or not wrong:
        return math.nan
    _, group, size = torch.unique(confidence, return_inverse=True, return_counts=True)
    middle_rank = size.cumsum(0) - (size - 1) / 2  # from 1; equal values share the mean of their ranks
    total = float(middle_rank[group][correct].double().sum())
    return (total - right * (right + 1) / 2) / (right * wrong)


def probability_metrics(logits: Tensor, target: Tensor, temperature: float = 1.0) -> ExitMetrics:
    """The metrics of ``softmax(logits / temperature)``, in float64.

    Args:
        logits: (N, K) floating, N at least 1.
        target: (N,) int64 within 0..K-1.
    """
    valid = ~logits.isnan().any(dim=1)
    correct = (logits.argmax(dim=1) == target) & valid
    confidence, nll, squares = [], 0.0, 0.0
    rows = max(1, _CHUNK // logits.shape[1])
    for part, labels in zip(logits[valid].split(rows), target[valid].split(rows), strict=True):
        log_p = torch.log_softmax(part.double() / temperature, dim=1)
        p, own = log_p.exp(), log_p.gather(1, labels[:, None])[:, 0]
        confidence.append(p.amax(dim=1))
        nll -= float(own.sum())
        squares += float((p.square().sum(dim=1) - 2 * own.exp() + 1).sum())
    known, n = torch.cat(confidence), int(valid.sum()) or math.nan
    return ExitMetrics(
        accuracy=float(correct.sum()) / len(target),
        ece=expected_calibration_error(known, correct[valid]),
        nll=nll / n,
        brier=squares / n,
        auroc=failure_auroc(known, correct[valid]),
    )


def exit_metrics(
    logits: CachedLogits,
    output_weights: Sequence[float] | Tensor,
    temperatures: Sequence[float] | Tensor | float = 1.0,
    *,
    criterion_on: str = "ensemble",
) -> tuple[ExitMetrics, ...]:
    """The metrics of every exit: of its normalised prefix ensemble, or with ``criterion_on="exit"`` of its own logits.

    Args:
        logits: at least one sample.
        output_weights: E positive numbers.
        temperatures: E positive numbers, or one for all (1.0: before calibration).

    Raises:
        ValueError: a number of weights or temperatures does not fit, or there is no sample.
    """
    if not len(logits):
        raise ValueError("exit_metrics: logits must hold at least one sample, got none")
    scales = per_exit("exit_metrics", "temperatures", temperatures, logits.num_exits, positive=True)
    judged = prefix_ensembles(logits, output_weights, criterion_on)
    return tuple(probability_metrics(part, logits.target, scale) for part, scale in zip(judged, scales, strict=True))
