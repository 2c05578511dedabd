"""Fake kernels: the layout of the native operators' results, for torch.compile, torch.export and meta tensors.

They make the same checks as the reference path (:mod:`aep_ext.ops._checks`), as far as these need no data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from aep_ext.ops import _checks
from aep_ext.ops._checks import accumulate_dtype
from aep_ext.ops.types import EnsembleStats, GateResult


def _global_avg_pool(features: Tensor) -> Tensor:
    _checks.global_avg_pool(features)
    return features.new_empty(features.shape[:2])


def _multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    _checks.multi_exit_linear_head(features, weights, biases)
    rows = features[0].shape[0]
    logits = features[0].new_empty(len(features), rows, weights[0].shape[0])
    # The pooled features of every exit, rounded up to whole units of 64 (csrc/torch/head.cpp).
    return logits, features[0].new_empty(sum((rows * x.shape[1] + 63) // 64 * 64 for x in features))


def _ensemble(exit_logits: Tensor, weights: Tensor) -> Tensor:
    _checks.ensemble(exit_logits, weights)
    return exit_logits.new_empty(exit_logits.shape[1:])


def _ensemble_out(exit_logits: Tensor, weights: Tensor, *, out: Tensor) -> None:
    _checks.ensemble(exit_logits, weights)
    _checks.ensemble_out(exit_logits, weights, out)


def _ensemble_backward_logits(grad: Tensor, weights: Tensor) -> Tensor:
    return grad.new_empty(weights.shape[0], *grad.shape)


def _ensemble_backward_weights(grad: Tensor, exit_logits: Tensor) -> Tensor:
    return exit_logits.new_empty(exit_logits.shape[0], dtype=accumulate_dtype(exit_logits.dtype))


def _ensemble_stats(
    exit_logits: Tensor,
    weights: Tensor,
    normalizer: float = 1.0,
    temperature: float = 1.0,
    normalizer_tensor: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    normalizer = normalizer if normalizer_tensor is None else normalizer_tensor
    temperature = temperature if temperature_tensor is None else temperature_tensor
    _checks.ensemble_stats(exit_logits, weights, normalizer, temperature)
    rows = exit_logits.shape[1]
    return (
        exit_logits.new_empty(exit_logits.shape[1:]),
        exit_logits.new_empty(rows, 3, dtype=torch.float32),
        exit_logits.new_empty(rows, dtype=torch.int64),
    )


def _ensemble_stats_out(
    exit_logits: Tensor,
    weights: Tensor,
    normalizer: float = 1.0,
    temperature: float = 1.0,
    normalizer_tensor: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
    *,
    logits: Tensor | None,
    stats: Tensor,
    argmax: Tensor,
) -> None:
    normalizer = normalizer if normalizer_tensor is None else normalizer_tensor
    temperature = temperature if temperature_tensor is None else temperature_tensor
    _checks.ensemble_stats(exit_logits, weights, normalizer, temperature)
    _checks.ensemble_stats_out(exit_logits, weights, normalizer, temperature, EnsembleStats(logits, stats, argmax))


def _joint_cross_entropy(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.joint_cross_entropy(
        exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction
    )
    exits, rows, _ = exit_logits.shape
    dtype = accumulate_dtype(exit_logits.dtype)
    none = reduction == "none"
    return (
        exit_logits.new_empty((rows,) if none else (), dtype=dtype),
        exit_logits.new_empty((exits, rows) if none else (exits,), dtype=dtype),
        exit_logits.new_empty(2 * exits * rows + 1, dtype=dtype),
    )


def _joint_cross_entropy_backward(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    kept: Tensor,
    grad_loss: Tensor | None,
    grad_exit_losses: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    return exit_logits.new_empty(exit_logits.shape)


def _losses(exit_logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(exit_logits.dtype)
    return exit_logits.new_empty((), dtype=dtype), exit_logits.new_empty(exit_logits.shape[0], dtype=dtype)


def _joint_cross_entropy_with_grad(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    _checks.joint_cross_entropy(
        exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction, "in_forward"
    )
    return (*_losses(exit_logits), exit_logits.new_empty(exit_logits.shape))


def _joint_cross_entropy_(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    _checks.joint_cross_entropy(
        exit_logits, target, exit_weights, class_weight, label_smoothing, ignore_index, reduction, "in_place"
    )
    return _losses(exit_logits)


def _joint_cross_entropy_scale_(grad_logits: Tensor, scale: Tensor, divisor: float = 1.0) -> None:
    return None


def _linear_joint_cross_entropy(
    pooled: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    _checks.linear_joint_cross_entropy(
        pooled,
        weights,
        biases,
        target,
        exit_weights,
        class_weight,
        label_smoothing,
        ignore_index,
        reduction,
        chunk,
    )
    dtype = accumulate_dtype(pooled[0].dtype)
    return pooled[0].new_empty((), dtype=dtype), pooled[0].new_empty(len(pooled), dtype=dtype)


def _linear_joint_cross_entropy_with_grad(
    pooled: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *others: object,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *options, wanted = others
    losses = _linear_joint_cross_entropy(pooled, weights, biases, *options)
    dtype = accumulate_dtype(pooled[0].dtype)
    # Sums over rows are held in the accumulation dtype.
    dtypes = [x.dtype for x in pooled] + [dtype] * (2 * len(pooled))
    tensors = zip([*pooled, *weights, *biases], dtypes, wanted, strict=True)
    return (*losses, [t.new_empty(t.shape, dtype=kind) for t, kind, needed in tensors if needed and t is not None])


def _subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    _checks.subset_correct(exit_logits, weights, target)
    return exit_logits.new_empty((1 << int(exit_logits.shape[0])) - 1, 2, dtype=torch.int64)


def _subset_correct_out(exit_logits: Tensor, weights: Tensor, target: Tensor, *, out: Tensor) -> None:
    _checks.subset_correct(exit_logits, weights, target)
    _checks.subset_correct_out(exit_logits, weights, target, out)


def _gate_arguments(
    features: Tensor,
    running: Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float = 1.0,
    policy: str = "confidence",
    on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
    weight_sum_tensor: Tensor | None = None,
    weight_tensor: Tensor | None = None,
    threshold_tensor: Tensor | None = None,
    temperature_tensor: Tensor | None = None,
) -> dict[str, float | Tensor]:
    """Checks them; returns the scalars by name."""
    scalars = {
        "weight_sum": weight_sum if weight_sum_tensor is None else weight_sum_tensor,
        "weight": weight if weight_tensor is None else weight_tensor,
        "threshold": threshold if threshold_tensor is None else threshold_tensor,
        "temperature": temperature if temperature_tensor is None else temperature_tensor,
    }
    _checks.gate(
        features, running, indices=indices, state=state, exit_logits=exit_logits, policy=policy, on=on, **scalars
    )
    return scalars


def _gate(
    features: Tensor,
    running: Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    *args: object,
    **kwargs: object,
) -> tuple[Tensor, ...]:
    _gate_arguments(features, running, indices, state, exit_logits, *args, **kwargs)
    rows = indices.shape[0]
    return (
        torch.empty_like(features, memory_format=suggest_memory_format(features)),
        running.new_empty(running.shape),
        indices.new_empty(rows),
        state.new_empty(state.shape),
        exit_logits.new_empty(rows, 3, dtype=torch.float32),
        indices.new_empty(rows),
        exit_logits.new_empty((), dtype=accumulate_dtype(exit_logits.dtype)),
        indices.new_empty(()),
    )


def _gate_out(
    features: Tensor,
    running: Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    *args: object,
    **kwargs: object,
) -> None:
    out = GateResult(*(kwargs.pop(f"{name}_out") for name in GateResult._fields))
    scalars = _gate_arguments(features, running, indices, state, exit_logits, *args, **kwargs)
    _checks.gate_out(features, running, indices, state, exit_logits, scalars, out)


def _gate_one_(
    running: Tensor,
    stats: Tensor,
    leaves: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float = 1.0,
    policy: str = "confidence",
    on: str = "ensemble",
    enabled: bool = True,
    last: bool = False,
) -> None:
    _checks.gate_one_(running, stats, leaves, exit_logits, weight_sum, weight, threshold, temperature, policy, on)


def register() -> None:
    """Registers the fake kernels; the extension must be loaded."""
    for fake in (
        _global_avg_pool,
        _multi_exit_linear_head,
        _ensemble,
        _ensemble_backward_logits,
        _ensemble_backward_weights,
        _ensemble_stats,
        _joint_cross_entropy,
        _joint_cross_entropy_backward,
        _joint_cross_entropy_with_grad,
        _joint_cross_entropy_,
        _joint_cross_entropy_scale_,
        _linear_joint_cross_entropy,
        _linear_joint_cross_entropy_with_grad,
        _subset_correct,
        _gate,
        _gate_one_,
    ):
        torch.library.register_fake(f"aep::{fake.__name__.removeprefix('_')}", fake)
    for fake in (_ensemble_out, _ensemble_stats_out, _subset_correct_out, _gate_out):
        torch.library.register_fake(f"aep::{fake.__name__.strip('_').removesuffix('_out')}.out", fake)
