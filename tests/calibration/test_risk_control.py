from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from aep_ext.calibration.path import losses_at
from aep_ext.calibration.tails import binomial_cdf
from aep_ext.termination import (
    CostBudget,
    RiskBudget,
    ThresholdPath,
    ThresholdSearch,
    calibrate,
    conformal_risk_control,
    control_risk,
    learn_then_test,
    path_losses,
    simulate,
)
from synthetic_exits import cache_of

from aep_ext.calibration.budgets import LOSSES

RESAMPLINGS = 1000


@pytest.fixture(scope="module")
def population():
    """The whole distribution: what a threshold's risk is on it is known exactly."""
    return cache_of(4, 20_000, seed=11, role="population")


@pytest.fixture(scope="module")
def path():
    """Fixed on other data, once."""
    other = cache_of(4, 3000, seed=12, role="path")
    curve = ThresholdSearch(other, "confidence", [1, 2, 3, 4]).curve(points=40)
    return ThresholdPath.from_curve(curve, [other.identity], steps=40)


def draws(losses, n):
    """Calibration sets of n independent draws of the population."""
    rng = np.random.default_rng(2024)
    for _ in range(RESAMPLINGS):
        yield losses[:, rng.integers(0, losses.shape[1], n)]


def within(misses, delta):
    """Whether so many misses are what a rate of at most delta gives, but for a chance of 1 in 1000."""
    return 1 - binomial_cdf(misses - 1, RESAMPLINGS, delta) > 1e-3


@pytest.mark.parametrize(
    ("loss", "p_value", "epsilon", "n", "least"),
    [
        ("degradation", "auto", 0.03, 500, 0.5),
        ("degradation", "hoeffding-bentkus", 0.05, 500, 0.2),  # a bound, not exact: it misses far less
        ("disagreement", "auto", 0.03, 500, 0.5),
        ("drop", "auto", 0.04, 600, 0.5),
    ],
)
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_learn_then_test_keeps_its_promise(population, path, loss, p_value, epsilon, n, least, delta):
    losses = path_losses(population, path, loss)
    risk = losses.mean(axis=1)
    assert risk[0] <= epsilon < risk[-1]  # the path leads from safe steps to unsafe ones
    # The hardest case: the first unsafe step is as little unsafe as can be. So the promise is all but used up, and a
    # procedure that takes a little more than delta, or a little more than epsilon, is found out.
    epsilon = risk[risk > epsilon].min() * (1 - 1e-9)
    misses = moved = 0
    for sample in draws(losses, n):
        test = learn_then_test(sample, epsilon, delta, p_value=p_value)
        # Every accepted step at once, so whichever of them is taken.
        misses += bool((risk[: test.accepted] > epsilon).any())
        moved += test.accepted > 0
    assert within(misses, delta)
    assert misses > least * delta * RESAMPLINGS
    assert moved > 0.9 * RESAMPLINGS  # and not by never daring anything


def test_thresholds_tuned_on_the_same_data_break_it(population, path):
    # The control: the boldest step that looks safe on the calibration data, without a test.
    losses = path_losses(population, path, "degradation")
    risk = losses.mean(axis=1)
    epsilon, delta = 0.03, 0.1
    naive = tested = 0
    for sample in draws(losses, 500):
        safe = np.flatnonzero(sample.mean(axis=1) <= epsilon)
        naive += bool(len(safe)) and risk[safe[-1]] > epsilon
        accepted = learn_then_test(sample, epsilon, delta).accepted
        tested += accepted > 0 and risk[accepted - 1] > epsilon
    assert not within(naive, delta) and naive > 0.3 * RESAMPLINGS
    assert within(tested, delta)


