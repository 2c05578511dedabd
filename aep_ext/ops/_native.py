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

    multi_exit_linear_head = torch.ops.aep.multi_exit_linear_head.default
    ensemble = torch.ops.aep.ensemble.default
    joint_cross_entropy = torch.ops.aep.joint_cross_entropy.default
    joint_cross_entropy_with_grad = torch.ops.aep.joint_cross_entropy_with_grad.default
    joint_cross_entropy_ = torch.ops.aep.joint_cross_entropy_.default
    subset_correct = torch.ops.aep.subset_correct.default
    _ensemble_stats = torch.ops.aep.ensemble_stats.default
    _gate = torch.ops.aep.gate.default


def _split(op: str, name: str, value: float | Tensor, unused: float) -> tuple[float, Tensor | None]:
    """A scalar as the operators take it: a number, or a tensor that overrides the number."""
    if isinstance(value, Tensor):
        return unused, value
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"aep::{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
    return value, None


def ensemble_stats(
    exit_logits: Tensor, weights: Tensor, normalizer: float | Tensor, temperature: float | Tensor
) -> tuple[Tensor, ...]:
    """``aep::ensemble_stats`` with scalars of either kind."""
    op = "ensemble_stats"
    normalizer, normalizer_tensor = _split(op, "normalizer", normalizer, 1.0)
    temperature, temperature_tensor = _split(op, "temperature", temperature, 1.0)
    return _ensemble_stats(exit_logits, weights, normalizer, temperature, normalizer_tensor, temperature_tensor)


def gate(
    features: Tensor,
    running: Tensor,
    weight_sum: float | Tensor,
    indices: Tensor,
    state: Tensor,
    exit_logits: Tensor,
    weight: float | Tensor,
    threshold: float | Tensor,
    temperature: float | Tensor,
    policy: str,
    on: str,
    enabled: bool,
) -> tuple[Tensor, ...]:
    """``aep::gate`` with scalars of either kind."""
    weight_sum, weight_sum_tensor = _split("gate", "weight_sum", weight_sum, 0.0)
    weight, weight_tensor = _split("gate", "weight", weight, 0.0)
    threshold, threshold_tensor = _split("gate", "threshold", threshold, 0.0)
    temperature, temperature_tensor = _split("gate", "temperature", temperature, 1.0)
    return _gate(
        features,
        running,
        indices,
        state,
        exit_logits,
        weight_sum,
        weight,
        threshold,
        temperature,
        weight_sum_tensor,
        weight_tensor,
        threshold_tensor,
        temperature_tensor,
        policy,
        on,
        enabled,
    )
