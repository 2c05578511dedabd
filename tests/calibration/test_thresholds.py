"""The table of what exits decide against the simulator, and the threshold search against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_exits import ascending, cached_logits, logits_and_labels

from aep_ext.calibration import CachedLogits
from aep_ext.calibration.thresholds import ExitTable, search_thresholds
from aep_ext.inference import CRITERIA, ExitPolicy, simulate


def tied(exits: int, samples: int, seed: int, classes: int = 3) -> CachedLogits:
    """Few distinct logits, so that scores tie within and across gates; one sample has a NaN at the first exit."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (exits, samples, classes), generator=generator).float()
    logits[0, 0, 0] = math.nan
    return CachedLogits(logits, torch.randint(0, classes, (samples,), generator=generator))


def table_of(logits: CachedLogits, criterion: str = "confidence", **options: str) -> ExitTable:
    return ExitTable.of(logits, ExitPolicy(output_weights=ascending(logits.num_exits), criterion=criterion, **options))


def every_point(table: ExitTable, costs: list[float]) -> list[tuple[int, float]]:
    """(right answers, mean cost) of every combination of thresholds that are themselves values of the data."""
    sign = -1 if table.criterion == "entropy" else 1
    choices = [[None, *(sign * np.unique(s[~np.isnan(s)])).tolist()] for s in table.scores]
    points = []
    for choice in itertools.product(*choices):
        taken, right = table.answers([0.0 if c is None else c for c in choice], [c is not None for c in choice])
        points.append((int(right.sum()), float(np.array(costs)[taken].mean())))
    return points


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 60),
    st.sampled_from(CRITERIA),
    st.sampled_from(["ensemble", "exit"]),
    st.booleans(),
)
def test_the_table_decides_as_the_simulator(seed, exits, samples, criterion, criterion_on, ties):
    logits = tied(exits, samples, seed) if ties else cached_logits(exits, samples, seed=seed)
    rng = np.random.default_rng(seed)
    weights, temperatures = (np.float32(rng.uniform(0.3, 2, exits)).tolist() for _ in range(2))
    costs = np.cumsum(rng.uniform(0.1, 2, exits)).tolist()
    policy = ExitPolicy(
        output_weights=weights, criterion=criterion, criterion_on=criterion_on, temperatures=temperatures
    )
    table = ExitTable.of(logits, policy)
    front = search_thresholds(table, costs)
    for point in {0, len(front) // 2, len(front) - 1}:
        thresholds, enabled = front.thresholds[point].tolist(), front.enabled[point].tolist()
        gated = replace(policy, thresholds=thresholds, enabled=enabled)
        seen = simulate(logits.logits, gated, target=logits.target, costs=costs)
        taken, right = table.answers(thresholds, enabled)
        assert seen.exit.tolist() == taken.tolist() and seen.correct.tolist() == right.tolist()
        assert int(seen.correct.sum()) == front.correct[point]
        assert seen.mean_cost == pytest.approx(front.cost[point], rel=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
@pytest.mark.parametrize("kind", ["smooth", "tied"])
def test_the_front_is_that_of_brute_force(criterion, criterion_on, kind):
    logits = cached_logits(3, 16, seed=4) if kind == "smooth" else tied(3, 16, seed=4)
    table, costs = table_of(logits, criterion, criterion_on=criterion_on), [1.0, 2.5, 3.0]
    points = every_point(table, costs)
    front = search_thresholds(table, costs)
    best = [min(cost for right, cost in points if right >= level) for level in front.correct]
    np.testing.assert_allclose(front.cost, best)
    assert front.correct[-1] == max(right for right, _ in points)
    assert front.cost[0] == pytest.approx(min(cost for _, cost in points))


def test_the_optimum_is_hardly_ever_missed_with_three_gates():
    hits = total = 0
    for seed in range(8):
        table, costs = table_of(cached_logits(4, 14, seed=100 + seed)), [1.0, 2.0, 3.0, 4.0]
        points, front = every_point(table, costs), search_thresholds(table, costs)
        for level in range(int(front.correct[0]), int(front.correct[-1]) + 1):
            total += 1
            hits += front.cost[front.cheapest(level)] <= min(c for right, c in points if right >= level) + 1e-9
    assert hits >= 0.95 * total


def test_points_for_a_budget():
    front = search_thresholds(table_of(cached_logits(4, 800)), [1.0, 2.0, 3.0, 4.0])
    assert (np.diff(front.cost) > 0).all() and (np.diff(front.correct) > 0).all()
    level = int(front.correct[5])
    assert front.cheapest(level) == 5 and front.cheapest(level - 0.5) == 5
    assert front.cheapest(10**6) == len(front) - 1
    assert front.most_accurate(float(front.cost[5])) == 5
    between = float(front.cost[5:7].mean())
    assert front.most_accurate(between) == 5 and front.most_accurate(0.1) == 0


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin"])
def test_thresholds_stand_midway_between_neighbours(criterion):
    table = table_of(cached_logits(2, 60), criterion)
    sign = -1 if criterion == "entropy" else 1
    scores = np.sort(table.scores[0])[::-1]
    front = search_thresholds(table, [1.0, 2.0])
    for threshold, enabled in zip(front.thresholds[:, 0], front.enabled[:, 0], strict=True):
        left = int((sign * threshold <= scores).sum())
        assert np.float32(threshold) == threshold and enabled == (left > 0)
        if 0 < left < 60:
            assert sign * threshold == pytest.approx((scores[left - 1] + scores[left]) / 2, abs=1e-7)
    # Where everybody leaves, nobody who comes later may stay: the threshold is beyond every possible score.
    assert front.cost[0] == 1 and front.thresholds[0, 0] == pytest.approx(math.log(5) + 1 if sign < 0 else 0.0)


def test_neighbours_in_float32_are_told_apart():
    """Scores one float32 step apart leave no room between them."""
    values = np.float32(0.7) + np.arange(4, dtype=np.float32) * np.spacing(np.float32(0.7))
    right = np.array([[False, True, True, True], [True, False, False, False]])
    for criterion, sign in (("confidence", 1.0), ("entropy", -1.0)):
        table = ExitTable(criterion, sign * values.astype(np.float64)[None][:, :: int(sign)], right, 5)
        front = search_thresholds(table, [1.0, 2.0])
        assert front.correct[-1] == 4 and front.cost[-1] == 1.25
        taken, answers = table.answers(front.thresholds[-1], front.enabled[-1])
        assert taken.tolist() == [1, 0, 0, 0] and answers.all()


def test_a_gate_that_does_not_pay_is_disabled():
    """The first exit guesses with confidence; the second is as good as the last."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 4, (400,), generator=generator)
    guess = torch.nn.functional.one_hot(torch.randint(0, 4, (400,), generator=generator), 4).float()
    truth = torch.nn.functional.one_hot(target, 4).float()
    noise = torch.rand(3, 400, 4, generator=generator)
    table = table_of(CachedLogits(torch.stack([9 * guess, 90 * truth, 0.1 * truth]) + noise, target))
    front = search_thresholds(table, [1.0, 2.0, 3.0])
    assert front.enabled[-1].tolist() == [False, True] and front.cost[-1] == 2 and front.correct[-1] == 400


def test_joint_is_better_than_greedy():
    """Greedy from the first gate, each with the later ones off, gives away the whole budget at once."""
    table = table_of(cached_logits(5, 2000, seed=8))
    costs = np.arange(1.0, 6.0)
    needed = int(table.correct[-1].sum()) - 20
    thresholds, enabled = np.ones(4), np.zeros(4, dtype=bool)
    for e in range(4):
        enabled[e] = True
        for value in np.sort(table.scores[e])[::-1]:
            before, thresholds[e] = thresholds[e], value
            if table.answers(thresholds, enabled)[1].sum() < needed:
                thresholds[e] = before
                break
    greedy = costs[table.answers(thresholds, enabled)[0]].mean()
    front = search_thresholds(table, costs)
    assert front.cost[front.cheapest(needed)] < greedy


def test_the_same_arguments_give_the_same_front():
    table = table_of(cached_logits(4, 600), "entropy")
    first, second = (search_thresholds(table, [1.0, 2.0, 3.0, 4.0]) for _ in range(2))
    assert np.array_equal(first.thresholds, second.thresholds) and np.array_equal(first.cost, second.cost)


def test_one_exit_has_nothing_to_search():
    table = table_of(cached_logits(1, 9))
    front = search_thresholds(table, [5.0])
    assert front.cost.tolist() == [5.0] and front.thresholds.shape == (1, 0)
    assert front.correct.tolist() == [int(table.correct.sum())]


def test_one_step_of_a_gate_equals_logits_of_any_order():
    """The table does not depend on which other samples there are."""
    logits, target = logits_and_labels(3, 50)
    whole = table_of(CachedLogits(logits, target))
    some = torch.tensor([3, 40, 7])
    part = table_of(CachedLogits(logits[:, some], target[some]))
    assert np.array_equal(whole.select(some.numpy()).scores, part.scores)
    assert np.array_equal(whole.select(some.numpy()).correct, part.correct)
