"""Fake kernels: shape, dtype and layout of the native operators' results, for torch.compile, torch.export and meta
tensors. They check nothing but that no tensor lies elsewhere; the operators themselves check the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_leaves

from aep_ext.ops._checks import accumulate_dtype


def _global_avg_pool(features: Tensor) -> Tensor:
    return features.new_empty(features.shape[:2])


def _multi_exit_linear_head(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    first, rows = features[0], features[0].shape[0]
    # The pooled features of every exit, rounded up to whole units of 64 (csrc/torch/head.cpp).
    pooled = first.new_empty(sum((rows * x.shape[1] + 63) // 64 * 64 for x in features))
    return first.new_empty(len(features), rows, weights[0].shape[0]), pooled


def _ensemble(exit_logits: Tensor, weights: Tensor) -> Tensor:
    return exit_logits.new_empty(exit_logits.shape[1:])


def _ensemble_backward_logits(grad: Tensor, weights: Tensor) -> Tensor:
    return grad.new_empty(weights.shape[0], *grad.shape)


def _ensemble_backward_weights(grad: Tensor, exit_logits: Tensor) -> Tensor:
    return exit_logits.new_empty(exit_logits.shape[0], dtype=accumulate_dtype(exit_logits.dtype))


def _ensemble_stats(exit_logits: Tensor, weights: Tensor, *scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = exit_logits.shape[1]
    return (
        exit_logits.new_empty(exit_logits.shape[1:]),
        exit_logits.new_empty(rows, 3, dtype=torch.float32),
        exit_logits.new_empty(rows, dtype=torch.int64),
    )


def _losses(like: Tensor, exits: int) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(like.dtype)
    return like.new_empty((), dtype=dtype), like.new_empty(exits, dtype=dtype)


def _multi_exit_loss_(
    exit_logits: Tensor,
    target: Tensor,
    exit_weights: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    prefix_weights: Tensor | None = None,
    output_weights: Tensor | None = None,
    distillation: float = 0.0,
    *others: Any,
) -> tuple[Tensor, ...]:
    exits, rows, _ = exit_logits.shape
    loss, exit_losses = _losses(exit_logits, exits)
    if reduction == "none":
        loss, exit_losses = loss.new_empty(rows), loss.new_empty(exits, rows)
    absent = {1: prefix_weights is None, 2: not distillation > 0}
    return loss, exit_losses, *(loss.new_empty(0 if absent[i] else exit_losses.shape) for i in (1, 2))


def _multi_exit_loss(exit_logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    losses = _multi_exit_loss_(exit_logits, *others)
    exits, rows, _ = exit_logits.shape
    terms = any(term.dim() == losses[1].dim() and term.shape[0] > 0 for term in losses[2:])
    # csrc/kernels/params.h, and the two divisors of the mean.
    return *losses, losses[0].new_empty(((5 * exits + 1) * rows if terms else 2 * exits * rows) + 2)


def _multi_exit_loss_backward(exit_logits: Tensor, *others: Any) -> Tensor:
    return exit_logits.new_empty(exit_logits.shape)


def _multi_exit_loss_with_grad(exit_logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return *_multi_exit_loss_(exit_logits, *others), exit_logits.new_empty(exit_logits.shape)


def _multi_exit_loss_scale_(*arguments: Any) -> None:
    return None


def _linear_joint_cross_entropy(pooled: Sequence[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    return _losses(pooled[0], len(pooled))


def _linear_joint_cross_entropy_with_grad(
    pooled: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor | None], *others: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *_, wanted = others
    # Sums over rows are held in the accumulation dtype.
    dtypes = [x.dtype for x in pooled] + [accumulate_dtype(pooled[0].dtype)] * (2 * len(pooled))
    tensors = zip([*pooled, *weights, *biases], dtypes, wanted, strict=True)
    gradients = [t.new_empty(t.shape, dtype=kind) for t, kind, needed in tensors if needed and t is not None]
    return (*_losses(pooled[0], len(pooled)), gradients)


def _subset_correct(exit_logits: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    return exit_logits.new_empty((1 << int(exit_logits.shape[0])) - 1, 2, dtype=torch.int64)


def _gate(
    features: Tensor, running: Tensor, indices: Tensor, state: Tensor, exit_logits: Tensor, *others: Any
) -> tuple[Tensor, ...]:
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


def _gate_one_(*arguments: Any) -> None:
    return None


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Among meta tensors any other would bring the call here too, for a result that nobody has computed."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Any:
        devices = {str(leaf.device) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            shown = arguments[-1] if name.startswith("multi_exit_loss") and isinstance(arguments[-1], str) else name
            raise ValueError(f"aep::{shown}: tensors must be on one device, got {', '.join(sorted(devices))}")
        return fake(*arguments)

    return checked


def register() -> None:
    """Registers the fake kernels; the extension must be loaded."""
    for fake in (
        _global_avg_pool,
        _multi_exit_linear_head,
        _ensemble,
        _ensemble_backward_logits,
        _ensemble_backward_weights,
        _ensemble_stats,
        _multi_exit_loss,
        _multi_exit_loss_backward,
        _multi_exit_loss_with_grad,
        _multi_exit_loss_,
        _multi_exit_loss_scale_,
        _linear_joint_cross_entropy,
        _linear_joint_cross_entropy_with_grad,
        _subset_correct,
        _gate,
        _gate_one_,
    ):
        name = fake.__name__.removeprefix("_")
        torch.library.register_fake(f"aep::{name}", _on_one_device(name, fake))
