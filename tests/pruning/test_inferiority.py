from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aep_ext.pruning import NonInferiority, non_inferior, score_logits, smallest_non_inferior


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
    verdict = non_inferior(*_answers(*table), margin=0.1)
    assert verdict.low == pytest.approx(low, abs=5e-4)
    assert verdict.high == pytest.approx(high, abs=5e-4)


def test_wald_interval_by_hand():
    verdict = non_inferior(*_answers(50, 10, 5, 35), margin=0.05, method="wald")
    half = 1.959964 * math.sqrt((0.15 - 0.05**2) / 100)
    assert verdict.low == pytest.approx(0.05 - half, abs=1e-6) and verdict.high == pytest.approx(0.05 + half, abs=1e-6)
    assert verdict and verdict.only_a == 10 and verdict.only_b == 5 and verdict.n == 100


counts = st.integers(0, 30)


@given(st.tuples(counts, counts, counts, counts).filter(sum), st.sampled_from(["newcombe", "wald"]))
def test_an_interval_holds_the_estimate_and_mirrors(table, method):
    a, b = _answers(*table)
    verdict = non_inferior(a, b, 0.02, method=method)
    mirrored = non_inferior(b, a, 0.02, method=method)
    assert -1 <= verdict.low <= verdict.difference + 1e-12 and verdict.difference - 1e-12 <= verdict.high <= 1
    assert mirrored.low == pytest.approx(-verdict.high, abs=1e-12)
    assert mirrored.high == pytest.approx(-verdict.low, abs=1e-12)
    wider = non_inferior(a, b, 0.02, confidence=0.99, method=method)
    assert wider.low <= verdict.low and verdict.high <= wider.high
    assert bool(verdict) == verdict.non_inferior == (verdict.low > -0.02)
    assert verdict.to_dict()["non_inferior"] is verdict.non_inferior


def test_not_significant_is_not_enough():
    # 20 samples, one difference: far from significant, yet the interval does not exclude a loss of five points.
    assert not non_inferior(*_answers(15, 0, 1, 4), margin=0.05)
    assert non_inferior(*_answers(1500, 5, 6, 400), margin=0.01)


def test_the_smallest_subset_inside_the_margin():
    target = torch.zeros(400, dtype=torch.int64)
    logits = torch.zeros(3, 400, 2)
    for e, wrong in enumerate((40, 3, 2)):  # exit e errs on the first so many
        logits[e, :, 0] = 1
        logits[e, :wrong] = torch.tensor([0.0, 1.0])
    scores = score_logits(logits, [0.2, 0.3, 0.5], target, keep_correct=True)
    score, verdict = smallest_non_inferior(scores, scores.correct[-1], margin=0.02)
    assert score.exits == (1,) and isinstance(verdict, NonInferiority) and verdict.low > -0.02
    assert smallest_non_inferior(scores, torch.ones(400, dtype=torch.bool), margin=1e-4) is None
    with pytest.raises(ValueError, match="keep_correct=True"):
        smallest_non_inferior(score_logits(logits, [0.2, 0.3, 0.5], target), scores.correct[-1], 0.02)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([True], [True, False], 0.1), {}, "same length, at least 1, got 1 and 2"),
        ((torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool), 0.1), {}, "at least 1, got 0 and 0"),
        (([1.0], [True], 0.1), {}, "correct_a must be a bool tensor"),
        (([True], [[True]], 0.1), {}, "correct_b must be a bool tensor"),
        (([True], [True], 0.0), {}, "margin must be positive, got 0.0"),
        (([True], [True], math.nan), {}, "margin must be positive, got nan"),
        (([True], [True], 0.1), {"confidence": 1.0}, r"within \(0, 1\), got 1.0"),
        (([True], [True], 0.1), {"method": "exact"}, "'newcombe' or 'wald', got 'exact'"),
    ],
)
def test_bad_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        non_inferior(*arguments, **options)
