"""The choice of exits and thresholds: candidates, cross-validation, and what cross-validation is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic_exits import cached_logits, logits_and_labels, subset_macs

from aep_ext.calibration import AccuracyBudget, CachedLogits, CostBudget, selection
from aep_ext.calibration.selection import Candidate, Selection, candidate_subsets
from aep_ext.calibration.thresholds import ExitTable, search_thresholds


def problem(logits: CachedLogits, **options) -> Selection:
    """A selection against the last exit alone."""
    values = {
        "logits": logits,
        "reference": (logits.logits[-1].argmax(1) == logits.target).numpy(),
        "costs": np.array(subset_macs(logits.num_exits)),
        "budget": AccuracyBudget(2.0),
        "output_weights": tuple(range(1, logits.num_exits + 1)),
        "criterion": "confidence",
        "criterion_on": "ensemble",
        "num_std_errors": 0.0,
        "folds": 4,
        "seed": 0,
    }
    return Selection(**{**values, **options})


def test_costs_are_those_of_the_extracted_networks():
    logits, macs = cached_logits(4, 5), subset_macs(4)
    by_subset = problem(logits)
    assert by_subset.costs_of((0, 2, 3)).tolist() == [macs[0b0001 - 1], macs[0b0101 - 1], macs[0b1101 - 1]]
    assert by_subset.full_cost == macs[-1]
    by_exit = problem(logits, costs=np.array([1.0, 2.0, 3.0, 4.0]))
    assert by_exit.costs_of((0, 2)).tolist() == [1.0, 3.0] and by_exit.full_cost == 4.0


def test_candidate_subsets():
    assert candidate_subsets(2) == [(0,), (1,), (0, 1)]
    assert len(candidate_subsets(7)) == 127
    many = candidate_subsets(9)
    assert {len(subset) for subset in many} == {1, 2, 3, 9} and len(many) == 9 + 36 + 84 + 1


@pytest.mark.parametrize("criterion_on", ["ensemble", "exit"])
def test_weights_and_temperatures_are_those_of_the_subset(criterion_on):
    logits = cached_logits(3, 800)
    given = problem(logits, output_weights=(1.0, 5.0, 3.0), criterion_on=criterion_on)
    assert given.fit((0, 2)).output_weights == pytest.approx((0.25, 0.75))
    fitted = problem(logits, output_weights="fitted", criterion_on=criterion_on)
    policy = fitted.fit((0, 2))
    weights, temperatures = policy.output_weights, policy.temperatures
    assert policy.exits == (0, 2) and policy.criterion_on == criterion_on and policy.enabled == (False,)
    assert sum(weights) == pytest.approx(1) and weights[1] > 0.7
    # Fitted with the weights or on their own, a temperature is the same optimum.
    again = problem(logits, output_weights=(weights[0], 1.0, weights[1]), criterion_on=criterion_on).fit((0, 2))
    assert again.output_weights == pytest.approx(weights)
    assert again.temperatures == pytest.approx(temperatures, rel=1e-2)
    assert all(np.float32(value) == value for value in [*weights, *temperatures])
    assert fitted.fit((0, 2), np.arange(100)).output_weights != weights


def test_cross_validation_is_by_hand_the_same():
    """Fold by fold with the parts that it is made of."""
    logits = cached_logits(3, 90)
    chosen = problem(logits, folds=3)
    correct, cost = chosen.cross_validate((0, 2), [1.0, 5.0], lambda: None)
    order = np.random.default_rng(0).permutation(90)
    expected = np.zeros((3, 90), dtype=bool)
    total = np.zeros(3)
    for fold in np.array_split(order, 3):
        seen = np.array([row for row in range(90) if row not in fold])
        table = ExitTable.of(logits.select_exits((0, 2)), chosen.fit((0, 2), seen))
        front = search_thresholds(table.select(seen), chosen.costs_of((0, 2)))
        for row, target in enumerate([1.0, 5.0]):
            point = front.cheapest(chosen.reference[seen].sum() - target * 0.6)
            taken, right = table.select(fold).answers(front.thresholds[point], front.enabled[point])
            expected[row, fold] = right
            total[row] += chosen.costs_of((0, 2))[taken].sum()
        expected[2, fold] = table.correct[-1, fold]
        total[2] += chosen.costs_of((0, 2))[-1] * 30
    assert np.array_equal(correct, expected)
    assert cost == pytest.approx(total / 90)


def test_the_cheapest_that_qualifies_is_chosen():
    logits = cached_logits(3, 600)
    found = problem(logits).candidates(candidate_subsets(3))
    assert len(found) == 7 and {one.exits for one in found} == set(candidate_subsets(3))
    best = found[0]
    assert best.qualifies and best.drop_points <= 2.0
    assert all(one.mean_cost >= best.mean_cost / 1.02 for one in found if one.qualifies)
    low, high = best.interval
    assert low < best.drop_points < high and best.std_error > 0


def test_standard_errors_cost_and_a_wider_budget_saves():
    logits = cached_logits(3, 600)
    careful, plain, wide = (
        problem(logits, num_std_errors=k, budget=AccuracyBudget(b)).candidates(candidate_subsets(3))[0]
        for k, b in ((1.0, 2.0), (0.0, 2.0), (0.0, 6.0))
    )
    assert careful.mean_cost > plain.mean_cost > wide.mean_cost
    assert careful.drop_points + careful.std_error <= 2.0 and wide.drop_points > plain.drop_points


def test_a_cost_budget_takes_the_most_accurate_within():
    logits = cached_logits(3, 600)
    found = problem(logits, budget=CostBudget(fraction=0.6)).candidates(candidate_subsets(3))
    limit = 0.6 * subset_macs(3)[-1]
    assert found[0].qualifies and found[0].mean_cost <= limit
    assert all(one.drop_points >= found[0].drop_points for one in found if one.qualifies)
    none = problem(logits, budget=CostBudget(mean=1.0)).candidates(candidate_subsets(3))
    assert not none[0].qualifies and none[0].exits == (0,)


def test_about_equal_costs_are_told_apart_by_the_drop():
    chosen = problem(cached_logits(2, 10))

    def candidate(exits, drop, cost, qualifies=True):
        return Candidate(exits, 0.0, drop, 0.1, (0.0, 0.0), cost, qualifies)

    near, good, dear = candidate((0, 1), 1.9, 100.0), candidate((1,), 0.2, 101.0), candidate((0,), 0.0, 110.0)
    assert chosen.choose([near, good, dear, candidate((1,), 5.0, 1.0, False)]) is good
    assert chosen.choose([near, dear]) is near
    assert chosen.choose([candidate((0,), 9.0, 1.0, False), (least := candidate((1,), 3.0, 99.0, False))]) is least


def test_labels_of_which_logits_say_nothing():
    """The search finds right answers on what it sees, not on what it does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 300, 5, generator=generator)
    chosen = problem(CachedLogits(logits, torch.randint(0, 5, (300,), generator=generator)))
    table = ExitTable.of(chosen.logits, chosen.fit((0, 1, 2)))
    front = search_thresholds(table, chosen.costs_of((0, 1, 2)))
    correct, _ = chosen.cross_validate((0, 1, 2), [-100.0], lambda: None)
    assert front.correct[-1] > table.correct.sum(axis=1).max() + 3
    assert correct[0].sum() < front.correct[-1] - 5


