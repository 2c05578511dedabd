"""How near samples come to a threshold: there, and only there, may a live network and the simulator part."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aep_ext.inference._old_criteria import Judged, Policy, as_policy
from aep_ext.inference.simulate import simulate

_COLUMN = {"confidence": 0, "entropy": 1, "margin": 2}


def near_threshold(
    exit_logits: Tensor,
    weights: Sequence[float] | Tensor,
    policy: Policy | str | Callable[[Judged], Tensor],
    thresholds: Sequence[float] | Tensor | float,
    *,
    temperatures: Sequence[float] | Tensor | float = 1.0,
    enabled: Sequence[bool] | Tensor | bool = True,
    on: str | None = None,
    tolerance: float = 1e-5,
) -> Tensor:
    """Which samples pass within ``tolerance`` of a decision that could fall otherwise?

    The low bits of a network's logits depend on the shape of the batch, so executor and simulator agree exactly on
    cached logits, and on a live network except for these samples. ``int(near_threshold(...).sum())`` counts them.

    A sample is near where, at an enabled exit on its way (the exit it takes included), the confidence, entropy or
    margin lies within the tolerance of that exit's threshold. Under patience and votes, which count classes, it is near
    where the two largest judged probabilities lie so close, at any exit on its way.

    Args:
        exit_logits, weights, policy, thresholds, temperatures, enabled, on: as for :func:`simulate`.
        tolerance: in the policy's unit (probability, nats; for patience and votes: probability).

    Returns:
        (N,) bool.

    Raises:
        ValueError: a user's own rule, whose distance to a threshold is not known; otherwise as :func:`simulate`.
    """
    rule = as_policy(policy, on)
    if not rule.built_in:
        raise ValueError(
            f"near_threshold: policy must be built in, got {rule.name!r}: how near its rule comes to "
            "another decision cannot be known"
        )
    exits = exit_logits.shape[0]
    taken = simulate(exit_logits, weights, rule, thresholds, temperatures=temperatures, enabled=enabled).exits
    limits, flags = _listed(thresholds, exits - 1), _listed(enabled, exits - 1)
    scales, factors = _listed(temperatures, exits), _listed(weights, exits)
    n, classes = exit_logits.shape[1:]
    acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
    running = torch.zeros(n, classes, dtype=acc, device=exit_logits.device)
    indices, state = torch.arange(n, device=running.device), rule.initial_state(n, classes, running.device)
    near = torch.zeros(n, dtype=torch.bool, device=running.device)
    weight_sum: float | Tensor = 0.0
    with torch.no_grad():
        for e in range(exits - 1):
            result = rule.gate(
                running.new_zeros(n, 1),
                running,
                weight_sum,
                indices,
                state,
                exit_logits[e],
                exit_index=e,
                weight=factors[e],
                threshold=0.0,
                temperature=scales[e],
                enabled=False,
            )
            running, state, weight_sum = result.running, result.state, result.weight_sum
            column = _COLUMN.get(rule.name)
            if column is None:
                close = result.stats[:, 2] <= tolerance
            elif flags[e]:
                close = (result.stats[:, column].double() - limits[e]).abs() <= tolerance
            else:
                continue
            near |= close & (taken >= e)
    return near


def _listed(values: Sequence[float] | Tensor | float, count: int) -> list[float]:
    """``count`` values; :func:`simulate` has checked them."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    try:
        return list(values)
    except TypeError:
        return [values] * count
