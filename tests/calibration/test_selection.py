"""The choice of gated exits and thresholds: candidates, cross-validation, and what is said when nothing is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic_exits import logits_and_labels

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext.termination import ExitCache, as_policy, simulate

from aep_ext.ensemble import fit_output_weights
from aep_ext.pruning import mask_of_exits
from aep_ext.training.gating.choice import (
    Choice,
    _entry,
    _search,
    candidate_subsets,
    choose,
    costs_of,
    cross_validate,
    output_weights,
    subset_cache,
)
from aep_ext.training.gating.guarantee import guaranteed

STAGES = (1_000_000, 1_500_000, 2_200_000, 3_000_000)
RULE = as_policy("confidence")


def macs_of(exits: int) -> list[int]:
    """Multiply-adds of every subset: the backbone up to its last exit, and 10,000 for each head."""
    masks = [[e for e in range(exits) if mask >> e & 1] for mask in range(1, 1 << exits)]
    return [STAGES[max(kept)] + 10_000 * len(kept) for kept in masks]


def caches(samples: int, seed: int = 0, exits: int = 3) -> tuple[ExitCache, ExitCache, torch.Tensor]:
    """A fifth for the temperatures, the rest, and whether the last exit alone is right there."""
    logits, target = logits_and_labels(exits, samples, 5, seed)
    cache = ExitCache.from_logits(logits, target, torch.arange(1.0, exits + 1), role="calibration")
    cut = samples // 5
    rest = cache.select(torch.arange(cut, samples))
    return cache.select(torch.arange(cut)), rest, rest.logits[-1].argmax(1) == rest.target


def chosen(samples: int = 1000, seed: int = 0, **options: float | str) -> Choice:
    first, rest, right = caches(samples, seed)
    macs = macs_of(3)
    values = {"budget": 3.0, "caution": 1.0, "seed": 0, "weights": "run", **options}
    return choose(first, rest, right, macs, RULE, limit=macs[mask_of_exits([2]) - 1], **values)


def test_costs_are_those_of_the_extracted_networks() -> None:
    macs = macs_of(4)
    assert costs_of((0, 2, 3), macs) == [macs[0b0001 - 1], macs[0b0101 - 1], macs[0b1101 - 1]]


def test_candidates_have_two_exits_and_begin_below_the_limit() -> None:
    macs = macs_of(4)
    assert len(candidate_subsets(4, macs, 1e12)) == 11
    assert candidate_subsets(4, macs, STAGES[2]) == [s for s in candidate_subsets(4, macs, 1e12) if s[0] < 2]
    assert candidate_subsets(4, macs, macs[0]) == []
    many = candidate_subsets(9, list(range(1, 1 << 9)), 1e12)
    assert {len(subset) for subset in many} == {2, 3, 9} and len(many) == 36 + 84 + 1


def test_the_choice_keeps_the_floor_at_less_cost() -> None:
    choice = chosen()
    assert choice.chosen.keeps and choice.chosen == choice.candidates[0]
    assert choice.chosen.drop + choice.chosen.error <= 3.0 + 1e-9
    cheaper = [one for one in choice.candidates if one.keeps and one.cost < choice.chosen.cost]
    assert not cheaper and len(choice.candidates) == 4
    _, rest, right = caches(1000)
    # The point taken loses at most the tightened budget on the images of the search.
    lost = int(right.sum()) - int(choice.curve.correct[choice.point])
    assert lost <= choice.chosen.target * len(rest) / 100 + 1e-6
    assert choice.chosen.target <= 3.0


def test_the_same_arguments_give_the_same_choice() -> None:
    a, b = chosen(), chosen()
    assert a.chosen == b.chosen and torch.equal(a.curve.thresholds, b.curve.thresholds) and a.point == b.point


def test_caution_costs_and_a_wider_budget_saves() -> None:
    careful, plain, wide = chosen(caution=2.0), chosen(caution=0.0), chosen(caution=0.0, budget=6.0)
    assert careful.chosen.cost >= plain.chosen.cost >= wide.chosen.cost
    assert plain.chosen.drop >= careful.chosen.drop


def test_a_budget_out_of_reach_says_how_near_one_comes() -> None:
    choice = chosen(budget=-50.0)
    assert not choice.chosen.keeps and choice.chosen.drop > -50


def test_cross_validation_is_of_unseen_images() -> None:
    """Labels that logits say nothing of: the search finds right answers on what it sees, not on what it does not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 400, 5, generator=generator)
    target = torch.randint(0, 5, (400,), generator=generator)
    cache = ExitCache.from_logits(logits, target, [1.0, 1.0], role="calibration")
    right = (cache.running[-1].argmax(1) == target).numpy()
    curve = _search(cache, RULE, [1.0, 2.0], torch.ones(2), 0)
    drop, error, cost = cross_validate(cache, right, RULE, [1.0, 2.0], torch.ones(2), np.array([0.0]), 0)
    point = _entry(curve, int(right.sum()), 0.0)
    assert curve.correct[point] >= right.sum()
    assert drop.shape == error.shape == cost.shape == (1,) and error[0] >= 100 / 400
    assert 1.0 <= cost[0] <= 2.0


