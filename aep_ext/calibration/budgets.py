"""What a user asks of a network that stops early: so much accuracy, so little cost, or a risk with a guarantee."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

LOSSES = ("drop", "degradation")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


@dataclass(frozen=True)
class AccuracyBudget:
    """The cheapest policy whose top-1 accuracy is at most ``points`` below the reference's.

    Attributes:
        points: 0.5 is half a percent of the samples. Negative asks for more right answers than the reference's.
    """

    points: float = 0.5

    def __post_init__(self) -> None:
        _check_number("AccuracyBudget: points", self.points)
        if not abs(self.points) <= 100:
            raise ValueError(f"AccuracyBudget: points must be within -100..100, got {self.points}")


@dataclass(frozen=True)
class CostBudget:
    """The most accurate policy whose mean cost is within a limit. Exactly one of both is given.

    Attributes:
        mean: in the unit of the costs.
        fraction: of the cost of all exits.
    """

    mean: float | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.mean, self.fraction) if value is not None]
        if len(given) != 1:
            raise ValueError(
                "CostBudget: exactly one of mean and fraction must be given, "
                f"got mean={self.mean} and fraction={self.fraction}"
            )
        _check_number("CostBudget: the limit", given[0])
        if not 0 < given[0] < math.inf:
            raise ValueError(f"CostBudget: the limit must be positive and finite, got {given[0]}")

    def limit(self, full_cost: float) -> float:
        """The largest mean cost."""
        return self.mean if self.mean is not None else float(self.fraction or 0.0) * full_cost


@dataclass(frozen=True)
class RiskBudget:
    """The cheapest policy whose risk is shown to be kept, on samples that had no part in choosing it.

    Attributes:
        epsilon: the largest risk, a fraction of 1.
        delta: for "ltt": the largest probability, over the calibration data, of a larger risk. Unused by "crc".
        loss: what a sample loses. "drop": 1 where only the reference is right, -1 where only the early answer is; its
            mean is the loss of accuracy. "degradation": 1 where only the reference is right, else 0.
        method: "ltt" (learn-then-test) keeps the risk with probability 1 - delta, "crc" (conformal risk control) in
            expectation.
    """

    epsilon: float
    delta: float = 0.1
    loss: str = "drop"
    method: str = "ltt"

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            _check_number(f"RiskBudget: {name}", value)
            if not 0 < value < 1:
                raise ValueError(f"RiskBudget: {name} must be within (0, 1), got {value}")
        if self.loss not in LOSSES:
            raise ValueError(f"RiskBudget: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.method not in ("ltt", "crc"):
            raise ValueError(f"RiskBudget: method must be 'ltt' or 'crc', got {self.method!r}")
        if self.method == "crc" and self.loss == "drop":
            raise ValueError("RiskBudget: loss must be 'degradation' for method 'crc', got 'drop'")


Budget = AccuracyBudget | CostBudget | RiskBudget


def as_budget(budget: Budget | float) -> Budget:
    """A budget; a number is the points of an :class:`AccuracyBudget`.

    Raises:
        TypeError: neither.
    """
    if isinstance(budget, (AccuracyBudget, CostBudget, RiskBudget)):
        return budget
    if isinstance(budget, numbers.Real) and not isinstance(budget, bool):
        return AccuracyBudget(float(budget))
    raise TypeError(
        "budget must be a number of points, an AccuracyBudget, a CostBudget or a RiskBudget, "
        f"got {type(budget).__name__}"
    )


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """As plain values for JSON."""
    return {"kind": type(budget).__name__, **asdict(budget)}


def budget_from_dict(values: dict[str, Any]) -> Budget:
    """The reverse of :func:`budget_to_dict`.

    Raises:
        ValueError: no such kind, or other entries than it has.
    """
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (AccuracyBudget, CostBudget, RiskBudget)}
    try:
        return kinds[values["kind"]](**{name: value for name, value in values.items() if name != "kind"})
    except (KeyError, TypeError):
        raise ValueError(f"budget: entries must be kind ({', '.join(kinds)}) and its own, got {dict(values)}") from None
