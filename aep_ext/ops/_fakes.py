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


def _multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    _checks.multi_exit_linear_head(features, weights, biases)
    rows = features[0].shape[0]
    logits = features[0].new_empty(len(features), rows, weights[0].shape[0])
    return logits, features[0].new_empty(rows, sum(x.shape[1] for x in features))


def _ensemble(exit_logits: Tensor, weights: Tensor) -> Tensor:
    _checks.ensemble(exit_logits, weights)
    return exit_logits.new_empty(exit_logits.shape[1:])


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
        exit_logits.new_empty(exits * rows + 1, dtype=dtype),
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


def _subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    _checks.subset_correct(exit_logits, weights, target)
    return exit_logits.new_empty((1 << int(exit_logits.shape[0])) - 1, 2, dtype=torch.int64)


def _gate(
    features: Tensor,
    running: Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    weight_sum: float,
    weight: float,
    threshold: float,
    temperature: float,
    weight_sum_tensor: Tensor | None,
    weight_tensor: Tensor | None,
    threshold_tensor: Tensor | None,
    temperature_tensor: Tensor | None,
    policy: str,
    on: str,
    enabled: bool,
) -> tuple[Tensor, ...]:
    _checks.gate(
        features,
        running,
        weight_sum if weight_sum_tensor is None else weight_sum_tensor,
        indices,
        state,
        exit_logits,
        weight if weight_tensor is None else weight_tensor,
        threshold if threshold_tensor is None else threshold_tensor,
        temperature if temperature_tensor is None else temperature_tensor,
        policy,
        on,
    )
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


def register() -> None:
    """Registers the fake kernels; the extension must be loaded."""
    for fake in (
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
        _subset_correct,
        _gate,
    ):
        torch.library.register_fake(f"aep::{fake.__name__.removeprefix('_')}", fake)
