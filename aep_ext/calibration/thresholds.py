"""Thresholds for an accuracy budget, a cost budget, or the whole accuracy-cost curve, joint over all gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aep_ext.calibration import search
from aep_ext.calibration.archive import Archive, Limits
from aep_ext.calibration.bound import LagrangianBound
from aep_ext.calibration.budgets import LOSSES
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.curve import ThresholdCurve, Thresholds, spread
from aep_ext.calibration.exit_costs import checked_costs
from aep_ext.calibration.problem import Problem
from aep_ext.calibration.table import GateTable
from aep_ext.inference._old_criteria import Policy

_KICKS = 60
_PRICE_STEP = 1.25
_PRICE_STEPS = 5


@dataclass(eq=False)
class ThresholdSearch:
    """One search on one cache, from which any number of budgets, and the curve, are answered.

    A sample leaves at the first enabled gate whose threshold it reaches, so the gates depend on one another through
    those that are left. Small problems (one gate; few samples; patience and vote) are solved by trying everything.
    Else: exact line searches over one gate after another, on ``right - price * cost`` at a row of prices and from many
    starts, then for the budget itself, also over pairs of gates (:mod:`.search`); and a bound that no thresholds can
    pass (:mod:`.bound`), so that the gap is known. The same arguments give the same result.

    Args:
        cache: at least one sample.
        policy: a built-in policy or its name.
        costs: (E,) non-decreasing: cost of a sample that is answered at each exit, all of its way included
            (multiply-adds or milliseconds); see ``exit_costs``.
        temperatures: (E,), rounded to float32 as a gated network keeps them; 1 by default.
        on: "ensemble" or "exit", where ``policy`` is a name.
        loss: what a budget of accuracy counts. "drop": right answers. "degradation" and "disagreement" (see
            ``losses_at``): answers that are no such loss against the full ensemble; ``correct`` in the results then
            counts these, and the careful end of the curve loses nothing. A path to control such a risk along begins so.
        seed: of the random starts.
        method: "auto"; "exhaustive" or "search" by hand.

    Raises:
        ValueError: an argument breaks these rules.
    """

    cache: ExitCache
    policy: Policy | str
    costs: Sequence[float] | Tensor
    temperatures: Sequence[float] | Tensor | None = None
    on: str | None = None
    loss: str = "drop"
    seed: int = 0
    method: str = "auto"
    table: GateTable = field(init=False, repr=False)
    problem: Problem = field(init=False, repr=False)
    archive: Archive = field(init=False, repr=False)
    exact: bool = field(init=False)

    def __post_init__(self) -> None:
        exits = self.cache.num_exits
        if self.method not in ("auto", "exhaustive", "search"):
            raise ValueError(f"ThresholdSearch: method must be 'auto', 'exhaustive' or 'search', got {self.method!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"ThresholdSearch: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not len(self.cache):
            raise ValueError("ThresholdSearch: cache must hold at least one sample, got none")
        prices = checked_costs("ThresholdSearch", self.costs, exits)
        scales = torch.as_tensor(1.0 if self.temperatures is None else self.temperatures, dtype=torch.float32).cpu()
        if scales.dim() == 0:
            scales = scales.repeat(exits)
        if tuple(scales.shape) != (exits,) or not bool(((scales > 0) & scales.isfinite()).all()):
            raise ValueError(f"ThresholdSearch: temperatures must be {exits} positive numbers, got {scales.tolist()}")
        self.temperatures = scales
        cache = self.cache
        table = GateTable.of(cache.logits, cache.weights, cache.target, self.policy, scales, self.on)
        self.table = table.against_the_ensemble(self.loss)
        self.problem = Problem.of(self.table, prices)
        self.archive = Archive(self.problem)
        self.exact = self.method == "exhaustive" or (self.method == "auto" and search.is_small(self.problem))
        self._bound = LagrangianBound(self.problem)
        self._climbed: dict[float, tuple[Limits, float]] = {}
        if self.exact:
            search.search_everything(self.archive)
        else:
            self._climbed = search.search_front(self.archive, self.seed)
        if self.problem.gates == 0:
            # One exit: nothing to search; the archive holds the one way there is.
            correct, cost = self.problem.totals(())
            self.archive.cost[correct] = cost

    @property
    def full_correct(self) -> int:
        """Right answers of the full ensemble."""
        return int(self.table.right[-1].sum())

    def _limits(self, entry: int) -> Limits:
        return self.archive.limits(entry) if self.problem.gates else ()

    def _numbers(self, limits: Limits) -> tuple[list[float], list[bool]]:
        pairs = [self.table.threshold(e, limit) for e, limit in enumerate(limits)]
        return [value for value, _ in pairs], [on for _, on in pairs]

    def _found(self, entry: int, **more: Any) -> Thresholds:
        limits = self._limits(entry)
        values, flags = self._numbers(limits)
        thresholds, enabled = torch.tensor(values, dtype=torch.float32), torch.tensor(flags, dtype=torch.bool)
        n = len(self.cache)
        # From the thresholds themselves, by the gate's own comparison.
        taken = self.table.leaving(thresholds.double().numpy(), enabled.numpy())
        counts = np.bincount(taken, minlength=self.cache.num_exits)
        return Thresholds(
            self.table.policy,
            thresholds,
            enabled,
            self.temperatures,
            correct=int(self.table.right[taken, np.arange(n)].sum()),
            n=n,
            full_correct=self.full_correct,
            cost=float(counts @ self.problem.costs) / n,
            full_cost=float(self.problem.costs[-1]),
            counts=tuple(counts.tolist()),
            exact=self.exact,
            seed=self.seed,
            lines=self.problem.lines,
            data=self.cache.identity,
            **more,
        )

    def for_accuracy(self, drop: float, *, bound_steps: int = 200) -> Thresholds:
        """The cheapest thresholds that lose at most ``drop`` points of top-1 against the full ensemble.

        Args:
            drop: points; see ``AccuracyBudget``.
            bound_steps: of the bound's subgradient method at each price, of which three or more are tried; 0: no bound.

        Raises:
            ValueError: ``drop`` is out of its range.
        """
        if not -100 <= drop <= 100:
            raise ValueError(f"ThresholdSearch.for_accuracy: drop must be points within -100..100, got {drop}")
        n = len(self.cache)
        needed = math.ceil(self.full_correct - drop * n / 100 - 1e-9 * n)
        entry = (
            self.archive.cheapest(needed)
            if self.exact
            else search.polish(self.archive, at_least=needed, kicks=_KICKS, seed=self.seed)
        )
        if entry is None:
            reached = int(np.flatnonzero(np.isfinite(self.archive.cost))[-1])
            return self._found(
                reached,
                feasible=False,
                notice=(
                    f"no thresholds were found that are right on {needed} of {n} samples; {reached} is the best reached"
                ),
            )
        bound = float(self.archive.cost[entry]) / n if self.exact else None
        if not self.exact and bound_steps > 0:
            lowest = self.problem.costs[0] * n
            lowest = max(lowest, self._tightest(entry, bound_steps, lambda price, upper: (needed - upper) / price))
            bound = min(lowest, float(self.archive.cost[entry])) / n
        gap = None if bound is None else max(0.0, float(self.archive.cost[entry]) / n - bound)
        return self._found(entry, bound=bound, gap=gap)

    def for_cost(self, mean: float, *, bound_steps: int = 200) -> Thresholds:
        """The most accurate thresholds whose mean cost is at most ``mean``.

        Args:
            mean: in the unit of the costs.
            bound_steps: as for :meth:`for_accuracy`.

        Raises:
            ValueError: ``mean`` is not positive and finite.
        """
        if not 0 < mean < math.inf:
            raise ValueError(f"ThresholdSearch.for_cost: mean must be positive and finite, got {mean}")
        n = len(self.cache)
        limit = mean * n * (1 + 1e-12)  # sums in another order differ in the last bits
        entry = (
            self.archive.best(limit)
            if self.exact
            else search.polish(self.archive, at_most=limit, kicks=_KICKS, seed=self.seed)
        )
        if entry is None:
            cheapest = self.archive.cheapest(0)
            reached = float(self.archive.cost[cheapest]) / n
            return self._found(
                cheapest,
                feasible=False,
                notice=(
                    f"no thresholds were found with a mean cost of at most {mean:g}; {reached:g} is the lowest reached"
                ),
            )
        bound = entry / n if self.exact else None
        if not self.exact and bound_steps > 0:
            highest = float(self._any_exit_right())
            highest = min(highest, -self._tightest(entry, bound_steps, lambda price, upper: -upper - price * limit))
            bound = max(math.floor(highest + 1e-6), entry) / n
        return self._found(entry, bound=bound, gap=None if bound is None else bound - entry / n)

    def curve(self, *, points: int = 200, bound_steps: int = 0, polish: int = 12) -> ThresholdCurve:
        """The whole accuracy-cost curve.

        Args:
            points: at most so many, evenly spread over the cost, both ends kept.
            bound_steps: of the bound at each of eight prices; 0: no bound.
            polish: at so many costs along the curve the search is made better first.

        Raises:
            ValueError: ``points`` is less than 2.
        """
        if points < 2:
            raise ValueError(f"ThresholdSearch.curve: points must be at least 2, got {points}")
        if not self.exact and polish > 0:
            front = self.archive.front()
            for cost in np.linspace(self.archive.cost[front[0]], self.archive.cost[front[-1]], polish):
                search.polish(self.archive, at_most=float(cost), with_pairs=False, rounds=4)
        n, front = len(self.cache), self.archive.front()
        lowest = np.full(len(front), math.nan)
        if self.exact:
            lowest = self.archive.cost[front].copy()
        elif bound_steps > 0:
            uppers = [
                (p, self._bound.upper(p, value, limits, bound_steps))
                for p, (limits, value) in list(self._climbed.items())[::2]
            ]
            lowest = np.maximum(self.problem.costs[0] * n, np.max([(front - u) / p for p, u in uppers], axis=0))
            lowest = np.minimum(lowest, self.archive.cost[front])
        costs = self.archive.cost[front]
        kept = spread(costs, points)
        front, lowest, costs = front[kept], lowest[kept], costs[kept]
        numbers = [self._numbers(self._limits(int(entry))) for entry in front]
        gates = self.problem.gates
        return ThresholdCurve(
            self.table.policy,
            self.temperatures,
            front,
            costs / n,
            torch.tensor([values for values, _ in numbers], dtype=torch.float32).reshape(len(front), gates),
            torch.tensor([flags for _, flags in numbers], dtype=torch.bool).reshape(len(front), gates),
            lowest / n,
            n,
            self.full_correct,
            float(self.problem.costs[-1]),
            self.exact,
            self.cache.identity,
        )

    def _any_exit_right(self) -> int:
        return int(self.table.right.any(axis=0).sum())

    def _tightest(self, entry: int, steps: int, bound: Callable[[float, float], float]) -> float:
        """The largest ``bound(price, upper)`` over a row of prices around the curve's slope at an entry.

        Every price gives a valid one. It is concave in the price, or its inverse, where ``upper`` is at its lowest, so
        a walk from the slope itself, down and then up, may stop where it falls.
        """
        slope = self._slope(entry)
        front = self.archive.front()
        cost = self.archive.cost[front]

        def at(step: int) -> float:
            price = slope * _PRICE_STEP**step
            values = front - price * cost
            best = int(np.argmax(values))
            return bound(price, self._bound.upper(price, float(values[best]), self._limits(int(front[best])), steps))

        start = at(0)
        tightest = start
        for direction in (-1, 1):
            last, step = start, direction
            while abs(step) <= _PRICE_STEPS:
                value = at(step)
                tightest = max(tightest, value)
                if value <= last:
                    break
                last, step = value, step + direction
            if tightest > start:
                break
        return tightest

    def _slope(self, entry: int) -> float:
        """The price at which an entry, or its neighbours on the hull of the curve, would be optimal."""
        front = self.archive.front()
        cost = self.archive.cost[front]
        # The upper concave hull of right answers over cost.
        hull: list[int] = []
        for i in range(len(front)):
            while len(hull) >= 2 and (front[i] - front[hull[-2]]) * (cost[hull[-1]] - cost[hull[-2]]) >= (
                front[hull[-1]] - front[hull[-2]]
            ) * (cost[i] - cost[hull[-2]]):
                hull.pop()
            hull.append(i)
        positions = np.array(hull)
        if len(positions) < 2:
            return float(search.prices(self.problem, 3)[1])
        at = int(np.clip(np.searchsorted(front[positions], entry), 1, len(positions) - 1))
        a, b = positions[at - 1], positions[at]
        return float((front[b] - front[a]) / (cost[b] - cost[a]))
