"""How good an exit's probabilities are: ECE, NLL, Brier, and whether they tell right answers from wrong ones.

A lower ECE alone does not make a better exit: a network that always answers with its mean accuracy has ECE 0 and cannot
be gated at all. What a gate needs is the order of the confidences, which the failure-prediction AUROC measures (and
which a temperature hardly changes).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from aep_ext.calibration.cached_logits import check_labels
from aep_ext.calibration.temperature import criterion_logits
from aep_ext.inference.exit_policy import ExitPolicy


@dataclass(frozen=True)
class ExitMetrics:
    """Quality of one exit's probabilities. NaN where a number does not exist.

    Attributes:
        accuracy: fraction right at top-1; a row that holds a NaN is wrong. A row without softmax is left out elsewhere.
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
    correct = (logits.argmax(dim=1) == target) & ~logits.isnan().any(dim=1)
    valid = ~(logits - logits.amax(dim=1, keepdim=True)).isnan().any(dim=1)
    log_p = torch.log_softmax(logits[valid].double() / temperature, dim=1)
    p, own = log_p.exp(), log_p.gather(1, target[valid][:, None])[:, 0]
    confidence = p.amax(dim=1)
    return ExitMetrics(
        accuracy=float(correct.double().mean()),
        ece=expected_calibration_error(confidence, correct[valid]),
        nll=float(-own.mean()),
        brier=float((p.square().sum(dim=1) - 2 * own.exp() + 1).mean()),
        auroc=failure_auroc(confidence, correct[valid]),
    )


def exit_metrics(exit_logits: Tensor, target: Tensor, policy: ExitPolicy) -> tuple[ExitMetrics, ...]:
    """The metrics of every exit as the policy sees it: ``softmax(R_e / T_e)``, or ``softmax(O_e / T_e)`` where its
    criterion is taken on the exit. ``dataclasses.replace(policy, temperatures=1.0)``: before temperatures.

    Args:
        exit_logits: (E, N, K) floating, of the policy's exits; N at least 1.
        target: (N,) int64 within 0..K-1.

    Raises:
        ValueError: a shape does not fit.
    """
    if exit_logits.dim() != 3 or exit_logits.shape[0] != policy.num_exits or not exit_logits.shape[1]:
        raise ValueError(
            f"exit_metrics: exit_logits must have shape [{policy.num_exits}, N, K] with N at least 1, "
            f"got {list(exit_logits.shape)}"
        )
    check_labels("exit_metrics", target, *exit_logits.shape[1:])
    parts = criterion_logits(exit_logits, policy.output_weights, policy.criterion_on)
    if policy.last_alone:
        parts = torch.cat([parts[:-1], exit_logits[-1:]])
    return tuple(
        probability_metrics(part, target, scale) for part, scale in zip(parts, policy.temperatures, strict=True)
    )
