"""The paired verdict over several seeds, and the smallest subset inside the margin."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext.pruning import SubsetCosts, non_inferior, score_logits
from aep_ext.training.verdict import paired_verdict, pooled, smallest_within_margin


def test_one_seed_is_newcombe_s_interval_at_least() -> None:
    a, b = torch.rand(1, 500) < 0.9, torch.rand(1, 500) < 0.9
    verdict, single = paired_verdict(a, b, 0.05), non_inferior(a[0], b[0], 0.05)
    assert verdict["difference"] == pytest.approx(single.difference)
    assert verdict["low"] <= single.low and verdict["high"] >= single.high
    assert (verdict["only_a"], verdict["only_b"]) == (single.only_a, single.only_b)


def test_seeds_that_share_their_errors_count_once() -> None:
    one = (torch.rand(400) < 0.9, torch.rand(400) < 0.9)
    repeated = [side.expand(9, 400).clone() for side in one]
    verdict = paired_verdict(*repeated, 0.01)
    differences = one[0].double() - one[1].double()
    half = 1.96 * float(differences.std()) / math.sqrt(400)
    assert verdict["high"] - verdict["low"] == pytest.approx(2 * half, rel=0.01)
    naive = non_inferior(repeated[0].flatten(), repeated[1].flatten(), 0.01)
    assert naive.high - naive.low < 0.5 * (verdict["high"] - verdict["low"])


@pytest.mark.parametrize(("wrong", "expected"), [(0, True), (30, False)])
def test_margin(wrong: int, expected: bool) -> None:
    b = torch.ones(2, 1000, dtype=torch.bool)
    a = b.clone()
    a[:, :wrong] = False
    verdict = paired_verdict(a, b, 0.01)
    assert verdict["non_inferior"] is expected and verdict["low"] <= verdict["difference"] == -wrong / 1000
    assert (verdict["seeds"], verdict["samples"], verdict["margin"]) == (2, 1000, 0.01)


@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    b = torch.ones(2, 4, dtype=torch.bool) if shape != (2, 0) else torch.ones(2, 0, dtype=torch.bool)
    with pytest.raises(ValueError, match="paired_verdict: a and b must have the same shape"):
        paired_verdict(torch.ones(shape, dtype=torch.bool), b, 0.01)


def _scores(right: list[float]) -> object:
    """Two exits, right on the given shares of 2,000 samples."""
    target = torch.zeros(2000, dtype=torch.int64)
    logits = torch.zeros(2, 2000, 3)
    for exit_, share in enumerate(right):
        logits[exit_, : int(2000 * share), 0] = 1
        logits[exit_, int(2000 * share) :, 1] = 1
    return score_logits(logits, [0.4, 0.6], target, costs=SubsetCosts((5, 7, 8), (10, 20, 21)), keep_correct=True)


def test_the_smallest_subset_within_the_margin() -> None:
    scores = [_scores([0.80, 0.9]), _scores([0.81, 0.9])]
    assert pooled(scores).n == 4000 and pooled(scores)[(1,)].correct1 == 3600
    baseline = torch.stack([score.correct[1] for score in scores])
    score, verdict = smallest_within_margin(scores, baseline, 0.01)
    assert score.exits == (1,) and verdict["difference"] == 0 and verdict["non_inferior"]
    assert smallest_within_margin(scores, baseline, 0.5)[0].exits == (0,)
    assert smallest_within_margin(scores, torch.ones_like(baseline), 0.01) is None