def test_plain_search_is_optimistic_and_the_choice_is_not() -> None:
    """On images that nothing was chosen on, the search's own thresholds lose more than they seem to; what
    cross-validation chose with a standard error in hand keeps the budget on average."""
    logits, target = logits_and_labels(3, 32_000, 5, seed=7)
    weights = torch.arange(1.0, 4.0)
    judge = ExitCache.from_logits(logits[:, :20_000], target[:20_000], weights, role="report")
    reference = judge.logits[-1].argmax(1) == judge.target
    macs = macs_of(3)
    dropped, naive = [], []
    for draw in range(6):
        rows = torch.arange(20_000 + 2000 * draw, 22_000 + 2000 * draw)
        cache = ExitCache.from_logits(logits[:, rows], target[rows], weights, role="calibration")
        first, rest = cache.select(torch.arange(400)), cache.select(torch.arange(400, 2000))
        right = rest.logits[-1].argmax(1) == rest.target
        choice = choose(
            first,
            rest,
            right,
            macs,
            RULE,
            budget=2.0,
            limit=macs[mask_of_exits([2]) - 1],
            caution=1.0,
            weights="run",
            seed=0,
        )
        assert choice.chosen.keeps
        exits = choice.chosen.exits
        for found, point in ((dropped, choice.point), (naive, _entry(choice.curve, int(right.sum()), 2.0))):
            outcome = simulate(
                judge.logits[list(exits)],
                weights[list(exits)],
                RULE,
                choice.curve.thresholds[point],
                temperatures=choice.curve.temperatures,
                enabled=choice.curve.enabled[point],
                target=judge.target,
            )
            found.append(100 * float(reference.double().mean() - outcome.correct.double().mean()))
    assert np.mean(dropped) <= 2.0 < np.mean(naive)


def test_many_subsets_are_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aep_ext.training.gating.choice.CROSS_VALIDATED", 2)
    lines: list[str] = []
    first, rest, right = caches(400)
    macs = macs_of(3)
    choice = choose(
        first,
        rest,
        right,
        macs,
        RULE,
        budget=2.0,
        limit=macs[3],
        caution=0.0,
        weights="run",
        seed=0,
        progress=lines.append,
    )
    assert len(choice.candidates) == 2 and lines == ["4 subsets: the 2 most promising are cross-validated"]


@pytest.mark.parametrize("policy", ["entropy", "margin", "patience", "vote"])
def test_every_policy(policy: str) -> None:
    first, rest, right = caches(500)
    macs = macs_of(3)
    for judge in ("ensemble", "exit"):
        rule = as_policy(policy, judge)
        choice = choose(
            first, rest, right, macs, rule, budget=3.0, limit=macs[3], caution=0.0, weights="fitted", seed=0
        )
        assert choice.curve.policy == rule and choice.chosen.cost > 0


def test_guarantee_takes_the_cheapest_step_that_holds_on_images_of_its_own() -> None:
    choice = chosen(2000, budget=5.0)
    _, other, right = caches(3000, seed=1)
    exits = choice.chosen.exits
    cache, costs = subset_cache(other, exits, choice.chosen.weights), costs_of(exits, macs_of(3))
    test = guaranteed(choice.curve, cache, right, costs, 0.05, 0.1)
    assert test.step is not None and test.drop <= 5.0 and test.accepted >= 1 and "probability 0.9" in test.text
    none = guaranteed(choice.curve, cache, torch.ones_like(right), costs, 0.001, 0.1)
    assert none.step is None and none.accepted == 0 and "no step of the path" in none.text


def test_weights_of_a_subset_are_the_run_s_or_fitted() -> None:
    first, rest, _ = caches(1000)
    assert output_weights(rest, (0, 2), "run").tolist() == [1.0, 3.0]
    fitted = output_weights(first, (0, 2), "fitted")
    assert fitted.tolist() == pytest.approx(fit_output_weights(first.logits[[0, 2]], first.target).weights)
    part = subset_cache(rest, (0, 2), fitted)
    assert torch.equal(part.logits, rest.logits[[0, 2]]) and torch.equal(part.weights.float(), fitted)


def test_fitted_weights_do_not_let_weak_exits_cost_accuracy() -> None:
    """A run's weights give the early exits a share by their place; where these are poor, all of the answers suffer."""
    logits, target = logits_and_labels(3, 3000, 5, 3)
    logits[0] = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0)) * logits[2].std() * 3
    cache = ExitCache.from_logits(logits, target, torch.ones(3), role="calibration")
    first, rest = cache.select(torch.arange(600)), cache.select(torch.arange(600, 3000))
    right = rest.logits[-1].argmax(1) == rest.target
    correct = {}
    for kind in ("run", "fitted"):
        part = subset_cache(rest, (0, 1, 2), output_weights(first, (0, 1, 2), kind))
        answers = torch.einsum("e,enk->nk", part.weights.double(), part.logits.double()).argmax(1)
        correct[kind] = int((answers == part.target).sum())
    assert correct["fitted"] >= int(right.sum()) - 12 > correct["run"] + 50
