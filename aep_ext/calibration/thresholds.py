"""Thresholds for all gates together: exact coordinate search on the data's own values, and the Pareto front it finds.

Who reaches a gate depends on all earlier ones, and what leaving is worth on all later ones. With all gates but one
held, however, the best threshold is found exactly by one running sum over the samples in the order of their scores. The
search takes such steps, gate after gate, on ``right answers - price * cost`` for a row of prices and from two starts.
Whatever it sees on the way is a point of accuracy and cost; those that no other beats are the front.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.inference.criteria import STATELESS, gate_step, initial_state
from aep_ext.inference.exit_policy import ExitPolicy

_PRICES = 16
_SWEEPS = 30
_ROUNDS = 3
_FRONT_POINTS = 24


@dataclass(frozen=True, eq=False)
class ExitTable:
    """What each exit would decide and answer for N samples if nobody had left before.

    Attributes:
        criterion: one of :data:`~aep_ext.inference.criteria.CRITERIA`.
        scores: (E-1, N) float64, larger leaves sooner (the entropy with its sign changed); NaN never leaves. They are
            float32 numbers, or counts for patience and vote, so that comparisons are the gate's own.
        correct: (E, N) bool, whether the answer is right.
        num_classes: K.
    """

    criterion: str
    scores: NDArray[np.float64]
    correct: NDArray[np.bool_]
    num_classes: int

    @classmethod
    def of(cls, logits: CachedLogits, policy: ExitPolicy) -> ExitTable:
        """By the step that simulator and executors take, with every gate disabled. ``logits`` are of the policy's
        exits; its criterion is a name."""
        criterion = str(policy.criterion)
        exits, samples, classes = logits.logits.shape
        indices, features = torch.arange(samples), torch.zeros(samples, 1)
        running, state = torch.zeros(samples, classes), initial_state(criterion, samples, classes)
        weight_sum: float | torch.Tensor = 0.0
        scores = np.empty((exits - 1, samples))
        correct = np.empty((exits, samples), dtype=bool)
        with torch.no_grad():
            for e in range(exits):
                if policy.starts_anew(e):
                    running, weight_sum = torch.zeros_like(running), 0.0
                step = gate_step(
                    criterion,
                    policy.criterion_on,
                    features,
                    running,
                    weight_sum,
                    indices,
                    state,
                    logits.logits[e],
                    exit_index=e,
                    weight=1.0 if policy.starts_anew(e) else policy.output_weights[e],
                    threshold=0.0,
                    temperature=policy.temperatures[e],
                    enabled=False,
                )
                running, state, weight_sum = step.running, step.state, step.weight_sum
                correct[e] = ((step.argmax == logits.target) & ~running.isnan().any(dim=1)).numpy()
                if e == exits - 1:
                    break
                if criterion in STATELESS:
                    scores[e] = step.stats[:, STATELESS.index(criterion)].numpy()
                else:
                    counts = state[:, 1] if criterion == "patience" else state.amax(dim=1)
                    scores[e] = counts.double().masked_fill(step.stats[:, 0].isnan(), math.nan).numpy()
        return cls(criterion, -scores if criterion == "entropy" else scores, correct, classes)

    def select(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> ExitTable:
        """Only these samples."""
        return replace(self, scores=self.scores[:, rows], correct=self.correct[:, rows])

    def answers(
        self, thresholds: Sequence[float] | NDArray[np.float64], enabled: Sequence[bool] | NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(N,) the exit at which each sample is answered, and (N,) whether that answer is right."""
        sign, samples = -1.0 if self.criterion == "entropy" else 1.0, self.correct.shape[1]
        taken = np.full(samples, len(self.correct) - 1, dtype=np.int64)
        for e in range(len(self.scores) - 1, -1, -1):
            if enabled[e]:
                taken[self.scores[e] >= sign * np.float64(np.float32(thresholds[e]))] = e
        return taken, self.correct[taken, np.arange(samples)]


