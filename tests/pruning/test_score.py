from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aep_ext import ops, prune, score_subsets
from aep_ext.pruning import (
    SubsetCosts,
    SubsetScores,
    count_macs,
    count_parameters,
    exits_of_mask,
    mask_of_exits,
    pareto_front,
    score_logits,
    subset_correctness,
)


def brute_force(logits: torch.Tensor, weights: list[float], target: torch.Tensor) -> list[list[int]]:
    """Counts by a stable sort of every row: top-1 and top-min(5, K) of every subset."""
    rows = []
    for mask in range(1, 1 << logits.shape[0]):
        total = torch.zeros(logits.shape[1:], dtype=logits.dtype)
        for e in exits_of_mask(mask):
            total = total + logits[e] * weights[e]
        right = [0, 0]
        for row, label in zip(total, target.tolist(), strict=True):
            if not row.isnan().any():
                order = torch.argsort(row, descending=True, stable=True).tolist()
                right[0] += order[0] == label
                right[1] += label in order[:5]
        rows.append(right)
    return rows


@given(st.sets(st.integers(0, 20), min_size=1))
def test_masks_and_tuples_are_the_same_thing(exits):
    mask = mask_of_exits(exits)
    assert exits_of_mask(mask) == tuple(sorted(exits))
    assert mask == sum(2**e for e in exits)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_counts_on_cached_logits(data):
    exits, samples, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    # Few distinct values, so that ties are common.
    values = data.draw(
        hnp.arrays(
            np.float32,
            (exits, samples, classes),
            elements=st.sampled_from([-1.0, 0.0, 0.5, 1.0, np.nan, np.inf, -np.inf]),
        )
    )
    logits = torch.from_numpy(values)
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=samples, max_size=samples)))
    weights = data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=exits, max_size=exits))
    scores = score_logits(logits, weights, target, keep_correct=True)
    assert scores.counts.tolist() == brute_force(logits, weights, target)
    assert torch.equal(scores.correct.sum(dim=1), scores.counts[:, 0])
    assert torch.equal(scores.correct, subset_correctness(logits, weights, target))


def test_a_loader_is_scored_in_batches(net, batches):
    net.stages[0].eval()
    seen: list[int] = []
    scores = score_subsets(net, iter(batches), keep_correct=True, progress=seen.append)
    assert net.training and not net.stages[0].training and net.stages[1].training
    assert seen == [13, 26, 31] and scores.n == 31 and scores.num_exits == 4 and len(scores) == 15
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net.exit_logits(x) for x, _ in batches], dim=1)
    target = torch.cat([y for _, y in batches])
    expected = score_logits(logits, net.output_weights, target, keep_correct=True)
    assert torch.equal(scores.counts, expected.counts) and torch.equal(scores.correct, expected.correct)
    for score in scores:
        with torch.no_grad():
            answers = torch.cat([prune(net, score, normalize=False)(x) for x, _ in batches]).argmax(dim=1)
        assert score.correct1 == int((answers == target).sum())
        assert score.top1 == score.correct1 / 31 == scores.top1[score.mask - 1]
        assert score.top5 == score.correct5 / 31 == scores.top5[score.mask - 1]
    assert not scores.counts.is_inference()


def test_costs_and_latency_are_those_of_the_extracted_networks(net, batches):
    scores = score_subsets(net, batches, latency={"warmup": 0, "repeats": 3})
    for score in scores:
        pruned = prune(net, score)
        assert score.parameters == count_parameters(pruned)
        assert score.macs == count_macs(pruned, (3, 16, 16))
        assert score.latency.repeats == 3 and 0 < score.latency.p5 <= score.latency_ms <= score.latency.p99
    assert score_subsets(net, batches).latency is None
    assert score_subsets(net, batches, example=(3, 32, 32)).macs[0] > scores.macs[0]
    assert len(score_subsets(prune(net, (0, 1)), batches, latency={"repeats": 1}).latency) == 3


def test_lists_int32_labels_and_extra_entries_are_taken(net, batches):
    expected = score_subsets(net, batches)
    other = [[x, y.to(torch.int32), "name"] for x, y in batches]
    assert torch.equal(score_subsets(net, other).counts, expected.counts)
    assert torch.equal(score_subsets(net, [(x, y.tolist()) for x, y in batches]).counts, expected.counts)


@pytest.mark.parametrize(
    ("loader", "kind", "message"),
    [
        ([], ValueError, "at least one sample, got none"),
        ([(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))], ValueError, "at least one sample, got none"),
        ([torch.zeros(2, 3, 8, 8)], TypeError, r"loader must yield \(x, y\) batches, .*, got Tensor"),
        ([("x", [0])], TypeError, "loader must yield tensors, .* got tuple of str, list"),
        ([(torch.zeros(2, 3, 8, 8), [0])], ValueError, r"y must be integers of shape \[2\]"),
        (
            [(torch.zeros(2, 3, 8, 8), torch.zeros(2))],
            ValueError,
            r"y must be integers of shape \[2\], got torch.float32",
        ),
        ([(torch.zeros(1, 3, 8, 8), [7])], IndexError, r"score_subsets: target must be within 0\.\.6, got 7"),
    ],
)
def test_bad_loaders_are_refused_and_modes_restored(net, loader, kind, message):
    with pytest.raises(kind, match=message):
        score_subsets(net, loader)
    assert net.training and all(module.training for module in net.modules())


