"""The simulator: what gates would do, from the cached logits of all exits.

It walks the exits with the very step that an executor takes, :meth:`Policy.gate`, on the samples that are still
there, only without features to carry. So exit taken, prediction and confidence are an executor's by construction.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aep_ext.inference.criteria import Judged, Policy, as_policy


@dataclass(frozen=True, eq=False)
class Simulation:
    """What became of N samples.

    Attributes:
        exits: (N,) int64, the exit at which each was answered, from 0.
        predictions: (N,) int64, argmax of the running ensemble there.
        confidences: (N,) float32, largest probability of the judged distribution there.
        logits: (N, K) in the dtype of the exit logits, the unnormalised sum of b_j O_j up to there.
        counts: (E,) int64, how many were answered at each exit.
        mean_cost: mean over the samples of the cost of their exit, or None without costs.
        correct: (N,) bool, or None without targets; a row of logits that holds a NaN is wrong.
    """

    exits: Tensor
    predictions: Tensor
    confidences: Tensor
    logits: Tensor
    counts: Tensor
    mean_cost: float | None = None
    correct: Tensor | None = None

    @property
    def accuracy(self) -> float | None:
        """Fraction of right answers, None without targets, NaN without samples."""
        if self.correct is None:
            return None
        return float(self.correct.sum()) / len(self.correct) if len(self.correct) else math.nan


def _numbers(values: Sequence[float] | Tensor | float, count: int, name: str) -> list[float]:
    """``values`` as ``count`` numbers without NaN; a single number serves for all."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    result = [float(values)] * count if isinstance(values, numbers.Real) else [float(v) for v in values]
    if len(result) != count:
        raise ValueError(f"simulate: {name} must have {count} entries, got {len(result)}")
    for position, value in enumerate(result):
        if math.isnan(value):
            raise ValueError(f"simulate: {name} must not be NaN, got NaN at position {position}")
    return result


def _positive(values: Sequence[float] | Tensor | float, count: int, name: str) -> list[float]:
    """As :func:`_numbers`, but every number positive and finite."""
    result = _numbers(values, count, name)
    for position, value in enumerate(result):
        if not 0 < value < math.inf:
            raise ValueError(f"simulate: {name} must be positive and finite, got {value} at position {position}")
    return result


def _flags(enabled: Sequence[bool] | Tensor | bool, count: int) -> list[bool]:
    if isinstance(enabled, Tensor):
        enabled = enabled.detach().cpu().tolist()
    flags = [enabled] * count if isinstance(enabled, bool) else [bool(flag) for flag in enabled]
    if len(flags) != count:
        raise ValueError(f"simulate: enabled must have {count} entries, got {len(flags)}")
    return flags


def simulate(
    exit_logits: Tensor,
    weights: Sequence[float] | Tensor,
    policy: Policy | str | Callable[[Judged], Tensor],
    thresholds: Sequence[float] | Tensor | float,
    *,
    temperatures: Sequence[float] | Tensor | float = 1.0,
    enabled: Sequence[bool] | Tensor | bool = True,
    target: Tensor | None = None,
    costs: Sequence[float] | Tensor | None = None,
    on: str | None = None,
) -> Simulation:
    """Where would every sample leave, with which answer?

    A sample leaves at the first enabled exit e whose threshold is reached by the judged distribution: the softmax of
    ``R_e / T_e``, R_e being the running ensemble ``sum_{j<=e} b_j O_j`` divided by the sum of b_j so far, or of
    ``O_e / T_e`` with ``on="exit"``. The last exit always answers. A distribution that holds a NaN never leaves.

    Args:
        exit_logits: (E, N, K), floating.
        weights: (E,) output weights b, positive.
        policy: a :class:`Policy`, its name, or a callable (see :class:`Custom`).
        thresholds: E-1 numbers in the policy's unit (probability, nats, exits in a row, votes), or one for all.
        temperatures: E positive numbers, or one for all.
        enabled: E-1 flags, or one for all; a disabled exit lets nobody go, but patience and votes still count it.
        target: (N,) int64 labels, for ``correct``.
        costs: (E,) cost of a sample that is answered at each exit, all of its way included.
        on: "ensemble" or "exit", where ``policy`` is a name or a callable.

    Raises:
        TypeError: the exit logits are no floating tensor.
        ValueError: a shape or a value out of its range.
    """
    if not isinstance(exit_logits, Tensor):
        raise TypeError(f"simulate: exit_logits must be a torch.Tensor, got {type(exit_logits).__name__}")
    if exit_logits.dim() != 3 or exit_logits.shape[0] < 1:
        raise ValueError(f"simulate: exit_logits must have shape [E, N, K] with E >= 1, got {list(exit_logits.shape)}")
    exits, samples, classes = exit_logits.shape
    rule = as_policy(policy, on)
    factors = _positive(weights, exits, "weights")
    limits = _numbers(thresholds, exits - 1, "thresholds")
    scales = _positive(temperatures, exits, "temperatures")
    flags = _flags(enabled, exits - 1)
    prices = None if costs is None else _numbers(costs, exits, "costs")
    if target is not None and tuple(target.shape) != (samples,):
        raise ValueError(f"simulate: target must have shape [{samples}], got {list(target.shape)}")

    device = exit_logits.device
    acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
    taken = torch.empty(samples, dtype=torch.int64, device=device)
    predictions = torch.empty_like(taken)
    confidences = torch.empty(samples, dtype=torch.float32, device=device)
    sums = torch.empty(samples, classes, dtype=acc, device=device)

    indices = torch.arange(samples, device=device)
    running = torch.zeros(samples, classes, dtype=acc, device=device)
    state = rule.initial_state(samples, classes, device)
    weight_sum: float | Tensor = 0.0
    with torch.no_grad():
        for e in range(exits):
            last = e == exits - 1
            step = rule.gate(
                running.new_zeros(len(indices), 1),
                running,
                weight_sum,
                indices,
                state,
                exit_logits[e, indices],
                exit_index=e,
                weight=factors[e],
                threshold=0.0 if last else limits[e],
                temperature=scales[e],
                enabled=not last and flags[e],
            )
            stay = 0 if last else int(step.count)
            gone = step.indices[stay:]
            taken[gone] = e
            predictions[gone] = step.argmax[stay:]
            confidences[gone] = step.stats[stay:, 0]
            sums[gone] = step.running[stay:]
            running, indices, state = step.running[:stay], step.indices[:stay], step.state[:stay]
            weight_sum = step.weight_sum
    counts = torch.bincount(taken, minlength=exits)
    mean_cost = None
    if prices is not None:
        mean_cost = sum(c * p for c, p in zip(counts.tolist(), prices, strict=True)) / samples if samples else math.nan
    correct = None
    if target is not None:
        correct = (predictions == target.to(device)) & ~sums.isnan().any(dim=1)
    return Simulation(taken, predictions, confidences, sums.to(exit_logits.dtype), counts, mean_cost, correct)
