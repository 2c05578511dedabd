"""The simulator: what an ExitPolicy does to cached logits. The specification of every executor.

It takes the very step that executors take, :func:`~aep_ext.inference.criteria.gate_step`, on the samples that are still
there, only without features to carry. So exit taken, answer and confidence are an executor's by construction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext._utils import per_exit
from aep_ext.inference.criteria import criterion_name, gate_step, initial_state
from aep_ext.inference.exit_policy import ExitPolicy


@dataclass(frozen=True, eq=False)
class Simulation:
    """What became of N samples.

    Attributes:
        logits: (N, K) in the dtype of the exit logits: R_e at the exit taken.
        exit: (N,) int64, the exit at which each was answered, from 0.
        confidence: (N,) float32, the largest probability of the criterion's distribution there.
        prediction: (N,) int64, argmax of R_e there.
        counts: (E,) int64, how many were answered at each exit.
        correct: (N,) bool, or None without targets; a row of logits that holds a NaN is wrong.
        mean_cost: mean over the samples of the cost of their exit, or None without costs.
    """

    logits: Tensor
    exit: Tensor
    confidence: Tensor
    prediction: Tensor
    counts: Tensor
    correct: Tensor | None = None
    mean_cost: float | None = None

    @property
    def accuracy(self) -> float | None:
        """Fraction of right answers, None without targets, NaN without samples."""
        if self.correct is None:
            return None
        return float(self.correct.sum()) / len(self.correct) if len(self.correct) else math.nan


def simulate(
    exit_logits: Tensor,
    policy: ExitPolicy,
    *,
    target: Tensor | None = None,
    costs: Sequence[float] | Tensor | None = None,
) -> Simulation:
    """Where would every sample leave, with which answer?

    Args:
        exit_logits: (E, N, K) floating, of the exits that the policy is for.
        policy: an :class:`ExitPolicy` of E exits.
        target: (N,) int64 labels, for ``correct``.
        costs: (E,) cost of a sample that is answered at each exit, all of its way included.

    Raises:
        TypeError: the exit logits are no floating tensor.
        ValueError: a shape or a count does not fit.
    """
    if not isinstance(exit_logits, Tensor) or not exit_logits.is_floating_point():
        found = exit_logits.dtype if isinstance(exit_logits, Tensor) else type(exit_logits).__name__
        raise TypeError(f"simulate: exit_logits must be a floating tensor, got {found}")
    if exit_logits.dim() != 3 or exit_logits.shape[0] != policy.num_exits:
        raise ValueError(
            f"simulate: exit_logits must have shape [{policy.num_exits}, N, K], got {list(exit_logits.shape)}"
        )
    exits, samples, classes = exit_logits.shape
    prices = None if costs is None else per_exit("simulate", "costs", costs, exits)
    if target is not None and tuple(target.shape) != (samples,):
        raise ValueError(f"simulate: target must have shape [{samples}], got {list(target.shape)}")

    device = exit_logits.device
    acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
    taken = torch.empty(samples, dtype=torch.int64, device=device)
    predictions = torch.empty_like(taken)
    confidences = torch.empty(samples, dtype=torch.float32, device=device)
    answers = torch.empty(samples, classes, dtype=acc, device=device)

    indices = torch.arange(samples, device=device)
    running = torch.zeros(samples, classes, dtype=acc, device=device)
    state = initial_state(policy.criterion, samples, classes, device)
    weight_sum: float | Tensor = 0.0
    with torch.no_grad():
        for e in range(exits):
            last = e == exits - 1
            if policy.starts_anew(e):
                running, weight_sum = torch.zeros_like(running), 0.0
            step = gate_step(
                policy.criterion,
                policy.criterion_on,
                running.new_zeros(len(indices), 1),
                running,
                weight_sum,
                indices,
                state,
                exit_logits[e, indices],
                exit_index=e,
                weight=1.0 if policy.starts_anew(e) else policy.output_weights[e],
                threshold=0.0 if last else policy.thresholds[e],
                temperature=policy.temperatures[e],
                enabled=not last and policy.enabled[e],
                last=last,
            )
            stay = int(step.count)
            gone = step.indices[stay:]
            taken[gone] = e
            predictions[gone] = step.argmax[stay:]
            confidences[gone] = step.stats[stay:, 0]
            answers[gone] = step.running[stay:]
            running, indices, state = step.running[:stay], step.indices[:stay], step.state[:stay]
            weight_sum = step.weight_sum
    mean_cost = None
    counts = torch.bincount(taken, minlength=exits)
    if prices is not None:
        mean_cost = sum(c * p for c, p in zip(counts.tolist(), prices, strict=True)) / samples if samples else math.nan
    correct = None
    if target is not None:
        correct = (predictions == target.to(device)) & ~answers.isnan().any(dim=1)
    return Simulation(answers.to(exit_logits.dtype), taken, confidences, predictions, counts, correct, mean_cost)


def near_threshold(exit_logits: Tensor, policy: ExitPolicy, tolerance: float = 1e-5) -> Tensor:
    """Which samples pass within ``tolerance`` of a decision that could fall otherwise?

    The low bits of a network's logits depend on the shape of the batch, so executor and simulator agree exactly on
    cached logits, and on a live network except for these samples. ``int(near_threshold(...).sum())`` counts them.

    A sample is near where, at an enabled exit on its way (the exit it takes included), the confidence, entropy or
    margin lies within the tolerance of that exit's threshold. Under patience and votes, which count classes, it is near
    where the two largest probabilities lie so close, at any exit on its way.

    Args:
        exit_logits: (E, N, K) floating.
        policy: of E exits, with a criterion by name.
        tolerance: in the criterion's unit (probability, nats; for patience and votes: probability).

    Returns:
        (N,) bool.

    Raises:
        ValueError: a user's own criterion, whose distance to a threshold is not known; otherwise as :func:`simulate`.
    """
    if not isinstance(policy.criterion, str):
        raise ValueError(
            f"near_threshold: criterion must be a name, got {criterion_name(policy.criterion)}: how near its rule "
            "comes to another decision cannot be known"
        )
    taken = simulate(exit_logits, policy).exit
    near = torch.zeros_like(taken, dtype=torch.bool)
    column = {"confidence": 0, "entropy": 1, "margin": 2}.get(policy.criterion)
    for e in range(policy.num_exits - 1):
        first = e if policy.criterion_on == "exit" else 0
        weights = torch.tensor(policy.output_weights[first : e + 1], dtype=torch.float64, device=exit_logits.device)
        stats = ops.ensemble_stats(
            exit_logits[first : e + 1].detach(),
            weights,
            normalizer=float(weights.sum()),
            temperature=policy.temperatures[e],
        ).stats
        if column is None:
            near |= (stats[:, 2] <= tolerance) & (taken >= e)
        elif policy.enabled[e]:
            near |= ((stats[:, column].double() - policy.thresholds[e]).abs() <= tolerance) & (taken >= e)
    return near