def test_other_bad_arguments_are_refused(net):
    with pytest.raises(TypeError, match="score_subsets: net must be a MultiExitNet, got Linear"):
        score_subsets(torch.nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"score_logits: exit_logits must have shape \[E, N, K\], got \[2, 3\]"):
        score_logits(torch.zeros(2, 3), [1.0, 1.0], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one sample"):
        score_logits(torch.zeros(2, 0, 3), [1.0, 1.0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="exit_ids must have 2 entries, got 1"):
        score_logits(torch.zeros(2, 1, 3), [1.0, 1.0], torch.zeros(1, dtype=torch.int64), exit_ids=[0])
    with pytest.raises(ValueError, match=r"subset_correctness: exit_logits must have shape"):
        subset_correctness(torch.zeros(17, 1, 3), [1.0] * 17, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights must have shape \[2\] and target \[1\], got \[1\]"):
        subset_correctness(torch.zeros(2, 1, 3), [1.0], torch.zeros(1, dtype=torch.int64))


def _scores(counts, **costs) -> SubsetScores:
    exits = len(counts).bit_length()
    return SubsetScores(torch.tensor(counts), 100, tuple(range(exits)), **costs)


def test_the_rule_of_choice():
    costs = {"parameters": (10, 30, 35), "macs": (100, 300, 310)}
    assert _scores([[5, 9], [6, 8], [6, 8]], **costs).best().mask == 2  # top-1, then the cheaper
    assert _scores([[5, 9], [6, 8], [6, 9]], **costs).best().mask == 3  # top-5 breaks the tie
    equal = [[5, 9]] * 3
    assert _scores(equal, parameters=(10, 30, 5), macs=(100, 300, 100)).best().mask == 3  # then parameters
    assert _scores(equal, **costs).best().mask == 1
    assert _scores(equal).best().mask == 1  # without costs: the earlier last exit
    assert _scores([[4, 9], [5, 9], [5, 9]]).best().mask == 2  # then fewer exits
    # One correct sample more wins, however many there are: no rounded percentages.
    assert SubsetScores(torch.tensor([[10**9, 0], [10**9 + 1, 0], [0, 0]]), 2 * 10**9, (0, 1)).best().mask == 2


def test_look_up_and_round_trip(net, batches):
    scores = score_subsets(net, batches, latency={"repeats": 2})
    again = SubsetScores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert list(again) == list(scores) and again.best() == scores.best()
    assert scores[(0, 2)] == scores[0b101] and scores[(0, 2)].exits == (0, 2)
    assert scores[np.int64(5)] == scores[np.array([0, 2])] == scores[torch.tensor([0, 2])] == scores[5]
    assert list(scores.masks) == list(range(1, 16))
    plain = _scores([[1, 2]] * 3)
    assert list(SubsetScores.from_dict(plain.to_dict())) == list(plain)
    assert plain[1].latency_ms is None
    for bad in (0, 4, (2,)):
        with pytest.raises(IndexError, match=r"mask must be within 1\.\.3"):
            plain[bad]
    with pytest.raises(ValueError, match=r"counts must be int64 of shape \[3, 2\]"):
        SubsetScores(torch.zeros(2, 2, dtype=torch.int64), 1, (0, 1))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        SubsetScores(torch.zeros(1, 2, dtype=torch.int64), 0, (0,))
    with pytest.raises(ValueError, match="macs must have 3 entries, got 1"):
        SubsetScores(torch.zeros(3, 2, dtype=torch.int64), 1, (0, 1), macs=(1,))


def test_costs_given_with_cached_logits():
    logits, target = torch.randn(2, 6, 3), torch.randint(0, 3, (6,))
    scores = score_logits(logits, torch.tensor([0.5, 0.5]), target, costs=SubsetCosts((1, 2, 3), (4, 5, 6)))
    assert scores[3].parameters == 3 and scores[3].macs == 6
    assert torch.equal(scores.counts, ops.subset_correct(logits, torch.tensor([0.5, 0.5]), target))


def test_scores_print_as_a_table(net, batches):
    scores = score_subsets(net, batches)
    title, head, *rows = str(scores).splitlines()
    assert title.startswith("SubsetScores: 15 subsets of 4 exits, 31 samples") and len(rows) == 15
    assert head.split() == ["exits", "top-1", "%", "top-5", "%", "NLL", "parameters", "multiply-adds"]
    best, front = scores.best(), {score.exits for score in pareto_front(scores)}
    figures = (
        f"{best.exits} {100 * best.top1:.2f} {100 * best.top5:.2f} {best.nll:.4f} {best.parameters:,} {best.macs:,}"
    )
    assert " ".join(rows[0].split()) == f"best {figures}"
    marked = [row for row in rows if row.lstrip().startswith(("best", "*"))]
    assert len(marked) == len(front) and all(any(str(exits) in row for exits in front) for row in marked)
    html = scores._repr_html_()
    assert html.count("<tr>") == 16 and f"<td>best</td><td>{best.exits}</td>" in html


def test_a_long_table_shows_the_best_twenty():
    logits, target = torch.randn(6, 40, 5), torch.randint(5, (40,))
    scores = score_logits(logits, [1.0] * 6, target)
    title, head, *rows = str(scores).splitlines()
    assert title == "SubsetScores: the best 20 of 63 subsets of 6 exits, 40 samples" and len(rows) == 20
    assert "multiply-adds" not in head  # not counted
    shown = [float(row.split(")")[1].split()[0]) for row in rows]
    assert shown == sorted(shown, reverse=True) and shown[0] == round(100 * scores.best().top1, 2)
