"""More than 16 exits: a beam search, and what is said of the subsets that it left out."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aep_ext import MultiExitNet, prune, score_subsets
from aep_ext.pruning import SubsetCosts, SubsetScores, count_macs, count_parameters, score_logits, subset_costs
from aep_ext.surgery.heads import PooledLinearHead


def _exits(exits: int, samples: int, seed: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as trained exits give them: later ones are better, all share part of their errors."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    shared = torch.randn(1, samples, classes, generator=generator)
    own = torch.randn(exits, samples, classes, generator=generator)
    signal = torch.linspace(0.8, 2.0, exits)[:, None, None] * nn.functional.one_hot(target, classes)
    return signal + 0.7 * shared + own, target


@pytest.mark.parametrize("exits", [6, 9, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_beam_against_every_subset(exits, seed):
    logits, target = _exits(exits, 300, seed)
    weights = torch.linspace(0.1, 1.0, exits)
    every = score_logits(logits, weights, target, keep_correct=True, nll=True)
    beam = score_logits(logits, weights, target, keep_correct=True, beam=16)
    assert every.exhaustive and len(beam) < (1.01, 0.8, 0.4)[exits // 3 - 2] * len(every)
    for score in beam:  # what it scores is exact
        same = every[score.mask]
        assert (score.correct1, score.correct5) == (same.correct1, same.correct5)
        assert score.nll == pytest.approx(same.nll, rel=1e-5)
    rows = torch.tensor(beam.masks) - 1
    assert torch.equal(beam.correct, every.correct[rows])
    # It finds the best of all, or one that is right on one sample in 300 less.
    assert every.best().correct1 - beam.best().correct1 <= 1
    assert every.best().correct1 <= beam.upper_bound <= 300


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 4), st.integers(0, 10**6))
def test_no_subset_exceeds_the_bound(exits, samples, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (exits, samples, classes), generator=generator).float()
    target = torch.randint(classes, (samples,), generator=generator)
    weights = torch.rand(exits, generator=generator) + 0.01
    every = score_logits(logits, weights, target)
    beam = score_logits(logits, weights, target, beam=1)
    assert int(every.counts[:, 0].max()) <= beam.upper_bound <= samples
    assert set(beam.masks) <= set(every.masks) and {(2 << e) - 1 for e in range(exits)} <= set(beam.masks)
    beaten = (logits > logits.gather(2, target.expand(exits, -1)[..., None])).all(0).any(1)
    assert beam.upper_bound == samples - int(beaten.sum())


def test_a_wide_beam_sees_every_subset():
    logits, target = _exits(5, 50, 0)
    every, beam = (score_logits(logits, [0.2] * 5, target, beam=beam) for beam in (None, 40))
    assert beam.exhaustive and beam.masks == tuple(every.masks) and torch.equal(beam.counts, every.counts)


@pytest.fixture
def deep() -> MultiExitNet:
    stages = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()) for _ in range(20)]
    return MultiExitNet(stages, [PooledLinearHead(3, 4) for _ in range(20)], num_classes=4)


def _loader() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, 3, 4, 4), torch.randint(4, (n,))) for n in (20, 7)]


def test_a_network_of_twenty_exits(deep, tmp_path):
    batches = _loader()
    scores = score_subsets(deep, iter(batches), beam=2, keep_correct=True, split="val")
    assert scores.n == 27 and scores.num_subsets == 2**20 - 1 and not scores.exhaustive and scores.beam == 2
    best = scores.best()
    assert best.selection["scored"] == len(scores) < best.selection["subsets"] == 2**20 - 1
    assert best.selection["exhaustive"] is False and best.selection["upper_bound"] == scores.upper_bound / 27
    small = prune(deep, scores, objective="macs", constraints={"top1": "-20"})
    cheapest = scores[tuple(small.selection["exits"])]
    assert count_macs(small, (3, 4, 4)) == cheapest.macs and count_parameters(small) == cheapest.parameters
    with torch.no_grad():
        answers = torch.cat([small.eval()(x).argmax(1) for x, _ in batches])
    target = torch.cat([y for _, y in batches])
    assert torch.equal(answers == target, scores.answers(cheapest))
    text = str(scores).splitlines()[0]
    assert text.startswith(
        f"SubsetScores: the best 20 of {len(scores):,} subsets that a beam search of width 2 scored of 1,048,575 "
        f"(none, scored or not, has a top-1 above {100 * scores.upper_bound / 27:.2f} %) of 20 exits, 27 samples"
    )
    again = SubsetScores.from_dict(json.loads(json.dumps(scores.to_dict())))
    assert list(again) == list(scores) and (again.beam, again.upper_bound, again.split) == (
        2,
        scores.upper_bound,
        "val",
    )
    left_out = next(mask for mask in range(1, 1 << 20) if mask not in scores.masks)
    with pytest.raises(IndexError, match="are among the subsets that the beam search left out"):
        scores[left_out]
    assert not scores.counts.is_inference() and not scores.nll.is_inference()


def test_what_is_refused(deep):
    with pytest.raises(ValueError, match="score_subsets: loader must yield at least one sample, got none"):
        score_subsets(deep, [])
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        score_subsets(deep, _loader(), beam=0)
    logits, target = torch.randn(2, 5, 3), torch.randint(3, (5,))
    costs = SubsetCosts((1, 2, 3), (4, 5, 6))
    with pytest.raises(TypeError, match="costs must be a function of masks for a beam search, got SubsetCosts"):
        score_logits(logits, [1.0, 1.0], target, costs=costs, beam=2)
    for subsets, message in (((2, 1, 3), "ascending masks"), ((0, 3), "ascending masks"), ((1, 2), "must end with 3")):
        with pytest.raises(ValueError, match=message):
            SubsetScores(torch.zeros(len(subsets), 2, dtype=torch.int64), 1, (0, 1), subsets=subsets)


def test_costs_of_chosen_subsets(deep):
    costs = subset_costs(deep, (3, 4, 4), [0b1, 0b11, 1 << 19])
    assert costs.macs[2] == count_macs(prune(deep, (19,)), (3, 4, 4))
    scores = score_logits(
        *_exits(3, 20, 0)[:1],
        [1.0] * 3,
        _exits(3, 20, 0)[1],
        costs=lambda masks: SubsetCosts(tuple(masks), tuple(masks)),
    )
    assert scores.macs == tuple(range(1, 8))
