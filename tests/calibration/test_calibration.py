from __future__ import annotations

import json

import pytest
import torch
from aep_ext.termination import (
    AccuracyBudget,
    Calibration,
    CostBudget,
    Patience,
    RiskBudget,
    ThresholdPath,
    ThresholdSearch,
    budget_from_dict,
    budget_to_dict,
    calibrate,
    fit_temperatures,
    from_thresholds,
    near_threshold,
    simulate,
)
from synthetic_exits import cache_of

COSTS = [1.0, 2.0, 3.0, 4.0]


@pytest.fixture(scope="module")
def caches():
    return cache_of(4, 6000, seed=20).split([0.5, 0.5], seed=0, roles=["calibration", "test"])


@pytest.mark.parametrize(
    "budget",
    [
        AccuracyBudget(0.5),
        CostBudget(fraction=0.6),
        CostBudget(mean=2.5),
        RiskBudget(0.03),
        RiskBudget(0.03, loss="drop"),
        RiskBudget(0.03, method="crc"),
    ],
)
@pytest.mark.parametrize("policy", ["confidence", "entropy", "vote"])
def test_a_budget_is_met_and_the_result_survives_json(caches, budget, policy):
    calibration, test = caches
    found = calibrate(calibration, costs=COSTS, budget=budget, policy=policy)
    assert found.feasible and not found.same_data and found.budget == budget and found.seed == 0
    assert found.thresholds.dtype == found.temperatures.dtype == torch.float32 and found.enabled.dtype == torch.bool
    assert found.thresholds.shape == found.enabled.shape == (3,) and found.temperatures.shape == (4,)
    if isinstance(budget, AccuracyBudget):
        assert found.drop <= 0.5 and found.gap is not None and found.bound <= found.cost
    elif isinstance(budget, CostBudget):
        assert found.cost <= budget.limit(4.0) + 1e-9 and found.accuracy <= found.bound
    else:
        assert bool(found.guarantee) and found.gap is None
    values = json.loads(json.dumps(found.to_dict()))
    again = Calibration.from_dict(values)
    assert again.to_dict() == found.to_dict() and str(again) == str(found)
    assert [
        torch.equal(getattr(again, name), getattr(found, name))
        for name in ("thresholds", "enabled", "temperatures", "weights")
    ] == [True] * 4
    first, second = found.evaluate(test), again.evaluate(test)
    assert first == second and not first.same_data
    result = simulate(
        test.logits,
        test.weights,
        policy,
        found.thresholds,
        enabled=found.enabled,
        costs=COSTS,
        temperatures=found.temperatures,
        target=test.target,
    )
    assert first.counts == tuple(result.counts.tolist()) and first.accuracy == pytest.approx(result.accuracy)
    assert first.cost == pytest.approx(result.mean_cost)
    assert first.full_correct - first.degraded + first.improved == first.correct
    assert first.degraded / first.n < first.degradation_bound(0.05) < 1


def test_temperatures_and_thresholds_come_from_different_samples(caches):
    calibration, _ = caches
    found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1), seed=7)
    first, second = calibration.split([0.2, 0.8], seed=7)
    assert found.data == (first.identity, second.identity) and found.n == 2400
    expected = [fit.temperature for fit in fit_temperatures(first)]
    torch.testing.assert_close(found.temperatures, torch.tensor(expected))
    assert [fit["temperature"] for fit in found.temperature_fits] == expected
    together = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1), share=0)
    assert together.n == 3000 and "same samples" in together.notice
    plain = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1), temperatures=None)
    assert plain.n == 3000 and plain.temperatures.tolist() == [1] * 4 and plain.temperature_fits == ()
    given = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1), temperatures=[1.5, 1.2, 1.1, 1.0])
    torch.testing.assert_close(given.temperatures, torch.tensor([1.5, 1.2, 1.1, 1.0]))
    patient = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(5), policy=Patience("exit"))
    assert patient.policy == Patience("exit") and patient.exact


