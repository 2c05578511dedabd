from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from aep_ext.termination import (
    exit_metrics,
    expected_calibration_error,
    failure_auroc,
    fit_temperature,
    fit_temperatures,
    probability_metrics,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_exits import cache_of, logits_and_labels

# Few distinct values, bin edges of 5 and 15 bins among them: ties are the rule.
confidences = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 1 / 3, 0.4, 0.6, 0.61, 0.8, 0.99, 1.0]), st.booleans()),
    min_size=1,
    max_size=30,
)


def by_hand_width(sure, right, bins):
    total = 0.0
    for b in range(bins):
        members = [i for i, c in enumerate(sure) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if members:
            gap = np.mean([right[i] for i in members]) - np.mean([sure[i] for i in members])
            total += len(members) / len(sure) * abs(gap)
    return total


@settings(deadline=None, max_examples=200)
@given(confidences, st.sampled_from([1, 5, 15]))
def test_ece_by_hand(rows, bins):
    sure, right = [c for c, _ in rows], [r for _, r in rows]
    found = expected_calibration_error(torch.tensor(sure, dtype=torch.float64), torch.tensor(right), bins=bins)
    assert found == pytest.approx(by_hand_width(sure, right, bins), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(confidences, st.randoms())
def test_no_metric_depends_on_the_order(rows, random):
    mixed = rows.copy()
    random.shuffle(mixed)
    pairs = [(np.array([c for c, _ in x]), np.array([r for _, r in x])) for x in (rows, mixed)]
    for scheme in ("width", "mass"):
        a, b = (expected_calibration_error(*pair, bins=4, scheme=scheme) for pair in pairs)
        assert a == pytest.approx(b, abs=1e-12)
    assert failure_auroc(*pairs[0]) == pytest.approx(failure_auroc(*pairs[1]), nan_ok=True)


@settings(deadline=None, max_examples=200)
@given(confidences)
def test_auroc_counts_pairs(rows):
    pairs = [(a, b) for a, right in rows if right for b, wrong in rows if not wrong]
    found = failure_auroc(np.array([c for c, _ in rows]), np.array([r for _, r in rows]))
    if not pairs:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


def test_equal_mass_bins():
    sure, right = np.array([0.1, 0.2, 0.3, 0.9, 0.95, 0.99]), np.array([0, 1, 0, 1, 1, 0], dtype=bool)
    expected = (abs(1 - 0.6) + abs(2 - 2.84)) / 6
    assert expected_calibration_error(sure, right, bins=2, scheme="mass") == pytest.approx(expected)
    each = expected_calibration_error(sure, right, bins=100, scheme="mass")
    assert each == pytest.approx(np.abs(right - sure).mean())


def test_against_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="a comparison with scikit-learn")
    logits, target = logits_and_labels(1, 500, classes=4)
    p = torch.softmax(logits[0].double() / 1.7, dim=1)
    found = probability_metrics(logits[0], target, 1.7)
    assert found.nll == pytest.approx(metrics.log_loss(target.numpy(), p.numpy()), rel=1e-9)
    right = (p.argmax(1) == target).numpy()
    assert found.auroc == pytest.approx(metrics.roc_auc_score(right, p.amax(1).numpy()), rel=1e-9)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(target.numpy(), p.argmax(1).numpy()))
    one_hot = torch.nn.functional.one_hot(target, 4).double()
    per_class = [metrics.brier_score_loss(one_hot[:, k].numpy(), p[:, k].numpy()) for k in range(4)]
    assert found.brier == pytest.approx(sum(per_class), rel=1e-9)
    assert found.confidence == pytest.approx(float(p.amax(1).mean()))
    assert found.ece == pytest.approx(by_hand_width(p.amax(1).tolist(), right.tolist(), 15))


def test_perfect_and_useless_probabilities():
    target = torch.tensor([0, 1, 2, 0])
    perfect = probability_metrics(200 * torch.nn.functional.one_hot(target, 3).float(), target)
    assert perfect.accuracy == 1 and perfect.brier == perfect.ece == 0 and math.isnan(perfect.auroc)
    useless = probability_metrics(torch.zeros(4, 3), target)
    assert useless.accuracy == 0.5 and useless.nll == pytest.approx(math.log(3))
    assert useless.brier == pytest.approx(2 / 3) and useless.auroc == 0.5
    assert perfect.to_dict()["auroc"] is None


def test_rows_without_probabilities():
    logits, target = logits_and_labels(1, 50)
    plain = probability_metrics(logits[0][2:], target[2:])
    spoilt = logits[0].clone()
    spoilt[0, 0], spoilt[1, 1] = math.nan, math.inf
    found = probability_metrics(spoilt, target)
    assert (found.n, found.invalid) == (50, 2) and found.nll == plain.nll and found.auroc == plain.auroc
    assert probability_metrics(torch.full((2, 3), math.nan), torch.zeros(2, dtype=torch.int64)).accuracy == 0
    assert math.isnan(probability_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).accuracy)


def test_a_temperature_lowers_nll_and_keeps_accuracy():
    cache = cache_of(3, 4000)
    before = exit_metrics(cache)
    after = exit_metrics(cache, [fit.temperature for fit in fit_temperatures(cache)])
    for old, new in zip(before, after, strict=True):
        assert new.nll <= old.nll and new.accuracy == old.accuracy
    # By brute force at one exit, on its normalised prefix ensemble.
    prefix = cache.logits[0].double() * cache.weights[0] + cache.logits[1].double() * cache.weights[1]
    expected = probability_metrics(prefix / cache.weights[:2].double().sum(), cache.target)
    assert before[1].nll == pytest.approx(expected.nll, rel=1e-5) and before[1].accuracy == expected.accuracy
    own = exit_metrics(cache, on="exit")[2]
    assert own == probability_metrics(cache.logits[2], cache.target)


def test_arguments():
    ones = np.ones(3)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        expected_calibration_error(ones, ones, bins=0)
    with pytest.raises(ValueError, match="scheme must be 'width' or 'mass', got 'x'"):
        expected_calibration_error(ones, ones, scheme="x")
    with pytest.raises(ValueError, match=r"must have the same shape \[N\], got \[3\] and \[2\]"):
        failure_auroc(ones, np.ones(2))
    with pytest.raises(ValueError, match="must not be NaN, got NaN at position 1"):
        failure_auroc(np.array([0.5, math.nan]), np.ones(2))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        probability_metrics(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="expected_calibration_error: confidence must be within 0..1, got 1..7"):
        expected_calibration_error(np.array([1.0, 7.0]), np.ones(2))
    with pytest.raises(ValueError, match=r"failure_auroc: correct must be bool \(or 0 and 1\), got 1..3"):
        failure_auroc(ones, np.array([1, 3, 1]))
    for logits, target, message in [
        (torch.zeros(2, 3), torch.tensor([0, 3]), "target must be within 0..2, got 0..3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "target must be within 0..2, got -1..0"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "target must be integers, got torch.float32"),
        (torch.zeros(2, 3), [0, 1], r"target must be a tensor of shape \[2\], got list"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), r"logits must be a floating tensor .* got torch.int64 of"),
    ]:
        with pytest.raises(ValueError, match=f"probability_metrics: {message}"):
            probability_metrics(logits, target)
        with pytest.raises(ValueError, match=f"fit_temperature: {message}"):
            fit_temperature(logits, target)
    assert exit_metrics(cache_of(3, 5), np.float32(1.0)) == exit_metrics(cache_of(3, 5), 1)
    with pytest.raises(ValueError, match="temperatures must have 3 entries, got 2"):
        exit_metrics(cache_of(3, 5), [1.0, 1.0])
