"""The gates of a prepared network: a policy with its numbers, checked once. The walk itself is termination's."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from aep_ext.inference._old_criteria import Judged, Policy, as_policy
from aep_ext.inference.executor import GatedOutput
from aep_ext.inference.settings import GateSettings, sums_of

__all__ = ["Gated", "Gates", "make_gates"]


Gated = GatedOutput
"""What became of N samples: (logits (N, K), exit (N,) int64, confidence (N,) float32)."""


@dataclass(frozen=True)
class Gates:
    """A policy with its numbers, checked once; one entry per exit, the last one closed (it answers what is left)."""

    policy: Policy
    weights: tuple[float, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    enabled: tuple[bool, ...]

    @cached_property
    def settings(self) -> GateSettings:
        """The same as the executor takes them."""
        return GateSettings(self.weights, self.thresholds, self.temperatures, self.enabled, sums_of(self.weights))


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
