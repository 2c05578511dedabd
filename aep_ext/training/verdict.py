"""Is one classifier not worse than another, over several seeds judged on the same images?"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from aep_ext.pruning import SubsetScore, SubsetScores, non_inferior


def paired_verdict(a: Tensor, b: Tensor, margin: float, confidence: float = 0.95) -> dict[str, Any]:
    """Accuracy of a minus accuracy of b, with an interval that knows that both were asked the same questions, and that
    every seed was.

    Args:
        a, b: (S, N) bool: whether the network of seed s is right on image n.
        margin: how much worse a may be, as a fraction of 1.

    Two intervals are taken and the wider end of each counts: Newcombe's over the S * N pairs
    (:func:`aep_ext.pruning.non_inferior`), which is honest where few pairs differ, and a normal one over the N images'
    mean differences, which knows that the seeds share their images. Neither covers the choice of the data set's split.

    Returns:
        Plain values: difference, low, high, margin, confidence, seeds, samples, only_a, only_b (pairs), non_inferior.
    """
    if a.shape != b.shape or a.dim() != 2 or a.numel() == 0:
        raise ValueError(
            f"paired_verdict: a and b must have the same shape [S, N], got {list(a.shape)} and {list(b.shape)}"
        )
    pairs = non_inferior(a.flatten(), b.flatten(), margin, confidence)
    images = (a.double() - b.double()).mean(0)
    spread = float(images.std()) if len(images) > 1 else 0.0
    half = statistics.NormalDist().inv_cdf(0.5 + confidence / 2) * spread / math.sqrt(len(images))
    low, high = min(pairs.low, pairs.difference - half), max(pairs.high, pairs.difference + half)
    return {
        "difference": pairs.difference,
        "low": low,
        "high": high,
        "margin": margin,
        "confidence": confidence,
        "seeds": a.shape[0],
        "samples": a.shape[1],
        "only_a": pairs.only_a,
        "only_b": pairs.only_b,
        "non_inferior": low > -margin,
    }


def pooled(scores: list[SubsetScores]) -> SubsetScores:
    """The scores of several seeds of one network as if they were one: counts added, answers side by side."""
    first = scores[0]
    counts = torch.stack([score.counts for score in scores]).sum(0)
    return SubsetScores(
        counts, sum(score.n for score in scores), first.exit_ids, parameters=first.parameters, macs=first.macs
    )


def smallest_within_margin(
    scores: list[SubsetScores], baseline: Tensor, margin: float
) -> tuple[SubsetScore, dict[str, Any]] | None:
    """The cheapest subset that is not worse than the baseline by ``margin``, over all seeds.

    Args:
        scores: of each seed, with its answers per sample (``keep_correct``).
        baseline: (S, N) bool, the baselines' answers on the same images.

    Returns:
        Its pooled score and its :func:`paired_verdict`, or None where no subset qualifies.
    """
    for score in pooled(scores).cheapest_first():
        answers = torch.stack([one.correct[score.mask - 1] for one in scores])
        verdict = paired_verdict(answers, baseline, margin)
        if verdict["non_inferior"]:
            return score, verdict
    return None
