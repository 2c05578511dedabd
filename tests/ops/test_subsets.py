from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference


def naive(logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Subset by subset, sample by sample, by sorting; scores as `ensemble` forms them."""
    exits, rows, classes = logits.shape
    counts = torch.zeros((1 << exits) - 1, 2, dtype=torch.int64)
    for mask in range(1, 1 << exits):
        members = [e for e in range(exits) if mask >> e & 1]
        wide = logits[members].double() if logits.dtype == torch.float64 else logits[members].float()
        scores = reference.ensemble(wide, weights[members])
        for n in range(rows):
            if scores[n].isnan().any():
                continue
            order = scores[n].sort(descending=True, stable=True).indices.tolist()
            rank = order.index(int(target[n]))
            counts[mask - 1, 0] += rank < 1
            counts[mask - 1, 1] += rank < min(5, classes)
    return counts


def make(shape, dtype, device, levels=None):
    logits = torch.randn(shape, device=device)
    if levels:  # few values: many ties
        logits = (logits * levels).round() / levels
    return logits.to(dtype), torch.rand(shape[0], device=device), torch.randint(shape[2], (shape[1],), device=device)


@pytest.mark.parametrize(
    "shape", [(1, 6, 7), (2, 5, 1), (3, 0, 4), (3, 1, 3), (4, 20, 10), (5, 9, 33), (2, 3, 2)], ids=str
)
@pytest.mark.parametrize("levels", [None, 1])
def test_equals_naive(shape, levels, dtype, device):
    args = make(shape, dtype, device, levels)
    result = ops.subset_correct(*args)
    assert result.dtype == torch.int64
    expected = naive(*(a.cpu() for a in args))
    assert torch.equal(result.cpu(), expected)
    assert torch.equal(reference.subset_correct(*args).cpu(), expected)


@pytest.mark.parametrize(
    "shape", [(4, 300, 10), (7, 130, 200), (8, 65, 100), (3, 40, 1000), (2, 5, 21841), (10, 33, 10)], ids=str
)
@pytest.mark.parametrize("trained", [False, True])
def test_equals_reference(shape, trained, dtype, device):
    logits, weights, target = make(shape, dtype, device)
    if trained:
        logits[:, torch.arange(shape[1]), target] += 2.5
    assert torch.equal(ops.subset_correct(logits, weights, target), reference.subset_correct(logits, weights, target))


@pytest.mark.parametrize("exits", [11, 16])
def test_many_exits(exits, device):
    args = make((exits, 9, 5), torch.float32, device)
    assert torch.equal(ops.subset_correct(*args), reference.subset_correct(*args))


def test_reference_splits_large_tables(monkeypatch):
    """More subsets than fit into one table: the high exits are added one subset at a time."""
    args = make((5, 6, 7), torch.float32, "cpu")
    expected = reference.subset_correct(*args)
    for size in (1, 7, 28, 100):
        monkeypatch.setattr(reference, "_SUBSET_TABLE", size)
        assert torch.equal(reference.subset_correct(*args), expected)


def test_layouts(device, layouts):
    base, weights, target = make((4, 30, 12), torch.float32, device)
    expected = reference.subset_correct(base, weights, target)
    for name, logits in layouts(base):
        assert torch.equal(ops.subset_correct(logits, weights, target), expected), name
    spread = torch.stack([target, target], 1)[:, 1]
    assert torch.equal(ops.subset_correct(base, weights, spread), expected)


def test_ties_take_the_lowest_class(device):
    logits = torch.zeros(1, 8, 8, device=device)
    counts = ops.subset_correct(logits, torch.ones(1, device=device), torch.arange(8, device=device))
    assert counts.tolist() == [[1, 5]]  # class 0 wins; classes 0..4 are the top 5


def test_nan_is_wrong_at_every_k(device):
    logits = torch.zeros(2, 3, 4, device=device)
    target = torch.tensor([1, 1, 1], device=device)
    logits[:, :, 1] = 5.0
    logits[1, 0, 3] = float("nan")  # another class of the second exit
    logits[1, 1, 1] = float("nan")  # the label itself
    counts = ops.subset_correct(logits, torch.ones(2, device=device), target)
    assert counts.tolist() == [[3, 3], [1, 1], [1, 1]]


def test_infinities(device):
    inf = float("inf")
    logits = torch.tensor([[[inf, 1.0, 0.0], [-inf, -inf, -inf]], [[-inf, 2.0, 0.0], [0.0, 1.0, -inf]]], device=device)
    target = torch.tensor([0, 1], device=device)
    weights = torch.ones(2, device=device)
    # Exit 1: class 0 is largest; all equal, class 1 is second. Both: inf - inf is NaN, wrong; all -inf.
    assert torch.equal(
        ops.subset_correct(logits, weights, target).cpu(), naive(logits.cpu(), weights.cpu(), target.cpu())
    )


def test_fewer_than_five_classes(device):
    logits, weights, target = make((2, 20, 3), torch.float32, device)
    assert (ops.subset_correct(logits, weights, target)[:, 1] == 20).all()


def test_counts_add_up_over_batches(device):
    logits, weights, target = make((5, 100, 10), torch.float32, device)
    parts = sum(ops.subset_correct(logits[:, i : i + 30], weights, target[i : i + 30]) for i in range(0, 100, 30))
    assert torch.equal(parts, ops.subset_correct(logits, weights, target))


def test_agrees_with_the_ensemble(device):
    """The last row is the full ensemble: its top-1 count is that of argmax."""
    logits, weights, target = make((6, 200, 50), torch.float32, device)
    hits = (ops.ensemble(logits, weights).argmax(-1) == target).sum()
    assert ops.subset_correct(logits, weights, target)[-1, 0] == hits


@pytest.mark.parametrize("bad", [-1, 4, -100, 2**40])
def test_label_out_of_range_is_an_error_on_the_cpu(bad, on_reference):
    logits, weights, target = make((2, 6, 4), torch.float32, "cpu")
    target[3] = bad
    message = rf"aep::subset_correct: target must be within 0\.\.3, got {bad} at position 3"
    with pytest.raises(IndexError, match=message):
        ops.subset_correct(logits, weights, target)
    with pytest.raises(IndexError, match=message):
        on_reference(ops.subset_correct, logits, weights, target)
    assert (reference.subset_correct(logits, weights, target)[:, 1] <= 5).all()


@pytest.mark.gpu
def test_label_out_of_range_is_wrong_on_the_gpu(device):
    if device == "cpu":
        pytest.skip("the CPU raises")
    logits, weights, target = make((2, 6, 4), torch.float32, device)
    target[3] = 4
    assert torch.equal(ops.subset_correct(logits, weights, target), reference.subset_correct(logits, weights, target))


def test_not_differentiable(device):
    logits, weights, target = make((2, 6, 4), torch.float32, device)
    assert not ops.subset_correct(logits.requires_grad_(), weights, target).requires_grad
