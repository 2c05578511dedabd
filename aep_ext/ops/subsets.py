"""Scores of every subset of the exits."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, label_checks, reference
from aep_ext.ops._dispatch import use_native

MAX_EXITS = 16


def subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Top-1 and top-5 counts of the ensemble over every non-empty subset of the exits.

    Args:
        exit_logits: (E, N, K), 1 <= E <= 16, K at least 1, float32, float64, bfloat16 or float16, any strides.
        weights: (E,), floating point: the output weight b_e of every exit; not renormalised inside a subset.
        target: (N,) int64, class indices 0..K-1.

    Returns:
        (2^E - 1, 2) int64. Row m - 1 is the subset that holds exit e (from 0) where bit ``1 << e`` of m is set;
        columns: samples whose label has rank 0, and rank below 5 (below K where K < 5). Counts of several batches may
        be added up.

        The rank of the label is the number of classes with a larger score, plus those with an equal score and a lower
        index. A row that holds a NaN score is wrong at every k. Scores are formed as :func:`ensemble` forms them. Not
        differentiable.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, a device or the number of exits does.
        IndexError: on the CPU, a label is out of range. Elsewhere such a row is wrong at every k, unless
            :class:`check_labels` is on.

    Source: the pruning step of arXiv 2301.12168, section 3.4.

    Equivalent to::

        for m in range(1, 2**E):
            members = [e for e in range(E) if m >> e & 1]
            order = ensemble(exit_logits[members], weights[members]).sort(-1, descending=True, stable=True).indices
            hits = order == target[:, None]
            counts[m - 1] = hits[:, :1].sum(), hits[:, :5].sum()
    """
    if use_native(exit_logits, weights, target):
        return _native.subset_correct(exit_logits, weights, target)
    op = "subset_correct"
    exits, rows, classes = _checks.weighted_exits(op, exit_logits, "weights", weights)
    if exits > MAX_EXITS:
        raise ValueError(f"aep::{op}: exit_logits must have at most {MAX_EXITS} exits, got {exits}")
    _checks.tensor(op, "target", target, (rows,), _checks.INT64, exit_logits.device)
    label_checks.labels(op, target, classes)
    return reference.subset_correct(exit_logits, weights, target)
