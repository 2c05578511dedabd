"""Gates between the units: who leaves at which exit. The decision is :meth:`Policy.gate`, the simulator's own step."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aep_ext.deploy.engines.chain import Engine
from aep_ext.termination.policies import Judged, Policy, as_policy

__all__ = ["Gated", "Gates", "make_gates", "run_gates"]


class Gated(NamedTuple):
    """What became of N samples."""

    logits: Tensor
    """(N, K) in the network's dtype: the unnormalised sum of b_j O_j up to the exit that answered."""
    exit: Tensor
    """(N,) int64: that exit, from 0."""
    confidence: Tensor
    """(N,) float32: largest probability of the distribution judged there."""


@dataclass(frozen=True)
class Gates:
    """A policy with its numbers, checked once; one entry per exit, the last one closed (it answers what is left)."""

    policy: Policy
    weights: tuple[float, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    enabled: tuple[bool, ...]


def _listed(name: str, values: Any, count: int, kind: str, accepts: Callable[[Any], bool]) -> tuple[Any, ...]:
    """``values`` as ``count`` entries that are all accepted; one entry alone stands for all."""
    if hasattr(values, "tolist"):  # torch's and NumPy's
        if getattr(values, "ndim", 0) > 1:
            raise ValueError(f"PreparedNet.gates: {name} must have shape [{count}], got {list(values.shape)}")
        values = values.detach().cpu().tolist() if isinstance(values, Tensor) else values.tolist()
    if accepts(values):
        return (values,) * count
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"PreparedNet.gates: {name} must be {kind}, one or {count} of them, got {values!r}")
    found = tuple(v.item() if hasattr(v, "item") and getattr(v, "ndim", 1) == 0 else v for v in values)
    for position, value in enumerate(found):
        if not accepts(value):
            raise TypeError(f"PreparedNet.gates: {name} must be {kind}, got {value!r} at position {position}")
    if len(found) != count:
        raise ValueError(f"PreparedNet.gates: {name} must have {count} entries, got {len(found)}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _numbers(name: str, values: Sequence[float] | Tensor | float, count: int, positive: bool) -> tuple[float, ...]:
    found = tuple(float(value) for value in _listed(name, values, count, "numbers", _is_number))
    for position, value in enumerate(found):
        if math.isnan(value):
            raise ValueError(f"PreparedNet.gates: {name} must not be NaN, got NaN at position {position}")
        if positive and not 0 < value < math.inf:
            raise ValueError(
                f"PreparedNet.gates: {name} must be positive and finite, got {value} at position {position}"
            )
    return found


def make_gates(
    weights: tuple[float, ...],
    policy: Policy | str | Callable[[Judged], Tensor],
    thresholds: Sequence[float] | Tensor | float,
    temperatures: Sequence[float] | Tensor | float | None,
    enabled: Sequence[bool] | Tensor | bool | None,
    backend: str,
) -> Gates:
    """Checks everything; see :meth:`PreparedNet.gates`."""
    rule = as_policy(policy)
    if not rule.built_in and backend != "eager":
        raise ValueError(
            f"PreparedNet.gates: backend '{backend}' takes the built-in policies, got policy '{rule.name}' "
            "(a user's own rule runs on backend 'eager')"
        )
    exits = len(weights)
    flags = True if enabled is None else enabled
    flags = _listed("enabled", flags, exits - 1, "bools", lambda flag: isinstance(flag, bool))
    return Gates(
        rule,
        _numbers("output_weights", weights, exits, positive=True),
        (*_numbers("thresholds", thresholds, exits - 1, positive=False), 0.0),
        _numbers("temperatures", 1.0 if temperatures is None else temperatures, exits, positive=True),
        (*flags, False),
    )


def run_gates(engine: Engine, gates: Gates, x: Tensor, classes: int) -> Gated:
    """``x`` (n, C, H, W), contiguous, n >= 1, through the units, each followed by its gate."""
    with torch.no_grad():
        return _one(engine, gates, x, classes) if len(x) == 1 else _many(engine, gates, x, classes)


def _one(engine: Engine, gates: Gates, x: Tensor, classes: int) -> Gated:
    """A single sample: nothing is ever gathered, the units run on in their bound memory until it leaves."""
    device, dtype = x.device, x.dtype
    chain = engine.chain(1)
    chain.load(0, x)
    running = torch.zeros(1, classes, dtype=_accumulator(dtype), device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    state = gates.policy.initial_state(1, classes, device)
    # The gate would copy features, so it is given a stub: they stay where the engine has them.
    stub = running[:, :1]
    weight_sum: float | Tensor = 0.0
    last = len(gates.weights) - 1
    gate = gates.policy.gate
    for exit in range(last + 1):
        step = gate(
            stub,
            running,
            weight_sum,
            row,
            state,
            chain.run(exit),
            exit_index=exit,
            weight=gates.weights[exit],
            threshold=gates.thresholds[exit],
            temperature=gates.temperatures[exit],
            enabled=gates.enabled[exit],
        )
        if exit == last or not step.count:
            break
        running, state, weight_sum = step.running, step.state, step.weight_sum
    return Gated(step.running.to(dtype), row.fill_(exit), step.stats[:, 0])


def _many(engine: Engine, gates: Gates, x: Tensor, classes: int) -> Gated:
    n, device, dtype = len(x), x.device, x.dtype
    logits = torch.empty(n, classes, dtype=dtype, device=device)
    exits = torch.empty(n, dtype=torch.int64, device=device)
    confidences = torch.empty(n, dtype=torch.float32, device=device)

    chain = engine.chain(n)
    chain.load(0, x)
    running = torch.zeros(n, classes, dtype=_accumulator(dtype), device=device)
    indices = torch.arange(n, device=device)
    state = gates.policy.initial_state(n, classes, device)
    weight_sum: float | Tensor = 0.0
    last = len(gates.weights) - 1
    for exit in range(last + 1):
        step = gates.policy.gate(
            running[:, :1],  # as above: features are gathered below, and only if somebody leaves
            running,
            weight_sum,
            indices,
            state,
            chain.run(exit),
            exit_index=exit,
            weight=gates.weights[exit],
            threshold=gates.thresholds[exit],
            temperature=gates.temperatures[exit],
            enabled=gates.enabled[exit],
        )
        stay = 0 if exit == last else int(step.count)
        if stay == len(indices):  # nobody leaves: the partition is the old order
            running, state, weight_sum = step.running, step.state, step.weight_sum
            continue
        gone = step.indices[stay:]
        logits[gone] = step.running[stay:].to(dtype)
        exits[gone] = exit
        confidences[gone] = step.stats[stay:, 0]
        if stay == 0:
            break
        # Rows keep their order, so `indices` is ascending and tells where in the batch at hand a survivor sits.
        rows = torch.searchsorted(indices, step.indices[:stay])
        running, indices, state = step.running[:stay], step.indices[:stay], step.state[:stay]
        weight_sum = step.weight_sum
        survivors = engine.chain(stay)
        survivors.gather(exit + 1, chain.features(exit), rows)
        chain = survivors
    return Gated(logits, exits, confidences)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