@pytest.mark.parametrize("loss", ["degradation", "disagreement"])
def test_conformal_risk_control_holds_in_expectation(population, path, loss):
    losses = path_losses(population, path, loss)
    risk = np.concatenate([[0.0], losses.mean(axis=1)])  # 0: everything is off
    for epsilon, n in ((0.03, 200), (0.1, 50)):
        reached = np.array([risk[conformal_risk_control(sample, epsilon).accepted] for sample in draws(losses, n)])
        error = reached.std(ddof=1) / math.sqrt(RESAMPLINGS)
        assert reached.mean() <= epsilon + 3 * error
        assert reached.mean() > 0.3 * epsilon


def test_the_whole_way_from_a_cache_keeps_the_promise(population, path):
    # Through control_risk, that is with caches, roles and the choice of the cheapest step.
    rng = np.random.default_rng(5)
    risk = path_losses(population, path, "degradation").mean(axis=1)
    rows = {
        (tuple(t.tolist()), tuple(e.tolist())): r for t, e, r in zip(path.thresholds, path.enabled, risk, strict=True)
    }
    epsilon = risk[risk > 0.04].min() * (1 - 1e-9)  # the first unsafe step is hardly unsafe, see above
    misses, runs, delta = 0, 60, 0.2
    for _ in range(runs):
        cache = population.select(torch.from_numpy(rng.integers(0, 20_000, 400)), role="calibration")
        found = control_risk(cache, path, RiskBudget(epsilon, delta), costs=[1, 2, 3, 4])
        if found.feasible:
            misses += rows[tuple(found.thresholds.tolist()), tuple(found.enabled.tolist())] > epsilon
            assert found.cost < 4 and not found.same_data
    assert 1 - binomial_cdf(misses - 1, runs, delta) > 1e-3


