"""CachedLogits: what is refused, what a selection is, and how shared rows are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from synthetic_exits import cached_logits, logits_and_labels

from aep_ext.calibration import CachedLogits

LOGITS, TARGET = torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits must be a floating tensor, got torch.int64"),
        ({"logits": [[0.0]]}, TypeError, "logits must be a floating tensor, got list"),
        ({"logits": LOGITS[0]}, ValueError, r"logits must have shape \[E, N, K\] .* got \[4, 5\]"),
        ({"logits": LOGITS[:0]}, ValueError, r"logits must have .* E and K at least 1, got \[0, 4, 5\]"),
        ({"logits": LOGITS.double() + 1e39}, ValueError, r"logits must be within \+-3.40282e\+38 for float32"),
        ({"target": TARGET[:3]}, ValueError, r"target must be integers of shape \[4\], got torch.int64 of shape \[3\]"),
        ({"target": TARGET.float()}, ValueError, r"target must be integers of shape \[4\], got torch.float32"),
        ({"target": TARGET.bool()}, ValueError, "target must be integers, got torch.bool"),
        ({"target": TARGET + 5}, ValueError, "target must be within 0..4, got 5..5"),
        ({"role": ""}, ValueError, "role must be a name such as 'val' or 'test', got ''"),
        ({"exits": [0, 2]}, ValueError, r"exits must be 3 ascending numbers, got \[0, 2\]"),
        ({"exits": [0, 2, 2]}, ValueError, r"exits must be 3 ascending numbers, got \[0, 2, 2\]"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=f"CachedLogits: {message}"):
        CachedLogits(**{"logits": LOGITS, "target": TARGET, **change})


def test_what_is_kept():
    logits, target = logits_and_labels(3, 20)
    cached = CachedLogits(logits.double().requires_grad_(), target.int(), exits=[0, 2, 5])
    assert cached.logits.dtype == torch.float32 and not cached.logits.requires_grad
    assert cached.target.dtype == torch.int64 and len(cached) == 20
    assert (cached.num_exits, cached.num_classes, cached.role, cached.exits) == (3, 5, "val", (0, 2, 5))
    assert CachedLogits(logits, target).logits.data_ptr() == logits.data_ptr()
    assert repr(cached) == "CachedLogits(val: 20 samples, 3 exits, 5 classes)"


def test_selections():
    cached = cached_logits(3, 20)
    rows = torch.tensor([4, 0, 7])
    part = cached.select(rows, role="test")
    assert torch.equal(part.logits, cached.logits[:, rows]) and torch.equal(part.target, cached.target[rows])
    assert part.role == "test" and len(cached.select(torch.arange(20) < 5)) == 5
    two = cached.select_exits([0, 2])
    assert two.exits == (0, 2) and torch.equal(two.logits, cached.logits[[0, 2]])
    assert CachedLogits(LOGITS, TARGET, exits=[1, 3, 4]).select_exits([1, 2]).exits == (3, 4)


def test_rows_are_recognised_and_others_are_not():
    cached = cached_logits(3, 500, classes=7)
    hashes = cached.row_hashes
    assert hashes.dtype == np.uint64 and len(np.unique(hashes)) == 500
    order = torch.randperm(500)
    assert np.array_equal(cached.select(order).row_hashes, hashes[order.numpy()])
    assert cached.select(order).fingerprint == cached.fingerprint != cached.select(order[1:]).fingerprint
    assert not np.isin(cached_logits(3, 500, classes=7, seed=1).row_hashes, hashes).any()
    relabelled = CachedLogits(cached.logits, (cached.target + 1) % 7)
    assert not np.isin(relabelled.row_hashes, hashes).any()
    swapped = CachedLogits(cached.logits[[1, 0, 2]], cached.target)
    assert not np.isin(swapped.row_hashes, hashes).any()