def test_plain_search_is_optimistic_and_cross_validation_is_not():
    """On images that nothing was chosen on, thresholds that just keep the budget where they were searched lose more."""
    logits, target = logits_and_labels(3, 32_000, 5, seed=7)
    people = problem(CachedLogits(logits[:, :20_000], target[:20_000]))
    dropped, naive = [], []
    for draw in range(6):
        rows = torch.arange(20_000 + 2000 * draw, 22_000 + 2000 * draw)
        chosen = problem(CachedLogits(logits[:, rows], target[rows]), num_std_errors=1.0)
        best = chosen.candidates([(0, 1, 2), (0, 2)])[0]
        assert best.qualifies
        policy = chosen.fit(best.exits)
        table = ExitTable.of(chosen.logits.select_exits(best.exits), policy)
        front = search_thresholds(table, chosen.costs_of(best.exits))
        elsewhere = ExitTable.of(people.logits.select_exits(best.exits), policy)
        for target_points, found in ((best.target, dropped), (2.0, naive)):
            point = chosen.point(front, target_points, chosen.reference)
            right = elsewhere.answers(front.thresholds[point], front.enabled[point])[1]
            found.append(100 * (people.reference.mean() - right.mean()))
    assert np.mean(dropped) <= 2.0 < np.mean(naive)


def test_many_subsets_are_screened(monkeypatch):
    monkeypatch.setattr(selection, "CROSS_VALIDATED", 2)
    done = []
    found = problem(cached_logits(3, 200), folds=2).candidates(
        candidate_subsets(3), progress=lambda n, total: done.append((n, total))
    )
    assert len(found) == 2 and done == [(n, 7 + 2 * 2) for n in range(1, 12)]


def test_fitted_weights_do_not_let_weak_exits_cost_accuracy():
    """Weights by position give the early exits a share; where these are poor, all of the answers suffer."""
    logits, target = logits_and_labels(3, 3000, 5, 3)
    logits[0] = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0)) * logits[2].std() * 3
    cached = CachedLogits(logits, target)
    right = {
        kind: problem(cached, output_weights=kind).cross_validate((0, 1, 2), [], lambda: None)[0].sum()
        for kind in ("fitted", (1.0, 1.0, 1.0))
    }
    reference = problem(cached).reference.sum()
    assert right["fitted"] >= reference - 12 > right[(1.0, 1.0, 1.0)] + 50
