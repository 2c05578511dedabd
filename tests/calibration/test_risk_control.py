"""Promises of risk control, held against populations whose risk is known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from synthetic_exits import ascending, cached_logits

from aep_ext.calibration import RiskBudget, calibrate
from aep_ext.calibration.risk_control import betting_p_value, conformal_risk_control, learn_then_test
from aep_ext.calibration.thresholds import ExitTable, search_thresholds
from aep_ext.inference import ExitPolicy

COSTS = [1.0, 2.0, 3.0, 4.0]
RESAMPLINGS = 1000


@pytest.fixture(scope="module")
def answers():
    """(M, N) right answers of a path that was fixed on other data, and (N,) of the reference, on a whole population."""
    others, people = cached_logits(4, 3000, seed=12), cached_logits(4, 20_000, seed=11)
    front = search_thresholds(ExitTable.of(others, ExitPolicy(output_weights=ascending(4))), COSTS)
    table = ExitTable.of(people, ExitPolicy(output_weights=ascending(4)))
    path = np.unique(np.linspace(0, len(front) - 1, 40).astype(int))[::-1]
    right = np.stack([table.answers(front.thresholds[step], front.enabled[step])[1] for step in path])
    return right, table.correct[-1]


def losses_of(answers, loss):
    right, reference = answers
    lost = reference.astype(np.int8) - right.astype(np.int8)
    return lost if loss == "drop" else np.maximum(lost, 0)


def draws(losses, n, count):
    """Calibration sets of n independent draws of the population."""
    rng = np.random.default_rng(2024)
    for _ in range(count):
        yield losses[:, rng.integers(0, losses.shape[1], n)]


def within(misses, runs, delta):
    """Whether so many misses are what a rate of at most delta gives, but for a chance of 1 in 1000."""
    return binom.sf(misses - 1, runs, delta) > 1e-3


@pytest.mark.parametrize(("loss", "epsilon", "n"), [("degradation", 0.03, 500), ("drop", 0.04, 600)])
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_learn_then_test_keeps_its_promise(answers, loss, epsilon, n, delta):
    losses = losses_of(answers, loss)
    risk = losses.mean(axis=1)
    assert risk[0] <= epsilon < risk[-1]  # the path leads from safe steps to unsafe ones
    # The hardest case: the first unsafe step is as little unsafe as can be. So the promise is all but used up, and a
    # procedure that takes a little more than delta, or a little more than epsilon, is found out.
    epsilon = risk[risk > epsilon].min() * (1 - 1e-9)
    misses = moved = 0
    for sample in draws(losses, n, RESAMPLINGS):
        accepted = learn_then_test(sample, epsilon, delta)
        misses += bool((risk[:accepted] > epsilon).any())  # every accepted step at once, whichever is taken
        moved += accepted > 0
    assert within(misses, RESAMPLINGS, delta)
    assert misses > 0.3 * delta * RESAMPLINGS
    assert moved > 0.9 * RESAMPLINGS  # and not by never daring anything


def test_thresholds_tuned_on_the_same_data_break_it(answers):
    """The control: the boldest step that looks safe on the calibration data, without a test."""
    losses = losses_of(answers, "degradation")
    risk = losses.mean(axis=1)
    epsilon = risk[risk > 0.03].min() * (1 - 1e-9)
    naive = tested = 0
    for sample in draws(losses, 500, RESAMPLINGS):
        safe = np.flatnonzero(sample.mean(axis=1) <= epsilon)
        naive += bool(len(safe)) and risk[safe[-1]] > epsilon
        accepted = learn_then_test(sample, epsilon, 0.1)
        tested += accepted > 0 and risk[accepted - 1] > epsilon
    assert not within(naive, RESAMPLINGS, 0.1) and naive > 0.3 * RESAMPLINGS
    assert within(tested, RESAMPLINGS, 0.1)


def test_conformal_risk_control_holds_in_expectation(answers):
    losses = losses_of(answers, "degradation")
    risk = np.concatenate([[0.0], losses.mean(axis=1)])
    for epsilon, n in ((0.03, 200), (0.1, 50)):
        reached = np.array([risk[conformal_risk_control(sample, epsilon)] for sample in draws(losses, n, RESAMPLINGS)])
        assert 0.3 * epsilon < reached.mean() <= epsilon + 3 * reached.std(ddof=1) / math.sqrt(RESAMPLINGS)


def test_the_order_of_the_samples_cannot_buy_a_promise():
    """A loader often goes through the classes one by one, so that the easy ones come first: to a gambler who bets while
    he reads, such data look safe for a long time. Independent draws sorted by their loss are the worst case."""
    rng = np.random.default_rng(3)
    misses = 0
    for _ in range(300):
        loss = np.sort(rng.choice([-1, 0, 1], size=(1, 600), p=[0.02, 0.91, 0.07]), axis=1)  # risk 0.05
        misses += learn_then_test(loss, 0.04, 0.1) > 0
    assert within(misses, 300, 0.1)


def test_fixed_sequence_stops_at_the_first_step_that_fails():
    n = 200
    losses = np.zeros((5, n))
    losses[2, :40] = 1
    assert learn_then_test(losses, 0.05, 0.1) == 2
    assert learn_then_test(losses[:2], 0.05, 0.1) == 2
    # The binomial tail decides: 0.95^n is the p-value of no loss among n.
    enough = math.ceil(math.log(0.1) / math.log(0.95))
    assert learn_then_test(np.zeros((1, enough)), 0.05, 0.1) == 1
    assert learn_then_test(np.zeros((1, enough - 1)), 0.05, 0.1) == 0


def test_betting_p_values():
    """Against the capital, stake by stake; and far stronger than Hoeffding's bound where values vary little."""
    values, epsilon = np.array([0.5, 0.5, 0.0, 0.5]), 0.6
    capital, largest = 1.0, 1.0
    for i, x in enumerate(values):
        seen = values[:i]
        means = [(0.5 + seen[: j + 1].sum()) / (j + 2) for j in range(i)]
        mean = means[-1] if i else 0.5
        variance = (0.25 + sum((v - m) ** 2 for v, m in zip(seen, means, strict=True))) / (i + 1)
        kelly = max((epsilon - mean) / (variance + (epsilon - mean) ** 2), 0.0)
        stake = min(max(math.sqrt(2 * math.log(10) / (4 * variance)), kelly), 0.75 / (1 - epsilon))
        capital *= 1 - stake * (x - epsilon)
        largest = max(largest, capital)
    assert betting_p_value(values, epsilon) == pytest.approx(1 / largest)
    assert betting_p_value([], 0.5) == 1.0
    steady = np.full(500, 0.5)
    assert betting_p_value(steady, 0.52) < 0.1 < math.exp(-2 * 500 * 0.02**2)