@pytest.mark.parametrize("p_value", ["auto", "betting", "hoeffding-bentkus"])
def test_the_order_of_the_samples_cannot_buy_a_promise(p_value):
    # A loader often goes through the classes one by one, so that the easy ones come first: to a gambler who bets while
    # he reads, such data look safe for a long time. Independent draws sorted by their loss are the worst case.
    rng = np.random.default_rng(3)
    runs, epsilon, delta, misses = 300, 0.04, 0.1, 0
    for _ in range(runs):
        loss = np.sort(rng.choice([-1, 0, 1], size=(1, 600), p=[0.02, 0.91, 0.07]), axis=1)  # risk 0.05
        misses += learn_then_test(loss, epsilon, delta, p_value=p_value).accepted > 0
    assert 1 - binomial_cdf(misses - 1, runs, delta) > 1e-3
    again = [learn_then_test(loss, epsilon, delta, p_value="betting", seed=s).p_values[0] for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_the_cheapest_of_the_accepted_steps_is_taken(path, method):
    cache, costs = cache_of(4, 500, seed=16), np.array([1.0, 2, 3, 4])
    found = control_risk(cache, path, RiskBudget(0.05, method=method), costs=costs)
    losses = path_losses(cache, path, "degradation")
    test = learn_then_test(losses, 0.05, 0.1) if method == "ltt" else conformal_risk_control(losses, 0.05)
    means = costs[path.exits(cache)[0]].mean(axis=1)
    assert 0 < test.accepted < len(path) and means[test.accepted] < means[: test.accepted].min() == found.cost
    step = int(np.argmin(means[: test.accepted]))
    assert torch.equal(found.thresholds, path.thresholds[step]) and torch.equal(found.enabled, path.enabled[step])


def test_fixed_sequence_stops_at_the_first_step_that_fails():
    n = 200
    losses = np.zeros((5, n))
    losses[2, :40] = 1
    test = learn_then_test(losses, 0.05, 0.1)
    assert (test.accepted, test.tested) == (2, 3) and test.method == "binomial"
    np.testing.assert_allclose(test.p_values, [0.95**n, 0.95**n, binomial_cdf(40, n, 0.05)])
    assert test.mean.tolist() == [0, 0, 0.2, 0, 0]
    assert learn_then_test(losses[:2], 0.05, 0.1).accepted == 2
    # Too few samples to show anything, although not one loss was seen.
    assert learn_then_test(np.zeros((3, 20)), 0.05, 0.1).accepted == 0
    assert learn_then_test(-np.ones((1, 50)), 0.05, 0.1).method == "betting"


def test_conformal_risk_control_by_hand():
    losses = np.zeros((4, 19))
    losses[1, 0] = 1  # not monotone: sample 0 loses at step 1 only
    losses[3, :3] = 1
    test = conformal_risk_control(losses, 0.1)
    np.testing.assert_allclose(test.p_values, [1 / 20, 2 / 20, 2 / 20, 4 / 20])
    assert test.accepted == 3
    assert conformal_risk_control(losses, 0.04).accepted == 0


def test_losses_by_the_simulator(path):
    cache = cache_of(4, 300, seed=13)
    full = cache.running[-1].argmax(1)
    losses = {name: path_losses(cache, path, name) for name in LOSSES}
    for step in range(0, len(path), 7):
        result = simulate(
            cache.logits,
            cache.weights,
            "confidence",
            path.thresholds[step],
            enabled=path.enabled[step],
            temperatures=path.temperatures,
            target=cache.target,
        )
        right, early = full == cache.target, result.correct
        assert losses["degradation"][step].tolist() == (right & ~early).long().tolist()
        assert losses["drop"][step].tolist() == (right.long() - early.long()).tolist()
        assert losses["disagreement"][step].tolist() == (result.predictions != full).long().tolist()
    assert (losses["degradation"] >= losses["drop"]).all()


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin", "patience", "vote"])
def test_a_path_without_data_goes_from_strict_to_lax(policy):
    cache = cache_of(4, 500)
    path = ThresholdPath.parametric(policy, 4, classes=5, steps=20)
    taken, _ = path.exits(cache)
    assert (np.diff(taken, axis=0) <= 0).all() and path.sources == () and taken[-1].max() == 0
    assert len(path) == (4 if policy in ("patience", "vote") else 20)
    found = control_risk(cache, path, RiskBudget(0.1, method="crc"), costs=[1, 2, 3, 4])
    assert found.policy.name == policy and "in expectation" in found.guarantee


def test_a_path_is_not_tested_on_its_own_data():
    cache = cache_of(3, 2000)
    first, second = cache.split([0.5, 0.5], seed=0, roles=["path", "calibration"])
    curve = ThresholdSearch(first, "confidence", [1, 2, 3]).curve(points=20)
    path = ThresholdPath.from_curve(curve, [first.identity])
    budget = RiskBudget(0.05)
    assert control_risk(second, path, budget, costs=[1, 2, 3]).guarantee
    shuffled = first.select(torch.randperm(1000), role="calibration")
    for same in (first, shuffled, cache, second.select(range(900), role="path")):
        with pytest.raises(ValueError, match="control_risk: data must not share the (samples|role) of the data used"):
            control_risk(same, path, budget, costs=[1, 2, 3])
        marked = control_risk(same, path, budget, costs=[1, 2, 3], allow_same_data=True)
        assert marked.same_data and marked.guarantee == "" and "SAME DATA" in str(marked)
    with pytest.raises(ValueError, match="sources must name the data behind the curve, got none"):
        ThresholdPath.from_curve(curve, [])


@pytest.mark.parametrize("loss", ["degradation", "disagreement"])
def test_a_path_made_for_a_loss_begins_without_it(loss):
    cache = cache_of(4, 6000, seed=15)
    first, _ = cache.split([0.5, 0.5], seed=0)
    search = ThresholdSearch(first, "confidence", [1, 2, 3, 4], loss=loss)
    made = ThresholdPath.from_curve(search.curve(points=50), [first.identity])
    lost = path_losses(first, made, loss).sum(axis=1)
    assert lost[0] == 0 and (np.diff(lost) >= 0).all()  # the curve's own axis
    found = search.for_accuracy(0.3)
    taken, table = made.exits(first)
    at = table.leaving(found.thresholds.double().numpy(), found.enabled.numpy())
    assert int(losses_at(at[None], table, loss).sum()) == 3000 - found.correct <= 9 and found.cost < 4
    # So a small risk can be kept, where a path of plain accuracy begins with too many exchanged answers.
    assert calibrate(cache, costs=[1, 2, 3, 4], budget=RiskBudget(0.004, 0.1, loss)).feasible
    with pytest.raises(ValueError, match="loss must be one of degradation, drop, disagreement, got 'x'"):
        ThresholdSearch(first, "confidence", [1, 2, 3, 4], loss="x")


def test_a_promise_that_cannot_be_made_switches_everything_off():
    found = calibrate(cache_of(3, 200), costs=[1, 2, 3], budget=RiskBudget(0.001, 0.05))
    assert not found.feasible and not found.enabled.any() and found.cost == 3 and found.guarantee == ""
    assert "every gate is off" in found.notice and "BUDGET NOT MET" in str(found)


def test_a_path_of_the_users_own(path):
    cache, budget = cache_of(4, 800, seed=14), RiskBudget(0.05)
    found = calibrate(cache, costs=[1, 2, 3, 4], budget=budget, path=path)
    assert found.to_dict() == control_risk(cache, path, budget, costs=[1, 2, 3, 4]).to_dict()
    assert found.data == (*path.sources, cache.identity) and found.n == 800
    with pytest.raises(ValueError, match="path must be left out but for a RiskBudget, got CostBudget"):
        calibrate(cache, costs=[1, 2, 3, 4], budget=CostBudget(mean=2), path=path)
    reported = cache_of(4, 800, seed=14, role="test")
    with pytest.raises(ValueError, match="control_risk: data must not have the role 'test'"):
        control_risk(reported, path, budget, costs=[1, 2, 3, 4])
    marked = control_risk(reported, path, budget, costs=[1, 2, 3, 4], allow_same_data=True)
    assert marked.same_data and marked.guarantee == ""
    for costs in ([1, 2], [1, 2, 3, math.nan], [4, 3, 2, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="control_risk: costs must be 4 positive numbers in non-descending order"):
            control_risk(cache, path, budget, costs=costs)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        control_risk(cache.select([]), path, budget, costs=[1, 2, 3, 4])


def test_arguments():
    losses = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"losses must have shape \[M, N\] with both at least 1, got \[3\]"):
        learn_then_test(np.zeros(3), 0.1, 0.1)
    with pytest.raises(ValueError, match=r"losses must be within \[-1, 1\], got 0.0..2.0"):
        learn_then_test([[0.0, 2.0]], 0.1, 0.1)
    with pytest.raises(ValueError, match=r"losses must be within \[0, 1\]"):
        conformal_risk_control([[-1.0, 0.0]], 0.1)
    with pytest.raises(ValueError, match=r"epsilon and delta must be within \(0, 1\), got 0 and 0.1"):
        learn_then_test(losses, 0, 0.1)
    with pytest.raises(ValueError, match="p_value must be one of"):
        learn_then_test(losses, 0.1, 0.1, p_value="t")
    with pytest.raises(ValueError, match="losses must be 0 or 1 for p_value 'binomial'"):
        learn_then_test(losses + 0.5, 0.1, 0.1, p_value="binomial")
    with pytest.raises(ValueError, match="epsilon must be within"):
        conformal_risk_control(losses, 1)
    with pytest.raises(ValueError, match="classes must be given for the entropy"):
        ThresholdPath.parametric("entropy", 3)
    with pytest.raises(ValueError, match="policy must be a built-in one, got Custom"):
        ThresholdPath.parametric(lambda judged: judged, 3)
    with pytest.raises(ValueError, match="the cache must have 3 exits, got 4"):
        path_losses(cache_of(4, 5), ThresholdPath.parametric("margin", 3), "drop")
    with pytest.raises(ValueError, match="loss must be one of degradation, drop, disagreement, got 'regret'"):
        taken, table = ThresholdPath.parametric("margin", 3).exits(cache_of(3, 5))
        losses_at(taken, table, "regret")