def test_reporting_on_the_calibration_data_needs_an_explicit_word(caches):
    calibration, test = caches
    found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1))
    shuffled = calibration.select(torch.randperm(3000), role="test")
    namesake = test.select(range(1000), role="calibration")
    for cache, shared in ((calibration, "samples"), (shuffled, "samples"), (namesake, "role")):
        with pytest.raises(ValueError, match=f"evaluate: data must not share the {shared} .* allow_same_data=True"):
            found.evaluate(cache)
        report = found.evaluate(cache, allow_same_data=True)
        assert report.same_data and report.to_dict()["same_data"] is True
        assert "calibrated and reported on the same data" in str(report)
    report = found.evaluate(test)
    assert "same data" not in str(report) and report.to_dict()["data"]["role"] == "test"
    with pytest.raises(ValueError, match="calibrate: data must not have the role 'test'"):
        calibrate(test, costs=COSTS, budget=AccuracyBudget(1))
    marked = calibrate(test, costs=COSTS, budget=RiskBudget(0.05), allow_same_data=True)
    assert marked.same_data and marked.guarantee == "" and "SAME DATA" in str(marked)
    assert marked.evaluate(calibration, allow_same_data=True).same_data


def test_roles_are_the_same_in_any_spelling(caches):
    calibration, test = caches
    found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1))
    with pytest.raises(ValueError, match="data must not share the role"):
        found.evaluate(test.select(range(100), role="Calibration "))
    with pytest.raises(ValueError, match="calibrate: data must not have the role 'Test'"):
        calibrate(test.select(range(2000), role="Test"), costs=COSTS, budget=AccuracyBudget(1))


def test_thresholds_keep_the_name_of_the_data_they_were_found_on(caches):
    calibration, test = caches
    on_test = ThresholdSearch(test, "confidence", COSTS).for_accuracy(1)
    with pytest.raises(ValueError, match="from_thresholds: data must not have the role 'test'"):
        from_thresholds(on_test, test, COSTS)
    marked = from_thresholds(on_test, test, COSTS, allow_same_data=True)
    assert marked.same_data and "SAME DATA" in str(marked)
    with pytest.raises(ValueError, match="from_thresholds: cache must be the one that was searched, test .* got cal"):
        from_thresholds(on_test, calibration, COSTS)
    plain = from_thresholds(ThresholdSearch(calibration, "confidence", COSTS).for_accuracy(1), calibration, COSTS)
    assert plain.data == (calibration.identity,) and not plain.same_data
    # Whatever else is named, the data that were searched are among them.
    more = from_thresholds(
        ThresholdSearch(calibration, "confidence", COSTS).for_accuracy(1), calibration, COSTS, data=()
    )
    assert more.data == (calibration.identity,)
    curve = ThresholdSearch(calibration, "confidence", COSTS).curve(points=10)
    path = ThresholdPath.from_curve(curve, [cache_of(4, 20, role="pilot").identity])
    assert calibration.identity in path.sources


def test_a_budget_out_of_reach_is_stated(caches):
    calibration, _ = caches
    cheap = calibrate(calibration, costs=COSTS, budget=CostBudget(mean=0.5))
    assert not cheap.feasible and cheap.cost == 1 and "1 is the lowest reached" in cheap.notice
    better = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(-60))
    assert not better.feasible and better.correct >= better.full_correct and "best reached" in better.notice
    assert "BUDGET NOT MET" in str(better) and better.bound is None


def test_the_gate_of_a_live_network_needs_room_around_thresholds(caches):
    calibration, test = caches
    found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1))
    report = found.evaluate(test)
    assert 0 <= report.near < 10
    for policy in ("entropy", "patience"):  # the same samples as the gated network's own account
        found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1), policy=policy)
        near = near_threshold(
            test.logits, test.weights, policy, found.thresholds, temperatures=found.temperatures, enabled=found.enabled
        )
        assert found.evaluate(test).near == int(near.sum())
    found = calibrate(calibration, costs=COSTS, budget=AccuracyBudget(1))
    tight = Calibration.from_dict(found.to_dict() | {"thresholds": [1.0, 1.0, 1.0], "enabled": [True] * 3})
    sure = float((torch.softmax(test.running[0] / found.temperatures[0], 1).amax(1) > 1 - 9e-6).sum())
    assert tight.evaluate(test).near >= sure


def test_a_bounded_temperature_is_mentioned():
    cache = cache_of(2, 60, seed=1)
    sure = type(cache).from_logits(cache.logits, cache.logits[0].argmax(1), [1.0, 1.0], role="calibration")
    found = calibrate(sure, costs=[1, 2], budget=AccuracyBudget(1), share=0)
    assert "exit 1: temperature at its bound 0.05" in found.notice and found.temperature_fits[0]["bounded"] == "low"


