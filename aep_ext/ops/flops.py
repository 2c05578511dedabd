"""Formulas for ``torch.utils.flop_counter``: two operations per multiply-add of a matrix product, as there.

Only the heads, and the loss that takes them in, hold matrix products. Weighted sums, other losses and gates count
nothing, as torch counts nothing for elementwise work; so the counts equal those of the reference path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_NO_PRODUCTS = (
    "global_avg_pool",
    "ensemble",
    "ensemble_backward_logits",
    "ensemble_backward_weights",
    "ensemble_stats",
    "multi_exit_loss",
    "multi_exit_loss_backward",
    "multi_exit_loss_with_grad",
    "multi_exit_loss_",
    "multi_exit_loss_scale_",
    "subset_correct",
    "gate",
    "gate_one_",
)


def multi_exit_linear_head_flops(
    features_shape: list[torch.Size], weights_shape: list[torch.Size], *args: Any, **kwargs: Any
) -> int:
    """2 * N * C_e * K, summed over the exits. The backward consists of torch's own products, which torch counts."""
    return sum(2 * x[0] * w[0] * w[1] for x, w in zip(features_shape, weights_shape, strict=True))


def linear_joint_cross_entropy_flops(
    pooled_shape: list[torch.Size], weights_shape: list[torch.Size], *args: Any, **kwargs: Any
) -> int:
    """2 * N * C_e * K, summed over the exits, as the heads'."""
    return multi_exit_linear_head_flops(pooled_shape, weights_shape)


def linear_joint_cross_entropy_with_grad_flops(
    pooled_shape: list[torch.Size], weights_shape: list[torch.Size], *args: Any, **kwargs: Any
) -> int:
    """The same again for each gradient of pooled features or of weights: the products of an ordinary backward."""
    wanted = args[8]
    exits = len(pooled_shape)
    return sum(
        2 * x[0] * w[0] * w[1] * (1 + wanted[e] + wanted[exits + e])
        for e, (x, w) in enumerate(zip(pooled_shape, weights_shape, strict=True))
    )


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Nothing that torch's counter would count."""
    return 0


def register() -> None:
    """Registers the formulas; the extension must be loaded."""
    register_flop_formula(torch.ops.aep.multi_exit_linear_head)(multi_exit_linear_head_flops)
    register_flop_formula(torch.ops.aep.linear_joint_cross_entropy)(linear_joint_cross_entropy_flops)
    register_flop_formula(torch.ops.aep.linear_joint_cross_entropy_with_grad)(
        linear_joint_cross_entropy_with_grad_flops
    )
    for name in _NO_PRODUCTS:
        register_flop_formula(getattr(torch.ops.aep, name))(no_flops)