@dataclass(frozen=True, eq=False)
class ParetoFront:
    """Accuracy and cost of thresholds that no others found beat, the cheapest first.

    Attributes:
        correct: (P,) int64 right answers, ascending.
        cost: (P,) float64 mean cost per sample, ascending.
        thresholds: (P, E-1) float64 in the criterion's unit, float32 numbers midway between neighbouring values of the
            data.
        enabled: (P, E-1) bool. A gate that does not pay is disabled.
    """

    correct: NDArray[np.int64]
    cost: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    enabled: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.correct)

    def cheapest(self, correct: float) -> int:
        """The cheapest point with so many right answers; where there is none, that with most."""
        return min(int(np.searchsorted(self.correct, correct - 1e-9)), len(self) - 1)

    def most_accurate(self, cost: float) -> int:
        """The most accurate point of at most this mean cost; where there is none, the cheapest."""
        return max(int(np.searchsorted(self.cost, cost * (1 + 1e-12), side="right")) - 1, 0)


def search_thresholds(table: ExitTable, costs: Sequence[float] | NDArray[np.float64]) -> ParetoFront:
    """The Pareto front of accuracy and mean cost over the thresholds of all gates.

    Args:
        table: of at least one sample.
        costs: (E,) non-descending cost of a sample that is answered at each exit, all of its way included.
    """
    prices = np.asarray(costs, dtype=np.float64)
    if len(prices) == 1:
        nothing = np.zeros((1, 0))
        return ParetoFront(table.correct.sum(axis=1), prices, nothing, nothing.astype(bool))
    return _Search(table, prices).run()