def test_conformal_risk_control_by_hand():
    losses = np.zeros((4, 19))
    losses[1, 0] = 1  # not monotone: sample 0 loses at step 1 only
    losses[3, :3] = 1  # corrected means: 1/20, 2/20, 2/20, 4/20
    assert conformal_risk_control(losses, 0.1) == 3
    assert conformal_risk_control(losses, 0.099) == 1
    assert conformal_risk_control(losses, 0.04) == 0


@pytest.mark.parametrize("method", ["ltt", "crc"])
def test_the_whole_way_keeps_the_promise(method):
    """calibrate() with all of its choices, on draws of a population whose policies' risk is simulated exactly."""
    people = cached_logits(2, 20_000, seed=21)
    budget, runs, misses, risks = RiskBudget(0.04, 0.2, "degradation", method), 25, 0, []
    rng = np.random.default_rng(5)
    for run in range(runs):
        drawn = people.select(torch.from_numpy(rng.integers(0, 20_000, 500)))
        reference = people.logits[-1].argmax(1) == people.target
        own = drawn.logits[-1].argmax(1) == drawn.target
        found = calibrate(drawn, costs=[1.0, 2.0], budget=budget, reference=own, folds=2, seed=run)
        if not found.feasible:
            risks.append(0.0)
            continue
        assert found.guarantee.startswith("the probability that only the reference is right is at most 0.04")
        policy = found.policy
        table = ExitTable.of(people.select_exits(policy.exits), policy)
        right = table.answers(policy.thresholds, policy.enabled)[1]
        risks.append(float((reference.numpy() & ~right).mean()))
        misses += risks[-1] > 0.04
    assert sum(risk > 0 for risk in risks) > 0.6 * runs
    if method == "ltt":
        assert within(misses, runs, 0.2)
    else:
        assert np.mean(risks) <= 0.04 + 3 * np.std(risks, ddof=1) / math.sqrt(runs)


def test_a_path_made_for_a_loss_begins_without_it():
    """A small risk of degradation can be kept, where one of accuracy alone begins with exchanged answers."""
    logits = cached_logits(4, 6000, seed=15)
    reference = logits.logits[-1].argmax(1) == logits.target
    found = calibrate(
        logits,
        costs=COSTS,
        budget=RiskBudget(0.004, 0.1, "degradation"),
        reference=reference,
        exits=range(4),
        output_weights=[0.001, 0.001, 0.001, 1.0],
        folds=2,
    )
    assert found.feasible and found.mean_cost < 4.0


def test_a_promise_that_cannot_be_made_is_not_made():
    found = calibrate(cached_logits(2, 60), costs=[1.0, 2.0], budget=RiskBudget(0.001, 0.05), folds=2)
    assert not found.feasible and found.guarantee == "" and found.n == 30
    assert "no policy could be shown to keep a risk of 0.001 with 30 samples" in found.notice
