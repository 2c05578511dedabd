"""The native operators, bound once: looking one up in ``torch.ops`` costs as much as some calls.

Without the extension the names are missing, and nothing asks for them (see :mod:`aep_ext.ops._dispatch`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aep_ext import _load

if _load.extension is not None:
    from aep_ext.ops import _fakes, flops

    _fakes.register()
    flops.register()

    global_avg_pool = torch.ops.aep.global_avg_pool.default
    multi_exit_linear_head = torch.ops.aep.multi_exit_linear_head.default
    ensemble = torch.ops.aep.ensemble.default
    ensemble_stats = torch.ops.aep.ensemble_stats.default
    multi_exit_loss = torch.ops.aep.multi_exit_loss.default
    multi_exit_loss_with_grad = torch.ops.aep.multi_exit_loss_with_grad.default
    multi_exit_loss_ = torch.ops.aep.multi_exit_loss_.default
    linear_joint_cross_entropy = torch.ops.aep.linear_joint_cross_entropy.default
    subset_correct = torch.ops.aep.subset_correct.default
    gate = torch.ops.aep.gate.default
    gate_one_ = torch.ops.aep.gate_one_.default


def scalars(op: str, **values: float | Tensor) -> tuple[tuple[float, ...], tuple[Tensor | None, ...]]:
    """Scalars as the operators take them: numbers, and beside each the tensor that overrides it, or None."""
    numbers: list[float] = []
    tensors: list[Tensor | None] = []
    for name, value in values.items():
        if isinstance(value, Tensor):
            numbers.append(1.0)
            tensors.append(value)
        elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"aep::{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
        else:
            numbers.append(value)
            tensors.append(None)
    return tuple(numbers), tuple(tensors)
