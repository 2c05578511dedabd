"""Calibration metrics against plain formulas and scikit-learn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_exits import ascending, cached_logits, logits_and_labels

from aep_ext.calibration import exit_metrics, expected_calibration_error, failure_auroc, fit_temperatures
from aep_ext.calibration.metrics import probability_metrics
from aep_ext.inference import ExitPolicy

# Few distinct values, bin edges of 5 and 15 bins among them: ties are the rule.
pairs_of = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 1 / 3, 0.4, 0.6, 0.61, 0.8, 0.99, 1.0]), st.booleans()),
    min_size=1,
    max_size=30,
)


def ece_by_hand(sure, right, bins):
    total = 0.0
    for b in range(bins):
        members = [i for i, c in enumerate(sure) if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0)]
        if members:
            gap = np.mean([right[i] for i in members]) - np.mean([sure[i] for i in members])
            total += len(members) / len(sure) * abs(gap)
    return total


def tensors(rows):
    return torch.tensor([c for c, _ in rows], dtype=torch.float64), torch.tensor([r for _, r in rows])


@settings(deadline=None, max_examples=100)
@given(pairs_of, st.sampled_from([1, 5, 15]))
def test_ece_by_hand(rows, bins):
    sure, right = tensors(rows)
    expected = ece_by_hand(sure.tolist(), right.tolist(), bins)
    assert expected_calibration_error(sure, right, bins=bins) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(pairs_of)
def test_auroc_counts_pairs(rows):
    pairs = [(a, b) for a, right in rows if right for b, wrong in rows if not wrong]
    found = failure_auroc(*tensors(rows))
    if not pairs:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


def test_against_sklearn():
    metrics = pytest.importorskip("sklearn.metrics", reason="a comparison with scikit-learn")
    logits, target = logits_and_labels(1, 500, classes=4)
    p = torch.softmax(logits[0].double() / 1.7, dim=1)
    found = probability_metrics(logits[0], target, 1.7)
    right = (p.argmax(1) == target).numpy()
    assert found.nll == pytest.approx(metrics.log_loss(target.numpy(), p.numpy()), rel=1e-9)
    assert found.auroc == pytest.approx(metrics.roc_auc_score(right, p.amax(1).numpy()), rel=1e-9)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(target.numpy(), p.argmax(1).numpy()))
    one_hot = torch.nn.functional.one_hot(target, 4).double()
    assert found.brier == pytest.approx(float((p - one_hot).square().sum(1).mean()), rel=1e-9)
    assert found.ece == pytest.approx(ece_by_hand(p.amax(1).tolist(), right.tolist(), 15))


def test_perfect_and_useless_probabilities():
    target = torch.tensor([0, 1, 2, 0])
    perfect = probability_metrics(200 * torch.nn.functional.one_hot(target, 3).float(), target)
    assert perfect.accuracy == 1 and perfect.brier == perfect.ece == 0 and math.isnan(perfect.auroc)
    useless = probability_metrics(torch.zeros(4, 3), target)
    assert useless.accuracy == 0.5 and useless.nll == pytest.approx(math.log(3))
    assert useless.brier == pytest.approx(2 / 3) and useless.auroc == 0.5
    assert perfect.to_dict()["auroc"] is None and perfect.to_dict()["accuracy"] == 1


def test_rows_without_probabilities_are_left_out():
    logits, target = logits_and_labels(1, 50)
    plain = probability_metrics(logits[0][2:], target[2:])
    spoilt = logits[0].clone()
    spoilt[0, 0], spoilt[1, (target[1] + 1) % 5] = math.nan, math.inf
    found = probability_metrics(spoilt, target)
    assert (found.nll, found.auroc, found.ece) == (plain.nll, plain.auroc, plain.ece)
    assert found.accuracy == pytest.approx(plain.accuracy * 48 / 50)
    nothing = probability_metrics(torch.full((2, 3), math.nan), torch.zeros(2, dtype=torch.int64))
    assert nothing.accuracy == 0 and math.isnan(nothing.nll)


def test_a_temperature_lowers_nll_and_keeps_accuracy():
    cached, weights = cached_logits(3, 4000), ascending(3)
    logits, target = cached.logits, cached.target
    policy = ExitPolicy(output_weights=weights, temperatures=fit_temperatures(cached, weights))
    before = exit_metrics(logits, target, replace(policy, temperatures=1.0))
    for old, new in zip(before, exit_metrics(logits, target, policy), strict=True):
        assert new.nll <= old.nll and new.accuracy == old.accuracy
    prefix = (logits[0] * weights[0] + logits[1] * weights[1]) / sum(weights[:2])
    assert before[1].nll == pytest.approx(probability_metrics(prefix, target).nll, rel=1e-5)
    own = exit_metrics(logits, target, ExitPolicy(output_weights=weights, criterion_on="exit", temperatures=2.0))
    assert own[2] == probability_metrics(logits[2], target, 2.0)


def test_arguments():
    policy, target = ExitPolicy(output_weights=[1.0, 1.0]), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"exit_logits must have shape \[2, N, K\] with N at least 1, got \[3, 5, 2\]"):
        exit_metrics(torch.zeros(3, 5, 2), target, policy)
    with pytest.raises(ValueError, match=r"with N at least 1, got \[2, 0, 2\]"):
        exit_metrics(torch.zeros(2, 0, 2), target[:0], policy)
    with pytest.raises(ValueError, match="exit_metrics: target must be within 0..1, got 7..7"):
        exit_metrics(torch.zeros(2, 5, 2), target + 7, policy)
