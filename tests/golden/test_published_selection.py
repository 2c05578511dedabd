from __future__ import annotations

import torch

from aep_ext import ops
from aep_ext.pruning import SubsetScores, exits_of_mask, score_logits, subset_correctness


def _mask(key: str) -> int:
    """The key's leftmost bit is exit 1, which has index 0."""
    return sum(1 << e for e, bit in enumerate(key) if bit == "1")


def test_the_generator_gives_the_published_samples(published, data):
    check = published["selection_and_loss"]["formula_check"]
    logits, labels = data(3, 257, 10)
    assert logits[0, 0].tolist() == check["logits[0,0,:]"]
    assert logits[2, 256].tolist() == check["logits[2,256,:]"]
    assert labels[:10].tolist() == check["labels[:10]"]
    assert float(logits.double().sum()) == check["sum_logits_float64"]


def test_every_subset_has_the_published_counts(published, data):
    cases = published["selection_and_loss"]["ensemble_selection"]
    assert len(cases) == 8
    for case in cases:
        logits, labels = data(case["E"], case["N"], case["K"])
        assert len(case["counts_top1_top5"]) == 2 ** case["E"] - 1
        whole = score_logits(logits, case["weights"], labels)
        batches = zip(logits.split(case["batch"], dim=1), labels.split(case["batch"]), strict=True)
        summed = sum(ops.subset_correct(x, torch.tensor(case["weights"]), y) for x, y in batches)
        assert torch.equal(whole.counts, summed)
        for key, counts in case["counts_top1_top5"].items():
            assert whole.counts[_mask(key) - 1].tolist() == counts, (case["ordering"], key)
        per_sample = subset_correctness(logits, case["weights"], labels)
        assert torch.equal(per_sample.sum(dim=1), whole.counts[:, 0])


def test_the_best_subset_is_the_published_one_unless_counts_tie(published, data):
    for case in published["selection_and_loss"]["ensemble_selection"]:
        logits, labels = data(case["E"], case["N"], case["K"])
        best = score_logits(logits, case["weights"], labels).best()
        counts = case["counts_top1_top5"]
        winners = [key for key, value in counts.items() if value == max(counts.values())]
        assert _mask(case["best_key_from_integer_counts"]) in [_mask(key) for key in winners]
        assert best.mask in [_mask(key) for key in winners]
        if len(winners) == 1:
            assert best.mask == _mask(case["best_key"])
            assert best.exits == exits_of_mask(best.mask)


def test_ties_go_to_the_cheaper_subset_not_to_the_published_scan_order():
    counts = torch.tensor([[5, 9], [5, 9], [5, 9]])
    scores = SubsetScores(counts, 10, (0, 1), parameters=(10, 30, 35), macs=(100, 300, 310))
    # In the published order "01" (the last exit) comes first; ours is the first exit, which costs a third.
    assert scores.best().exits == (0,)
