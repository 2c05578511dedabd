"""Scores of every subset of the exits."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import has_native


def subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Top-1 and top-5 counts of the ensemble over every non-empty subset of the exits.

    Args:
        exit_logits: (E, N, K), 1 <= E <= 16, K at least 1, float32, float64, bfloat16 or float16, any strides.
        weights: (E,), floating point: the output weight b_e of every exit; not renormalised inside a subset.
        target: (N,) int64, class indices 0..K-1.
        out: (2^E - 1, 2) int64, contiguous, on the same device: takes the counts (it is overwritten), and is returned.
            It may not share memory with an argument.

    Returns:
        (2^E - 1, 2) int64. Row m - 1 is the subset that holds exit e (from 0) where bit ``1 << e`` of m is set;
        columns: samples whose label has rank 0, and rank below 5 (below K where K < 5). Counts of several batches may
        be added up.

        The rank of the label is the number of classes with a larger score, plus those with an equal score and a lower
        index. A row that holds a NaN score is wrong at every k. Scores are formed as :func:`ensemble` forms them. Not
        differentiable.

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape, a device or the number of exits does, or ``out`` in another way.
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
    if has_native(exit_logits) and isinstance(weights, Tensor) and isinstance(target, Tensor):
        if out is None:
            return _native.subset_correct(exit_logits, weights, target)
        if isinstance(out, Tensor):
            _native.subset_correct_out(exit_logits, weights, target, out=out)
            return out
    _checks.subset_correct(exit_logits, weights, target)
    if out is not None:
        _checks.subset_correct_out(exit_logits, weights, target, out)
    _checks.labels("subset_correct", target, exit_logits.shape[2])
    counts = reference.subset_correct(exit_logits, weights, target)
    return counts if out is None else out.copy_(counts)
