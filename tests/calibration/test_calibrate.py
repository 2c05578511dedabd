"""calibrate() and its result."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic_exits import ascending, cached_logits, subset_macs

from aep_ext.calibration import (
    AccuracyBudget,
    CachedLogits,
    Calibration,
    CostBudget,
    RiskBudget,
    calibrate,
    selection,
)
from aep_ext.ensemble import fit_output_weights
from aep_ext.inference import CRITERIA, simulate
from aep_ext.pruning import non_inferiority_test

MACS = subset_macs(3)


@pytest.fixture(scope="module")
def logits():
    return cached_logits(3, 600)


@pytest.fixture(scope="module")
def found(logits):
    return calibrate(logits, costs=MACS, budget=2.0, folds=4)


@pytest.mark.parametrize("budget", [2.0, CostBudget(fraction=0.6), RiskBudget(0.1)])
def test_the_figures_are_those_of_the_policy(logits, budget):
    result = calibrate(logits, costs=MACS, budget=budget, folds=3)
    assert result.feasible and result.notice == "" and result.full_cost == MACS[-1]
    rows = torch.arange(600)
    if isinstance(budget, RiskBudget):
        assert "at most 0.1 with probability 0.9" in result.guarantee and result.n == 300
        rows = torch.from_numpy(np.array_split(np.random.default_rng(0).permutation(600), 2)[1])
    part = logits.select(rows).select_exits(result.policy.exits)
    seen = simulate(part.logits, result.policy, target=part.target, costs=result.costs)
    assert int(seen.correct.sum()) == result.correct and seen.counts.tolist() == list(result.counts)
    assert seen.mean_cost == pytest.approx(result.mean_cost)
    assert sum(result.policy.output_weights) == pytest.approx(1)
    kept = result.policy.exits
    assert list(result.costs) == [MACS[sum(1 << e for e in kept[: k + 1]) - 1] for k in range(len(kept))]


def test_the_point_taken_keeps_the_tightened_budget(logits, found):
    best = found.candidates[0]
    assert found.policy.exits == best.exits and best.qualifies and best.target <= 2.0
    assert found.drop_points == best.drop_points and found.interval == best.interval
    assert found.reference_correct - found.correct <= best.target * 6 + 1e-9
    # No point of the curve that keeps it is cheaper.
    assert found.reference_correct - best.target * 6 <= found.correct + 1e-9
    for point in found.curve:
        if point["correct"] >= found.correct:
            assert point["mean_cost"] >= found.mean_cost - 1e-9


def test_the_curve_is_a_front_of_policies(logits, found):
    assert 2 < len(found.curve) <= 100
    part = logits.select_exits(found.policy.exits)
    for before, point in zip(found.curve, found.curve[1:], strict=False):
        assert point["correct"] > before["correct"] and point["mean_cost"] > before["mean_cost"]
    for point in found.curve[::9]:
        policy = replace(found.policy, thresholds=point["thresholds"], enabled=point["enabled"])
        seen = simulate(part.logits, policy, target=part.target, costs=found.costs)
        assert int(seen.correct.sum()) == point["correct"] and seen.mean_cost == pytest.approx(point["mean_cost"])


def test_the_reference(logits):
    """By default all exits: with the weights given, or with those fitted to the logits."""
    given = calibrate(logits, costs=MACS, exits=[2], output_weights=[3.0, 2.0, 1.0], folds=2)
    answers = torch.einsum("e,enk->nk", torch.tensor([3.0, 2.0, 1.0]), logits.logits).argmax(1)
    assert given.reference_correct == int((answers == logits.target).sum())
    fitted = calibrate(logits, costs=MACS, exits=[2], folds=2)
    weights = torch.tensor(fit_output_weights(logits.logits, logits.target, tolerance=1e-3).weights)
    answers = torch.einsum("e,enk->nk", weights, logits.logits).argmax(1)
    assert abs(fitted.reference_correct - int((answers == logits.target).sum())) <= 1
    own = logits.logits[0].argmax(1) == logits.target
    other = calibrate(logits, costs=MACS, exits=[2], reference=own, folds=2)
    assert other.reference_correct == int(own.sum()) and other.feasible


def test_the_interval_is_paired(logits):
    """One exit and nothing to fit: the drop is that of its own answers."""
    reference = logits.logits[2].argmax(1) == logits.target
    own = logits.logits[1].argmax(1) == logits.target
    result = calibrate(logits, costs=MACS, exits=[1], reference=reference, budget=100.0, folds=2)
    paired = non_inferiority_test(own, reference, 1.0)
    assert result.drop_points == pytest.approx(-100 * paired.difference)
    assert result.interval == pytest.approx((-100 * paired.high, -100 * paired.low))
    assert result.correct == int(own.sum()) and result.policy.thresholds == ()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
def test_every_criterion(criterion, criterion_on):
    result = calibrate(
        cached_logits(2, 200), costs=[1.0, 2.0], budget=4.0, criterion=criterion, criterion_on=criterion_on, folds=2
    )
    assert result.policy.criterion == criterion and result.policy.criterion_on == criterion_on
    assert math.isfinite(result.mean_cost) and result.mean_cost <= 2.0


@pytest.mark.parametrize("samples", [1, 2, 7, 40])
def test_few_images_are_no_reason_to_refuse(samples):
    seen = []
    result = calibrate(
        cached_logits(2, samples), costs=[1.0, 2.0], budget=5.0, progress=lambda n, total: seen.append((n, total))
    )
    folds = min(samples, 20)
    assert result.folds == folds and seen[-1] == (3 * folds, 3 * folds) and result.n == samples
    low, high = result.interval
    assert low <= result.drop_points <= high
    if samples > 1:
        assert high - low > 100 / samples  # an honest interval of few images is wide


def test_equal_arguments_give_equal_results_and_json_keeps_them(logits, found):
    again = calibrate(logits, costs=MACS, budget=AccuracyBudget(2.0), folds=4)
    assert again.to_dict() == found.to_dict()
    values = json.loads(json.dumps(found.to_dict()))
    loaded = Calibration.from_dict(values)
    assert loaded.to_dict() == found.to_dict() and loaded.policy == found.policy and loaded.budget == found.budget
    assert loaded.candidates == found.candidates and loaded.curve == found.curve
    assert str(loaded) == str(found) and "95 % interval" in str(found)
    for budget in (CostBudget(mean=2.5), RiskBudget(0.1, 0.2, "degradation", "crc")):
        changed = {**values, "budget": replace(found, budget=budget).to_dict()["budget"]}
        assert Calibration.from_dict(changed).budget == budget
    with pytest.raises(ValueError, match=r"Calibration.from_dict: entries must be .*differing: \['seed'\]"):
        Calibration.from_dict({name: value for name, value in values.items() if name != "seed"})
    with pytest.raises(ValueError, match=r"budget: entries must be kind \(AccuracyBudget, .* got \{'kind': 'Wish'\}"):
        Calibration.from_dict({**values, "budget": {"kind": "Wish"}})
    with pytest.raises(ValueError, match="budget: entries must be kind .*'size': 1"):
        Calibration.from_dict({**values, "budget": {"kind": "CostBudget", "size": 1}})


def test_evaluation_is_of_other_data(logits, found):
    others = cached_logits(3, 500, seed=1, role="test")
    seen = found.evaluate(others)
    part = others.select_exits(found.policy.exits)
    expected = simulate(part.logits, found.policy, target=part.target, costs=found.costs)
    assert seen.mean_cost == expected.mean_cost and torch.equal(seen.exit, expected.exit)
    assert torch.equal(seen.correct, expected.correct) and torch.equal(found.evaluate(part).exit, seen.exit)
    shuffled = logits.select(torch.randperm(600), role="test")
    with pytest.raises(ValueError, match=r"of other samples than those of the calibration \(val\), got 600 of 600"):
        found.evaluate(shuffled)
    mixed = CachedLogits(
        torch.cat([others.logits, logits.logits[:, :20]], dim=1), torch.cat([others.target, logits.target[:20]])
    )
    with pytest.raises(ValueError, match="got 20 of 520 that are the same"):
        found.evaluate(mixed)
    # A duplicate or two are in most data sets.
    found.evaluate(mixed.select(torch.arange(502)))
    with pytest.raises(ValueError, match="got 600 of 600 that are the same"):
        Calibration.from_dict(found.to_dict()).evaluate(shuffled)
    with pytest.raises(ValueError, match="logits must hold the exits"):
        found.evaluate(CachedLogits(others.logits, others.target, exits=[7, 8, 9]))
    with pytest.raises(ValueError, match="at least one sample, got none"):
        found.evaluate(others.select([]))


def test_exits_keep_the_numbers_of_the_network(logits):
    renamed = CachedLogits(logits.logits, logits.target, exits=[1, 4, 6])
    result = calibrate(renamed, costs=MACS, budget=2.0, folds=2)
    assert set(result.policy.exits) <= {1, 4, 6} and result.candidates[0].exits == result.policy.exits
    assert calibrate(renamed, costs=MACS, budget=2.0, exits=[0, 2], folds=2).policy.exits == (1, 6)


def test_what_was_left_out_is_said(logits, monkeypatch):
    monkeypatch.setattr(selection, "CROSS_VALIDATED", 2)
    result = calibrate(logits.select(torch.arange(40)), costs=MACS, budget=2.0, folds=2)
    assert (result.data["subsets"], result.data["screened"], result.data["cross_validated"]) == (7, 7, 2)
    assert "2 subsets of the exits cross-validated of 7 tried of 7" in str(result)
    given = calibrate(logits.select(torch.arange(40)), costs=MACS, budget=2.0, folds=2, exits=[0, 2])
    assert given.data["screened"] == 1 and "cross-validated of" not in str(given)


def test_what_cannot_be_kept_is_said_with_the_remedies(logits):
    result = calibrate(logits, costs=MACS, budget=-30.0, num_std_errors=1.0, folds=3)
    assert not result.feasible and result.drop_points > -30
    assert "no policy keeps within -30 points of the reference: the nearest, exits " in result.notice
    total = result.drop_points + result.std_error
    assert f"with 1 standard errors of {result.std_error:.2f} added, as is asked, {total:.2f}; " in result.notice
    assert "calibrate on more images, or allow a larger budget (--budget, --margin)" in result.notice
    assert "num_std_errors=0" not in result.notice and result.notice in str(result)  # it would not help
    careful = calibrate(logits, costs=MACS, budget=1.0, exits=[0, 2], num_std_errors=50.0, folds=3)
    assert not careful.feasible and careful.drop_points <= 1.0  # only the standard errors refuse
    assert careful.notice.endswith("(num_std_errors=0, --num-std-errors 0)")
    cheap = calibrate(logits, costs=MACS, budget=CostBudget(mean=5.0), folds=3)
    assert not cheap.feasible and cheap.policy.exits == (0,)
    assert "no policy keeps a mean cost of 5: the nearest, exits 1, costs 1.01e+06" in cheap.notice


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"costs": [1, 2]}, ValueError, r"costs must be 7 numbers \(by subset\) or 3 \(by exit\), got shape \[2\]"),
        ({"costs": [1, 3, 2]}, ValueError, r"costs must not descend from exit to exit, got \[3.0, 2.0\] for exits"),
        ({"costs": [0, 1, 2]}, ValueError, "costs must be positive and finite, got 0.0..2.0"),
        ({"costs": [1, 2, math.inf]}, ValueError, "costs must be positive and finite"),
        ({"budget": "0.5"}, TypeError, "budget must be a number of points, an AccuracyBudget, .* got str"),
        ({"criterion": "luck"}, ValueError, "criterion must be one of confidence, .*, got 'luck'"),
        ({"criterion": len}, ValueError, "criterion must be one of confidence, .*, got len"),
        ({"criterion_on": "both"}, ValueError, "criterion_on must be 'ensemble' or 'exit', got 'both'"),
        ({"output_weights": "equal"}, ValueError, "output_weights must be 'fitted' or numbers, got 'equal'"),
        ({"output_weights": [1.0, 1.0]}, ValueError, "output_weights must have 3 entries, got 2"),
        ({"exits": "all"}, ValueError, "exits must be 'auto' or positions, got 'all'"),
        ({"exits": [3]}, ValueError, r"exits must be within 0..2, got 3"),
        ({"reference": torch.ones(4)}, ValueError, r"reference must be bool of shape \[5\], got float32 \[4\]"),
        ({"num_std_errors": -1}, ValueError, "num_std_errors must be at least 0, got -1"),
        ({"num_std_errors": math.nan}, ValueError, "num_std_errors must be at least 0, got nan"),
        ({"folds": 1}, ValueError, "folds must be at least 2, got 1"),
    ],
)
def test_arguments(change, error, message):
    with pytest.raises(error, match=message):
        calibrate(cached_logits(3, 5), **{"costs": [1.0, 2.0, 3.0], **change})


def test_which_samples_are_refused():
    with pytest.raises(ValueError, match="calibrate: logits must not have the role 'test'"):
        calibrate(cached_logits(3, 5, role="test"), costs=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="calibrate: logits must hold at least 1 samples, got 0"):
        calibrate(cached_logits(3, 5).select([]), costs=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="calibrate: logits must hold at least 2 samples, got 1"):
        calibrate(cached_logits(3, 1), costs=[1.0, 2.0, 3.0], budget=RiskBudget(0.1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccuracyBudget(math.nan), "AccuracyBudget: points must be within -100..100, got nan"),
        (lambda: AccuracyBudget(101), "AccuracyBudget: points must be within -100..100, got 101"),
        (lambda: CostBudget(), "CostBudget: exactly one of mean and fraction must be given"),
        (lambda: CostBudget(mean=1, fraction=1), "CostBudget: exactly one of mean and fraction must be given"),
        (lambda: CostBudget(mean=0), "CostBudget: the limit must be positive and finite, got 0"),
        (lambda: RiskBudget(0), r"RiskBudget: epsilon must be within \(0, 1\), got 0"),
        (lambda: RiskBudget(0.1, 1), r"RiskBudget: delta must be within \(0, 1\), got 1"),
        (lambda: RiskBudget(0.1, loss="regret"), "RiskBudget: loss must be one of drop, degradation, got 'regret'"),
        (lambda: RiskBudget(0.1, method="t"), "RiskBudget: method must be 'ltt' or 'crc', got 't'"),
        (lambda: RiskBudget(0.1, method="crc"), "RiskBudget: loss must be 'degradation' for method 'crc', got 'drop'"),
    ],
)
def test_budgets(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="AccuracyBudget: points must be a number, got True"):
        AccuracyBudget(True)


def test_weights_given_are_kept_in_proportion(logits):
    result = calibrate(logits, costs=MACS, budget=2.0, exits=[0, 2], output_weights=ascending(3), folds=2)
    assert result.policy.output_weights == pytest.approx((0.25, 0.75))
