"""The ensemble: weighted sum of raw exit logits, with or without the statistics of its softmax."""

from __future__ import annotations

from torch import Tensor

from aep_ext.ops import _checks, _native, reference
from aep_ext.ops._dispatch import use_native
from aep_ext.ops.types import EnsembleStats

_new = tuple.__new__  # a named tuple from a tuple, in half the time
_ONE = 1.0  # the default is known by identity: what need not be passed on costs nothing


def ensemble(exit_logits: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the exits' raw logits (no softmax before it, no renormalisation).

    Args:
        exit_logits: (E, N, K), E and K at least 1, float32, float64, bfloat16 or float16, any strides.
        weights: (E,), floating point, on the same device. Converted to the accumulation dtype: float64 for float64
            logits, else float32.

    Returns:
        (N, K) in the dtype of ``exit_logits``: products rounded in the accumulation dtype, added in ascending order of
        the exits, rounded once at the end.

    Differentiable in both arguments, any number of times (reverse mode; the native operator refuses forward mode).

    Raises:
        TypeError: a dtype breaks the rules above.
        ValueError: a shape or device does.

    Source: equation of the ensemble output in arXiv 2301.12168, section 3.3.

    Equivalent to::

        (exit_logits * weights[:, None, None]).sum(0)
    """
    if use_native(exit_logits, weights):
        return _native.ensemble(exit_logits, weights)
    _checks.weighted_exits("ensemble", exit_logits, "weights", weights)
    return reference.ensemble(exit_logits, weights)


def ensemble_stats(
    exit_logits: Tensor,
    weights: Tensor,
    *,
    normalizer: float | Tensor = _ONE,
    temperature: float | Tensor = _ONE,
) -> EnsembleStats:
    """:func:`ensemble` with confidence, entropy, margin and argmax in one pass.

    Args:
        exit_logits: (E, N, K), as for :func:`ensemble`.
        weights: (E,), as for :func:`ensemble`.
        normalizer: divides the logits before the softmax (usually the sum of the weights); a finite number above 0, or
            a 0-d floating tensor on the same device, whose value is not checked.
        temperature: divides them too; likewise.

    Returns:
        :class:`EnsembleStats`: ``logits`` (N, K) as :func:`ensemble` returns them; ``stats`` (N, 3) float32 with
        confidence (largest probability), entropy in nats and margin (largest minus second largest probability) of
        ``softmax(logits / (normalizer * temperature))``, computed from the returned, rounded logits; ``argmax`` (N,)
        int64. K = 1: 1, 0, 1. A row with NaN or +inf, or with nothing but -inf: NaN statistics. -inf: probability
        exactly 0. Ties: the lowest class. A NaN counts as largest for ``argmax``, as in torch. Only ``logits`` is
        differentiable.

    Raises:
        TypeError: a dtype breaks the rules above, or a scalar is neither number nor tensor.
        ValueError: a shape, device or number does.

    Equivalent to::

        logits = ensemble(exit_logits, weights)
        p = torch.softmax(logits.float() / (normalizer * temperature), -1)
        top = p.topk(2).values
        stats = torch.stack([top[:, 0], torch.special.entr(p).sum(-1), top[:, 0] - top[:, 1]], -1)
        EnsembleStats(logits, stats, logits.argmax(-1))
    """
    if use_native(exit_logits, weights):
        if normalizer is _ONE and temperature is _ONE:
            return _new(EnsembleStats, _native.ensemble_stats(exit_logits, weights))
        if normalizer.__class__ is float and temperature.__class__ is float:
            return _new(EnsembleStats, _native.ensemble_stats(exit_logits, weights, normalizer, temperature))
        numbers, tensors = _native.scalars("ensemble_stats", normalizer=normalizer, temperature=temperature)
        return _new(EnsembleStats, _native.ensemble_stats(exit_logits, weights, *numbers, *tensors))
    _checks.weighted_exits("ensemble_stats", exit_logits, "weights", weights)
    _checks.number("ensemble_stats", "normalizer", normalizer, exit_logits.device, positive=True)
    _checks.number("ensemble_stats", "temperature", temperature, exit_logits.device, positive=True)
    return reference.ensemble_stats(exit_logits, weights, normalizer=normalizer, temperature=temperature)
