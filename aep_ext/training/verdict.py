"""The run's calls of :mod:`aep_ext.pruning.non_inferiority`, with the verdict as plain values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from aep_ext.pruning import SubsetScore, SubsetScores, non_inferiority_test, smallest_non_inferior


def paired_verdict(a: Tensor, b: Tensor, margin: float, confidence: float = 0.95) -> dict[str, Any]:
    """:func:`non_inferiority_test` of (S, N) answers, as plain values."""
    return non_inferiority_test(a, b, margin, confidence).to_dict()


def smallest_within_margin(
    scores: list[SubsetScores], baseline: Tensor, margin: float
) -> tuple[SubsetScore, dict[str, Any]] | None:
    """:func:`smallest_non_inferior` of several seeds, the test as plain values."""
    found = smallest_non_inferior(scores, baseline, margin)
    return None if found is None else (found[0], found[1].to_dict())