class _Search:
    """A gate's *limit* is how many samples would leave there if all reached it, best scores first: 0 disables it. Equal
    scores leave together, so not every number is a limit. Every threshold does what one of the limits does."""

    def __init__(self, table: ExitTable, costs: NDArray[np.float64]) -> None:
        gates, n = table.scores.shape
        self.table, self.costs, self.gates, self.n = table, costs, gates, n
        order = np.argsort(-table.scores, axis=1, kind="stable")  # NaN comes last
        self.sorted = np.take_along_axis(table.scores, order, axis=1)
        position = np.empty((gates, n), dtype=np.int32)
        np.put_along_axis(position, order, np.arange(n, dtype=np.int32)[None].repeat(gates, 0), axis=1)
        # For each gate, in its own order: every gate's positions, every exit's answers.
        self.positions = [position[:, order[e]] for e in range(gates)]
        self.right = [table.correct[:, order[e]].astype(np.int8) for e in range(gates)]
        self.limits = []
        for scores in self.sorted:
            known = int(np.count_nonzero(~np.isnan(scores)))
            ends = np.flatnonzero(np.diff(scores[:known])) + 1
            self.limits.append(np.unique(np.concatenate([[0], ends, [known]])))
        # For each number of right answers the least cost seen, and the limits that gave it.
        self.best_cost = np.full(n + 1, np.inf)
        self.best_limits = np.zeros((n + 1, gates), dtype=np.int64)

    def line(self, limits: NDArray[np.int64], e: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Right answers and summed cost for every limit of gate ``e``, the other gates held at ``limits`` (L, G): two
        arrays (L, number of limits). The cost never rises with the limit."""
        position, right = self.positions[e], self.right[e]
        answer = np.broadcast_to(right[-1], (len(limits), self.n))
        price = np.full((len(limits), self.n), self.costs[-1])
        for f in range(self.gates - 1, -1, -1):  # backwards, so that the first gate that lets a sample go has the say
            if f == e:
                gained, added = right[e] - answer, self.costs[e] - price
                continue
            leaves = position[f] < limits[:, f, None]
            answer, price = np.where(leaves, right[f], answer), np.where(leaves, self.costs[f], price)
            if f < e:
                gained, added = np.where(leaves, 0, gained), np.where(leaves, 0.0, added)
        some = self.limits[e][1:] - 1
        correct = np.empty((len(limits), len(some) + 1), dtype=np.int64)
        cost = np.empty(correct.shape)
        correct[:, 0], cost[:, 0] = answer.sum(axis=1), price.sum(axis=1)
        correct[:, 1:] = np.cumsum(gained, axis=1, dtype=np.int32)[:, some]
        cost[:, 1:] = np.cumsum(added, axis=1)[:, some]
        correct[:, 1:] += correct[:, :1]
        cost[:, 1:] += cost[:, :1]
        self._keep(limits, e, correct, cost)
        return correct, cost

    def _keep(self, limits: NDArray[np.int64], e: int, correct: NDArray[np.int64], cost: NDArray[np.float64]) -> None:
        for row in range(len(limits)):
            last = np.full(self.n + 1, -1)
            last[correct[row]] = np.arange(correct.shape[1])  # of equal ones the last is kept, which is the cheapest
            found = np.flatnonzero(last >= 0)
            new = cost[row, last[found]]
            better = new < self.best_cost[found] * (1 - 1e-12)
            found = found[better]
            self.best_cost[found] = new[better]
            self.best_limits[found] = limits[row]
            self.best_limits[found, e] = self.limits[e][last[found]]

    def climb(self, limits: NDArray[np.int64], prices: NDArray[np.float64]) -> None:
        """From ``limits`` (L, G), line searches from the last gate to the first until none raises ``right - price *
        cost``, for (L,) prices."""
        for _ in range(_SWEEPS):
            moved = np.zeros(len(limits), dtype=bool)
            for e in range(self.gates - 1, -1, -1):
                correct, cost = self.line(limits, e)
                values = correct - prices[:, None] * cost
                rows, top = np.arange(len(limits)), values.argmax(axis=1)
                now = np.searchsorted(self.limits[e], limits[:, e])
                # Staying put on a tie: otherwise two gates could hand the same samples to and fro.
                better = values[rows, top] > values[rows, now] + 1e-9
                limits[better, e] = self.limits[e][top[better]]
                moved |= better
            if not moved.any():
                return
            limits, prices = limits[moved], prices[moved]

    def run(self) -> ParetoFront:
        # At a price of 1 / (c_E - c_1) one more right answer is worth taking one sample through the whole network.
        prices = np.geomspace(1e-3, 8.0, _PRICES) / (float(self.costs[-1] - self.costs[0]) or 1.0)
        for start in ([0] * self.gates, [known[len(known) // 2] for known in self.limits]):
            self.climb(np.tile(start, (_PRICES, 1)), prices)
        for _ in range(_ROUNDS):  # every line through points of the front, which need not be best at any price
            points = self._front()
            before = self.best_cost[points]
            some = points[np.unique(np.linspace(0, len(points) - 1, _FRONT_POINTS).round().astype(int))]
            for e in range(self.gates):
                self.line(self.best_limits[some], e)
            if np.array_equal(before, self.best_cost[points]):
                break
        points = self._front()
        limits = self.best_limits[points]
        thresholds = np.stack([self._thresholds(e, limits[:, e]) for e in range(self.gates)], axis=1)
        return ParetoFront(points, self.best_cost[points] / self.n, thresholds, limits > 0)

    def _front(self) -> NDArray[np.int64]:
        """The numbers of right answers of the front's points, ascending."""
        least = np.minimum.accumulate(self.best_cost[::-1])[::-1]
        return np.flatnonzero(self.best_cost < np.append(least[1:], np.inf))

    def _thresholds(self, e: int, limits: NDArray[np.int64]) -> NDArray[np.float64]:
        """For each limit the threshold in the criterion's unit, midway between the last score that leaves and the first
        that stays; beyond every possible score where all leave; the strictest sensible number where the gate is off."""
        criterion, scores, known = self.table.criterion, self.sorted[e], self.limits[e][-1]
        leaves = scores[np.maximum(limits, 1) - 1]
        if criterion not in STATELESS:
            return np.where(limits > 0, leaves, float(len(self.costs)))
        stays = scores[np.minimum(limits, self.n - 1)]
        middle = ((leaves + stays) / 2).astype(np.float32).astype(np.float64)
        # Neighbours in float32 have no number between them; the score that leaves is then the threshold.
        middle = np.where(middle > stays, middle, leaves)
        sign = -1.0 if criterion == "entropy" else 1.0
        everybody = np.float64(np.float32(math.log(self.table.num_classes) + 1)) if sign < 0 else 0.0
        strictest = 0.0 if sign < 0 else 1.0
        return np.where(limits == 0, strictest, np.where(limits == known, everybody, sign * middle))