def test_temperatures_that_cannot_be_fitted_survive_json():
    cache = cache_of(2, 60, seed=1)
    broken = type(cache).from_logits(cache.logits * float("nan"), cache.target, [1.0, 1.0], role="calibration")
    found = calibrate(broken, costs=[1, 2], budget=AccuracyBudget(1))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert Calibration.from_dict(json.loads(text)).to_dict() == found.to_dict()
    assert "exit 1: no temperature, none of 12 samples can be used" in found.notice and not found.enabled.any()


@pytest.mark.parametrize(
    "budget", [AccuracyBudget(-1), CostBudget(mean=3), CostBudget(fraction=0.5), RiskBudget(0.1, 0.2, "drop", "ltt")]
)
def test_budgets_survive_json(budget):
    assert budget_from_dict(json.loads(json.dumps(budget_to_dict(budget)))) == budget


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AccuracyBudget(float("nan")), "drop must be points within -100..100, got nan"),
        (lambda: CostBudget(), "exactly one of mean and fraction"),
        (lambda: CostBudget(mean=1, fraction=1), "exactly one of mean and fraction"),
        (lambda: CostBudget(mean=-1), "positive and finite, got -1"),
        (lambda: RiskBudget(1.0), r"within \(0, 1\), got 1.0 and 0.1"),
        (lambda: CostBudget(mean=True), "CostBudget: the limit must be a number, got True"),
        (lambda: AccuracyBudget("1"), "AccuracyBudget: drop must be a number, got '1'"),
        (lambda: AccuracyBudget(None), "AccuracyBudget: drop must be a number, got None"),
        (lambda: RiskBudget("0.1"), "RiskBudget: epsilon must be a number, got '0.1'"),
        (lambda: RiskBudget(0.1, delta=None), "RiskBudget: delta must be a number, got None"),
        (lambda: budget_from_dict({"kind": "AccuracyBudget", "fraction": 1}), "budget: AccuracyBudget must have other"),
        (lambda: Calibration.from_dict({}), "Calibration.from_dict: values must have the entry 'policy'"),
        (lambda: RiskBudget(0.1, loss="x"), "loss must be"),
        (lambda: RiskBudget(0.1, method="x"), "method must be"),
        (lambda: RiskBudget(0.1, loss="drop", method="crc"), "got 'drop'"),
        (lambda: budget_from_dict({"kind": "x"}), "kind must be one of"),
        (lambda: calibrate(cache_of(4, 50), costs=COSTS, budget=AccuracyBudget(1), share=1), r"within \[0, 1\), got 1"),
        (lambda: calibrate(cache_of(4, 50), costs=COSTS, budget=RiskBudget(0.1), share=0), r"within \(0, 1\), got 0"),
        (lambda: calibrate(cache_of(4, 1), costs=COSTS, budget=AccuracyBudget(1)), "enough samples"),
        (lambda: calibrate(cache_of(4, 50), costs=COSTS, budget=AccuracyBudget(1), temperatures="x"), "must be 'fit'"),
    ],
)
def test_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_is_no_budget():
    with pytest.raises(TypeError, match="budget must be an AccuracyBudget, CostBudget or RiskBudget, got float"):
        calibrate(cache_of(4, 50), costs=COSTS, budget=0.5)


def test_a_cache_of_another_network(caches):
    found = calibrate(caches[0], costs=COSTS, budget=AccuracyBudget(1))
    with pytest.raises(ValueError, match="cache must have the output weights"):
        found.evaluate(cache_of(3, 10, role="test"))
    with pytest.raises(ValueError, match="at least one sample, got none"):
        found.evaluate(caches[1].select([]))
    # Equal weights do not make equal exits.
    logits, weights = caches[0].logits, caches[0].weights
    other = type(caches[0]).from_logits(logits, caches[0].target, weights, role="test", exit_ids=[0, 1, 3, 4])
    with pytest.raises(ValueError, match=r"evaluate: cache must hold the exits \[0, 1, 2, 3\], got \[0, 1, 3, 4\]"):
        found.evaluate(other, allow_same_data=True)
    values = found.to_dict()
    unknown = Calibration.from_dict({name: value for name, value in values.items() if name != "exit_ids"})
    assert unknown.exit_ids == () and unknown.evaluate(other, allow_same_data=True).n == 3000
    with pytest.raises(ValueError, match="policy must be one of .*, got 'custom'"):
        Calibration.from_dict(values | {"policy": {"name": "custom", "on": "ensemble"}})
    with pytest.raises(ValueError, match="4 temperatures must come with 3 thresholds"):
        Calibration.from_dict(values | {"weights": [1.0]})
