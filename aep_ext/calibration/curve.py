"""What a threshold search answers: one set of thresholds, or the whole accuracy-cost curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.calibration.identity import DataIdentity
from aep_ext.inference._old_criteria import Policy


def spread(costs: NDArray[np.float64], points: int) -> NDArray[np.int64]:
    """At most so many positions, evenly spread over ascending costs, both ends among them."""
    if len(costs) <= points:
        return np.arange(len(costs))
    wanted = np.searchsorted(costs, np.linspace(costs[0], costs[-1], points)).clip(0, len(costs) - 1)
    return np.unique(np.concatenate([[0], wanted[1:-1], [len(costs) - 1]]))


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Thresholds found on cached logits, and what they do there.

    Attributes:
        policy: a built-in one.
        thresholds: (E-1,) float32 in the policy's unit, midway between neighbouring values of the data.
        enabled: (E-1,) bool; a gate that does not pay is off, and its threshold is not used.
        temperatures: (E,) float32.
        correct, n: right answers, of how many samples.
        full_correct: of the full ensemble.
        cost, full_cost: mean per sample, in the unit of the costs.
        counts: how many samples were answered at each exit.
        feasible: whether the budget is met; otherwise these are the nearest thresholds that were found.
        exact: whether every combination was tried.
        bound: no thresholds whatever do better on these data than this: the mean cost for an accuracy budget, the
            accuracy for a cost budget. None where there is nothing to compare (infeasible) or it was not asked for.
        notice: says so where a budget is not met.
        seed, lines: of the search; how many line searches it made.
        data: the samples that were searched.
    """

    policy: Policy
    thresholds: Tensor
    enabled: Tensor
    temperatures: Tensor
    correct: int
    n: int
    full_correct: int
    cost: float
    full_cost: float
    counts: tuple[int, ...]
    feasible: bool = True
    exact: bool = False
    bound: float | None = None
    gap: float | None = None
    notice: str = ""
    seed: int = 0
    lines: int = 0
    data: DataIdentity | None = None

    @property
    def accuracy(self) -> float:
        """Top-1 as a fraction of 1."""
        return self.correct / self.n

    @property
    def full_accuracy(self) -> float:
        """Top-1 of the full ensemble, as a fraction of 1."""
        return self.full_correct / self.n

    @property
    def drop(self) -> float:
        """Points of top-1 below the full ensemble."""
        return 100 * (self.full_correct - self.correct) / self.n


@dataclass(frozen=True, eq=False)
class ThresholdCurve:
    """The accuracy-cost curve: the points that no other found beats, cheapest first.

    Attributes:
        correct: (P,) int64, ascending.
        cost: (P,) float64, mean per sample, ascending.
        thresholds, enabled: (P, E-1) float32 and bool.
        lowest_cost: (P,) float64: no thresholds that are right as often cost less; NaN where no bound was computed.
        n, full_correct, full_cost: as for :class:`Thresholds`.
        exact: whether every combination was tried.
        data: the samples that were searched.
    """

    policy: Policy
    temperatures: Tensor
    correct: NDArray[np.int64]
    cost: NDArray[np.float64]
    thresholds: Tensor
    enabled: Tensor
    lowest_cost: NDArray[np.float64]
    n: int
    full_correct: int
    full_cost: float
    exact: bool
    data: DataIdentity | None = None

    def __len__(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(P,) top-1 as fractions of 1."""
        return self.correct / self.n

    def thinned(self, points: int) -> ThresholdCurve:
        """At most so many points, evenly spread over the cost, both ends kept."""
        if points < 2:
            raise ValueError(f"ThresholdCurve.thinned: points must be at least 2, got {points}")
        if len(self) <= points:
            return self
        kept = spread(self.cost, points)
        return ThresholdCurve(
            self.policy,
            self.temperatures,
            self.correct[kept],
            self.cost[kept],
            self.thresholds[kept],
            self.enabled[kept],
            self.lowest_cost[kept],
            self.n,
            self.full_correct,
            self.full_cost,
            self.exact,
            self.data,
        )

    def to_dict(self, points: int = 200) -> dict[str, Any]:
        """As plain values for JSON, thinned to so many points."""
        some = self.thinned(points)
        return {
            "policy": {"name": self.policy.name, "on": self.policy.on},
            "n": self.n,
            "exact": self.exact,
            "full_correct": self.full_correct,
            "full_cost": self.full_cost,
            "temperatures": self.temperatures.tolist(),
            "correct": some.correct.tolist(),
            "cost": some.cost.tolist(),
            "thresholds": some.thresholds.tolist(),
            "enabled": some.enabled.tolist(),
            "lowest_cost": [None if math.isnan(value) else value for value in some.lowest_cost.tolist()],
        }
