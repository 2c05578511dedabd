from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aep_ext.pruning import (
    NonInferiority,
    SubsetCosts,
    SubsetScores,
    non_inferiority_test,
    score_logits,
    smallest_non_inferior,
)


def _answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return torch.tensor(a), torch.tensor(b)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((12, 9, 2, 21), 0.0112, 0.2954),  # the worked example of Newcombe (1998)
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), table V
    ],
)
def test_newcombes_interval(table, low, high):
    result = non_inferiority_test(*_answers(*table), margin=0.1)
    assert result.low == pytest.approx(low, abs=5e-4)
    assert result.high == pytest.approx(high, abs=5e-4)


counts = st.integers(0, 30)


@given(st.tuples(counts, counts, counts, counts).filter(sum), st.booleans())
def test_an_interval_holds_the_estimate_and_mirrors(table, seeds):
    a, b = (side[None] if seeds else side for side in _answers(*table))
    result = non_inferiority_test(a, b, 0.02)
    mirrored = non_inferiority_test(b, a, 0.02)
    assert -1 <= result.low <= result.difference + 1e-12 and result.difference - 1e-12 <= result.high <= 1
    assert mirrored.low == pytest.approx(-result.high, abs=1e-12)
    assert mirrored.high == pytest.approx(-result.low, abs=1e-12)
    wider = non_inferiority_test(a, b, 0.02, confidence=0.99)
    assert wider.low <= result.low and result.high <= wider.high
    assert bool(result) == result.non_inferior == (result.low > -0.02)
    assert result.to_dict()["non_inferior"] is result.non_inferior
    assert (result.seeds, result.samples) == (1, sum(table)) and (result.only_a, result.only_b) == table[1:3]


def test_not_significant_is_not_enough():
    # 20 samples, one difference: far from significant, yet the interval does not exclude a loss of five points.
    assert not non_inferiority_test(*_answers(15, 0, 1, 4), margin=0.05)
    assert non_inferiority_test(*_answers(1500, 5, 6, 400), margin=0.01)


def test_the_smallest_subset_inside_the_margin():
    target = torch.zeros(400, dtype=torch.int64)
    logits = torch.zeros(3, 400, 2)
    for e, wrong in enumerate((40, 3, 2)):  # exit e errs on the first so many
        logits[e, :, 0] = 1
        logits[e, :wrong] = torch.tensor([0.0, 1.0])
    scores = score_logits(logits, [0.2, 0.3, 0.5], target, keep_correct=True)
    score, result = smallest_non_inferior(scores, scores.correct[-1], margin=0.02)
    assert score.exits == (1,) and isinstance(result, NonInferiority) and result.low > -0.02
    assert smallest_non_inferior(scores, torch.ones(400, dtype=torch.bool), margin=1e-4) is None
    with pytest.raises(ValueError, match="keep_correct=True"):
        smallest_non_inferior(score_logits(logits, [0.2, 0.3, 0.5], target), scores.correct[-1], 0.02)


def test_seeds_that_share_their_errors_count_once():
    one = (torch.rand(400) < 0.9, torch.rand(400) < 0.9)
    repeated = [side.expand(9, 400).clone() for side in one]
    result = non_inferiority_test(*repeated, 0.01)
    differences = one[0].double() - one[1].double()
    half = 1.959964 * float(differences.std()) / math.sqrt(400)
    assert result.high - result.low == pytest.approx(2 * half, rel=1e-5)
    pairs = non_inferiority_test(*(side.flatten() for side in repeated), 0.01)
    assert pairs.high - pairs.low < 0.5 * (result.high - result.low)
    assert (result.seeds, result.samples, result.only_a) == (9, 400, pairs.only_a)


@pytest.mark.parametrize(("wrong", "expected"), [(0, True), (30, False)])
def test_margin_over_seeds(wrong, expected):
    b = torch.ones(2, 1000, dtype=torch.bool)
    a = b.clone()
    a[:, :wrong] = False
    result = non_inferiority_test(a, b, 0.01)
    assert result.non_inferior is expected and result.low <= result.difference == -wrong / 1000
    assert (result.seeds, result.samples, result.margin) == (2, 1000, 0.01)


def _scores(right, costs=True):
    """Two exits, right on the given shares of 2,000 samples."""
    target = torch.zeros(2000, dtype=torch.int64)
    logits = torch.zeros(2, 2000, 3)
    for exit_index, share in enumerate(right):
        logits[exit_index, : int(2000 * share), 0] = 1
        logits[exit_index, int(2000 * share) :, 1] = 1
    given = SubsetCosts((5, 7, 8), (10, 20, 21)) if costs else None
    return score_logits(logits, [0.4, 0.6], target, costs=given, keep_correct=True)


def test_the_smallest_subset_over_several_seeds():
    scores = [_scores([0.80, 0.9]), _scores([0.81, 0.9])]
    pooled = SubsetScores.pooled(scores)
    assert pooled.n == 4000 and pooled[(1,)].correct1 == 3600 and pooled[(0,)].correct1 == 1600 + 1620
    baseline = torch.stack([score.correct[1] for score in scores])
    score, result = smallest_non_inferior(scores, baseline, 0.01)
    assert score.exits == (1,) and score.n == 4000 and result.difference == 0 and result.seeds == 2
    assert smallest_non_inferior(scores, baseline, 0.5)[0].exits == (0,)
    assert smallest_non_inferior(scores, torch.ones_like(baseline), 0.01) is None
    with pytest.raises(ValueError, match="pooled: scores must be of one network, got 2 that differ"):
        smallest_non_inferior([scores[0], _scores([0.8, 0.9], costs=False)], baseline, 0.01)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([True], [True, False], 0.1), {}, r"same shape and at least one sample, got \[1\] and \[2\]"),
        (([True], [[True]], 0.1), {}, r"same shape and at least one sample, got \[1\] and \[1, 1\]"),
        ((torch.zeros(2, 0, dtype=torch.bool),) * 2 + (0.1,), {}, r"at least one sample, got \[2, 0\] and \[2, 0\]"),
        (([1.0], [True], 0.1), {}, "correct_a must be a bool tensor"),
        (([True], [[[True]]], 0.1), {}, "correct_b must be a bool tensor"),
        (([True], [True], 0.0), {}, "margin must be positive, got 0.0"),
        (([True], [True], math.nan), {}, "margin must be positive, got nan"),
        (([True], [True], 0.1), {"confidence": 1.0}, r"within \(0, 1\), got 1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        non_inferiority_test(*arguments, **options)
