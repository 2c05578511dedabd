"""What a user asks of a gated network: so much accuracy, so little cost, or a risk that is kept with a guarantee."""

from __future__ import annotations

import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

LOSSES = ("degradation", "drop", "disagreement")
"""Losses of a sample against the full ensemble; see ``losses_at``."""


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")


@dataclass(frozen=True)
class AccuracyBudget:
    """Cheapest thresholds whose top-1 accuracy is at most ``drop`` points below the full ensemble's.

    Attributes:
        drop: points (0.5 is half a percent of the samples). Negative asks for more right answers than the full
            ensemble's, which may be out of reach.
    """

    drop: float

    def __post_init__(self) -> None:
        _check_number("AccuracyBudget: drop", self.drop)
        if not math.isfinite(self.drop) or abs(self.drop) > 100:
            raise ValueError(f"AccuracyBudget: drop must be points within -100..100, got {self.drop}")


@dataclass(frozen=True)
class CostBudget:
    """Most accurate thresholds whose mean cost is within a limit. Exactly one of both is given.

    Attributes:
        mean: in the unit of the costs.
        fraction: of the cost of the full ensemble.
    """

    mean: float | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        if (self.mean is None) == (self.fraction is None):
            raise ValueError(
                "CostBudget: exactly one of mean and fraction must be given, "
                f"got mean={self.mean} and fraction={self.fraction}"
            )
        value = self.mean if self.mean is not None else self.fraction
        _check_number("CostBudget: the limit", value)
        if value is None or not 0 < value < math.inf:
            raise ValueError(f"CostBudget: the limit must be positive and finite, got {value}")

    def limit(self, full_cost: float) -> float:
        """The largest mean cost."""
        return self.mean if self.mean is not None else float(self.fraction or 0.0) * full_cost


@dataclass(frozen=True)
class RiskBudget:
    """Cheapest thresholds on a path whose risk is kept, with a finite-sample guarantee. See ``control_risk``.

    Attributes:
        epsilon: largest risk, a fraction of 1.
        delta: "ltt": the largest probability, over the calibration data, of a larger risk. Unused by "crc".
        loss: "degradation", "drop" or "disagreement", see ``losses_at``.
        method: "ltt", with probability 1 - delta, or "crc", in expectation.
    """

    epsilon: float
    delta: float = 0.1
    loss: str = "degradation"
    method: str = "ltt"

    def __post_init__(self) -> None:
        _check_number("RiskBudget: epsilon", self.epsilon)
        _check_number("RiskBudget: delta", self.delta)
        if not 0 < self.epsilon < 1 or not 0 < self.delta < 1:
            raise ValueError(
                f"RiskBudget: epsilon and delta must be within (0, 1), got {self.epsilon} and {self.delta}"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"RiskBudget: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.method not in ("ltt", "crc"):
            raise ValueError(f"RiskBudget: method must be 'ltt' or 'crc', got {self.method!r}")
        if self.method == "crc" and self.loss == "drop":
            raise ValueError(
                "RiskBudget: loss must be within [0, 1] for method 'crc' ('degradation' or 'disagreement'), got 'drop'"
            )


Budget = AccuracyBudget | CostBudget | RiskBudget


def budget_to_dict(budget: Budget) -> dict[str, Any]:
    """As plain values for JSON."""
    return {"kind": type(budget).__name__, **asdict(budget)}


def budget_from_dict(values: dict[str, Any]) -> Budget:
    """The reverse of :func:`budget_to_dict`."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in (AccuracyBudget, CostBudget, RiskBudget)}
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"budget: kind must be one of {', '.join(kinds)}, got {kind!r}")
    try:
        return kinds[kind](**rest)
    except TypeError:
        raise ValueError(f"budget: {kind} must have other entries, got {', '.join(map(str, rest)) or 'none'}") from None
