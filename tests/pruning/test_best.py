"""Choosing a subset: objectives, constraints, confidence, and the record of the choice."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aep_ext import GatedNet, load, prune, save, score_subsets
from aep_ext.export import describe
from aep_ext.inference import ExitPolicy
from aep_ext.pruning import (
    OBJECTIVES,
    Latency,
    SubsetScores,
    non_inferiority_test,
    pareto_front,
    parse_constraints,
    score_logits,
    subset_nll,
)
from aep_ext.pruning.objectives import MEASURES, Limit

N = 200


def _latency(ms: float) -> Latency:
    return Latency(ms, ms, ms, ms, ms, 1)


@st.composite
def random_scores(draw) -> SubsetScores:
    """Scores of 1 to 4 exits with many ties, every measure known."""
    exits = draw(st.integers(1, 4))
    small = st.lists(st.integers(1, 5), min_size=2**exits - 1, max_size=2**exits - 1)
    top1, top5, macs, parameters, ms = (draw(small) for _ in range(5))
    nll = [float(x) for x in draw(small)]
    if draw(st.booleans()):
        nll[0] = math.nan
    return SubsetScores(
        torch.tensor([top1, top5]).T.contiguous(),
        N,
        tuple(range(exits)),
        parameters=tuple(parameters),
        macs=tuple(macs),
        latency=tuple(map(_latency, ms)),
        nll=torch.tensor(nll, dtype=torch.float64),
    )


def value(score, name: str) -> float:
    """Larger is better."""
    found = MEASURES[name] * score.measure(name)
    return -math.inf if math.isnan(found) else found


def published_key(score) -> tuple:
    return -score.correct1, -score.correct5, score.macs, score.parameters, score.mask


two_measures = st.permutations(list(MEASURES)).map(lambda names: names[:2])


@settings(deadline=None)
@given(random_scores(), two_measures)
def test_the_front_is_what_no_other_beats(scores, axes):
    points = {tuple(value(score, name) for name in axes) for score in scores}
    front = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)}
    front = {p for p in front if p[1] > -math.inf}
    found = pareto_front(scores, *axes)
    assert [tuple(value(score, name) for name in axes) for score in found] == sorted(front, reverse=True)
    for score in found:  # of equal points the one that the published rule prefers
        twins = [one for one in scores if all(value(one, name) == value(score, name) for name in axes)]
        assert score == min(twins, key=published_key)


@pytest.mark.parametrize("axes", [("top1", "beauty"), ("top1", "top1"), ("mac", "top1")])
def test_a_front_needs_two_measures(axes):
    scores = score_logits(torch.randn(2, 5, 3), [0.5, 0.5], torch.randint(3, (5,)))
    with pytest.raises(ValueError, match="pareto_front: x and y must be two of top1, top5, nll, macs"):
        pareto_front(scores, *axes)
    with pytest.raises(ValueError, match="macs was not measured"):
        pareto_front(scores)


@settings(deadline=None)
@given(random_scores(), st.sampled_from(OBJECTIVES), st.data())
def test_the_choice_is_the_best_that_meets_every_constraint(scores, objective, data):
    limits = {
        "top1": data.draw(st.sampled_from([None, 2 / N, "-0.5", "1.5%"])),
        "nll": data.draw(st.sampled_from([None, 3, "150%", "+1"])),
        "macs": data.draw(st.sampled_from([None, 2, "50%"])),
    }
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    reference = data.draw(st.sampled_from([None, *scores]))
    base = scores[scores.num_subsets] if reference is None else reference
    if math.isnan(base.nll) and isinstance(limits.get("nll"), str):
        limits.pop("nll")
    bounds = {
        "top1": {2 / N: 2 / N, "-0.5": base.top1 - 0.005, "1.5%": 0.015},
        "nll": {3: 3, "150%": 1.5 * base.nll, "+1": base.nll + 1},
        "macs": {2: 2, "50%": 0.5 * base.macs},
    }
    met = [
        score
        for score in scores
        if all(value(score, name) >= MEASURES[name] * bounds[name][limits[name]] - 1e-9 for name in limits)
    ]
    if not met:
        with pytest.raises(
            ValueError, match=r"SubsetScores.best: no subset (has|with) .*: the nearest, exits \("
        ) as info:
            scores.best(objective, constraints=limits, reference=reference)
        assert "\n" not in str(info.value)
        return
    found = scores.best(objective, constraints=limits, reference=reference)
    first = "top1" if objective == "published" else objective
    assert found == min(met, key=lambda score: (-value(score, first), *published_key(score)))
    said = found.selection
    assert said["objective"] == objective and said["constraints"] == limits and said["meeting_constraints"] == len(met)
    assert said["exits"] == list(found.exit_ids) and said["top1"] == found.top1 and said["images"] == N
    assert said["exhaustive"] and said["subsets"] == said["scored"] == len(scores)
    assert json.loads(json.dumps(said, allow_nan=False)) == said


@settings(deadline=None)
@given(random_scores())
def test_the_published_rule_is_the_default(scores):
    assert scores.best() == scores.best("published") == scores.best("top1") == min(scores, key=published_key)


def _plain(**costs) -> SubsetScores:
    counts = torch.tensor([[5, 9], [6, 8], [7, 7]])
    return SubsetScores(counts, 100, (0, 1), parameters=(10, 30, 35), macs=(100, 300, 310), **costs)


def test_infeasible_constraints_say_which_and_how_near():
    scores = _plain()
    for constraints, message in (
        ({"macs": 99}, r"no subset has macs at most 99: the nearest, exits \(0,\), has 100"),
        ({"top1": "8%", "macs": 400}, r"no subset has top1 at least 8.00 %: the nearest, exits \(0, 1\), has 7.00 %"),
        (
            {"top1": 0.06, "parameters": 10},
            r"no subset with top1 at least 6.00 % has parameters at most 10: the nearest, exits \(1,\), has 30",
        ),
        (
            ["macs=50%", "top1=-1"],
            r"no subset with macs at most 155 has top1 at least 6.00 %: the nearest, exits \(0,\), has 5.00 %",
        ),
    ):
        with pytest.raises(ValueError, match=f"^SubsetScores.best: {message}$"):
            scores.best("macs", constraints=constraints)
    assert scores.best("macs", constraints={"top1": "-1"}).exits == (1,)
    assert scores.best("macs", constraints="top1=-1").exits == (1,)
    assert scores.best("macs", constraints={"top1": "-1"}, reference=scores[(1,)]).exits == (0,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top1": 90}, r"the constraint on top1 must be a fraction \(0.9\), '90%', or signed points .*, got 90$"),
        ({"top1": -0.5}, r"top1 must be .* \('-0.5'\), got -0.5$"),
        ({"top5": "-0.5%"}, "top5 must be .* got '-0.5%'"),
        ({"top1": "-101"}, "top1 must be .* got '-101'"),
        ({"macs": "-5"}, "macs must be a positive number, or '50%' of the reference's, got '-5'"),
        ({"macs": "<=50%"}, "macs must be .*, got '<=50%'"),
        ({"macs": 0}, "macs must be a positive number.*, got 0"),
        ({"latency": "nan"}, "latency must be .* got 'nan'"),
        ({"latency": math.inf}, "latency must be .* got inf"),
        ({"parameters": True}, "parameters must be .* got True"),
        ({"parameters": None}, "parameters must be .* got None"),
        ({"nll": "+-1"}, r"nll must be .* or signed nats against the reference \('\+0.01'\), got"),
        ({"speed": 1}, "constraints must be on top1, top5, nll, macs, parameters, latency, got 'speed'"),
        (["top1"], "a constraint must be MEASURE=LIMIT, for example macs=50%, got 'top1'"),
        (["macs=1", "macs=2"], "constraints must be on different measures, got macs, macs"),
    ],
)
def test_malformed_constraints(given, message):
    with pytest.raises(ValueError, match=message):
        _plain().best("macs", constraints=given)


def test_the_forms_of_a_limit():
    forms = {("top1", 0.9): (0.9, ""), ("top1", "90%"): (0.9, ""), ("top5", "-0.5"): (-0.005, "+")}
    forms |= {("macs", 1000): (1000, ""), ("macs", " 50% "): (0.5, "*"), ("parameters", "1e6"): (1e6, "")}
    forms |= {("nll", "+0.01"): (0.01, "+"), ("latency", "2.5"): (2.5, ""), ("nll", "110%"): (1.1, "*")}
    for (name, text), (number, relation) in forms.items():
        assert Limit.parse(name, text) == Limit(name, pytest.approx(number), relation, text)
    assert parse_constraints(None) == () == parse_constraints({})


def test_other_refusals():
    scores = _plain()
    with pytest.raises(ValueError, match="objective must be one of published, top1, .*, latency, got 'speed'"):
        scores.best("speed")
    for call in (lambda: scores.best("latency"), lambda: scores.best(constraints={"nll": 1})):
        with pytest.raises(ValueError, match="(latency|nll) was not measured"):
            call()
    with pytest.raises(ValueError, match="needs the reference's latency, which is unknown"):
        scores.best(constraints={"latency": "50%"})


def _answers(right: list[int], n: int = 2000, **options) -> SubsetScores:
    """Two exits; exit e is right on all but the first ``n - right[e]`` samples."""
    target, logits = torch.zeros(n, dtype=torch.int64), torch.zeros(2, n, 3)
    for e, count in enumerate(right):
        logits[e, : n - count, 1] = 1
        logits[e, n - count :, 0] = 1
    return score_logits(logits, [0.4, 0.6], target, keep_correct=True, **options)


def test_confidence_holds_the_interval_against_the_margin():
    scores = _answers([1784, 1800])  # the first exit is 0.8 points below, the interval's low end below one point
    test = non_inferiority_test(scores.correct[0], scores.correct[2], 0.01)
    assert -0.02 < test.low < -0.01 < test.difference
    costs = {"macs": (10, 20, 21), "parameters": (1, 2, 3)}
    macs = SubsetScores(scores.counts, scores.n, scores.exit_ids, correct=scores.correct, **costs)
    assert macs.best("macs", constraints={"top1": "-1"}).exits == (0,)
    found = macs.best("macs", constraints={"top1": "-1"}, confidence=0.95)
    assert found.exits == (1,) and found.selection["tested"] == 2 and found.selection["confidence"] == 0.95
    assert found.selection["non_inferiority"]["low"] > -0.01
    wide = macs.best("macs", constraints={"top1": "-2"}, confidence=0.95)
    assert wide.exits == (0,) and wide.selection["non_inferiority"]["margin"] == 0.02
    # Another network on the same samples as the reference.
    single = score_logits(torch.eye(3)[torch.zeros(1, 2000, dtype=torch.int64)], [1.0], torch.zeros(2000).long())
    with pytest.raises(ValueError, match=r"and of the reference \(keep_correct=True\), got none"):
        macs.best("macs", constraints={"top1": "-11"}, reference=single, confidence=0.9)
    single = score_logits(
        torch.eye(3)[torch.zeros(1, 2000, dtype=torch.int64)], [1.0], torch.zeros(2000).long(), keep_correct=True
    )
    with pytest.raises(
        ValueError, match=r"margin of 10\.1 points .* confidence 0\.95: the nearest, exits \(1,\), differs"
    ):
        macs.best("macs", constraints={"top1": "-10.1"}, reference=single, confidence=0.95)
    assert macs.best("macs", constraints={"top1": "-13"}, reference=single, confidence=0.95).exits == (0,)


def test_confidence_needs_a_margin_and_the_answers():
    scores = _answers([1784, 1800])
    for constraints in (None, {"top1": 0.9}, {"top1": "+0.5"}):
        with pytest.raises(ValueError, match="confidence needs a margin to be shown, a constraint such as top1='-0.5'"):
            scores.best(constraints=constraints, confidence=0.95)
    with pytest.raises(ValueError, match=r"\(keep_correct=True\), got none"):
        _plain().best(constraints={"top1": "-0.5"}, confidence=0.95)
    with pytest.raises(ValueError, match=r"confidence must be within \(0, 1\), got 2"):
        scores.best(constraints={"top1": "-0.5"}, confidence=2)


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_s_exact_p_value(only_a, only_b):
    a = torch.tensor([True] * only_a + [False] * only_b + [True])
    b = torch.tensor([False] * only_a + [True] * only_b + [True])
    pairs, fewer = only_a + only_b, min(only_a, only_b)
    expected = min(1.0, 2 * sum(math.comb(pairs, k) for k in range(fewer + 1)) / 2**pairs)
    assert non_inferiority_test(a, b, 0.1).p_value == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_nll_is_that_of_the_pruned_network_s_answers(net, batches, dtype):
    if dtype == torch.float32:
        scores = score_subsets(net, batches)
        target = torch.cat([y for _, y in batches])
        for score in scores:
            with torch.no_grad():
                logits = torch.cat([prune(net, score).eval()(x) for x, _ in batches])
            expected = torch.nn.functional.cross_entropy(logits.double(), target)
            assert score.nll == pytest.approx(float(expected), rel=1e-5)
        assert score_subsets(net, batches, nll=False).nll is None
    logits, target = torch.randn(3, 50, 4, dtype=torch.float64).to(dtype), torch.randint(4, (50,))
    weights = torch.tensor([0.2, 0.3, 0.5])
    total = subset_nll(logits, weights, target)
    mixed = (0.2 * logits[0].double() + 0.5 * logits[2].double()) / 0.7
    assert float(total[0b101 - 1]) == pytest.approx(
        float(torch.nn.functional.cross_entropy(mixed, target, reduction="sum")), rel=1e-5
    )
    assert total.dtype == torch.float64


def test_an_nll_without_a_value(tmp_path):
    logits = torch.randn(2, 6, 3)
    logits[0, 0] = math.nan
    scores = score_logits(logits, [0.5, 0.5], torch.tensor([0, 1, 2, 0, 1, 2]))
    assert scores.nll.isnan().tolist() == [True, False, True] and scores.best("nll").exits == (1,)
    again = SubsetScores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    assert torch.equal(again.nll.isnan(), scores.nll.isnan()) and again.nll[1] == scores.nll[1]
    # -inf is a class that an exit rules out; a label that is no class has no likelihood.
    logits = torch.tensor([[[0.0, -math.inf, 0.0]], [[0.0, 0.0, 0.0]]])
    assert subset_nll(logits, [1.0, 1.0], torch.tensor([0])).tolist() == pytest.approx(
        [math.log(2), math.log(3), math.log(2)]
    )
    assert subset_nll(logits, [1.0, 1.0], torch.tensor([7])).isnan().all()


def test_prune_keeps_the_record_of_the_choice_and_files_do_too(net, batches, tmp_path):
    scores = score_subsets(net, batches, split="val")
    small = prune(net, scores, objective="macs", constraints={"top1": "-50", "macs": "60%"})
    said = small.selection
    assert (
        small.exit_ids == tuple(said["exits"])
        and said == scores.best("macs", constraints={"top1": "-50", "macs": "60%"}).selection
    )
    assert (said["objective"], said["split"], said["images"], said["subsets"]) == ("macs", "val", 31, 15)
    assert said["exhaustive"] is True and said["limits"]["macs"] == pytest.approx(0.6 * scores[15].macs)
    save(small, tmp_path / "a")
    assert load(tmp_path / "a").selection == said == describe(tmp_path / "a")["metadata"]["selection"]
    save(load(tmp_path / "a"), tmp_path / "b", metadata={"mine": 1})
    assert describe(tmp_path / "b")["metadata"] == {"selection": said, "mine": 1}
    # All exits of it: the same choice. Some of them, or a choice by hand: no longer.
    assert prune(small, range(small.num_exits)).selection == said
    two = prune(net, scores[(0, 2)])
    assert two.selection is None and prune(net, (0, 2)).selection is None
    chosen = prune(net, scores, constraints={"top1": 0}).eval()
    assert prune(chosen, (0,)).selection == (chosen.selection if chosen.num_exits == 1 else None)
    gates = chosen.num_exits - 1
    policy = ExitPolicy(
        output_weights=tuple(chosen.output_weights.tolist()), thresholds=(0.5,) * gates, exits=chosen.exit_ids
    )
    save(GatedNet(chosen, policy), tmp_path / "gated")
    assert load(tmp_path / "gated").net.selection == chosen.selection


def test_an_objective_needs_scores(net, batches):
    with pytest.raises(ValueError, match="prune: objective, .* choose among SubsetScores, got tuple"):
        prune(net, (0,), objective="macs")
    scores = score_subsets(net, batches)
    with pytest.raises(ValueError, match="choose among SubsetScores, got SubsetScore$"):
        prune(net, scores.best(), constraints={"top1": 0.5})
