"""The threshold problem in integers: which samples a gate lets go, what the answers are worth, what a line search sees.

A gate's samples are ranked by their score, best first, equal scores together. Its *limit* L says how many of these
groups leave: 0 switches the gate off, and every threshold does what one of the limits does. So a search over the data's
own values is a search over G integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aep_ext.calibration.table import GateTable

MAX_EXITS = 16


@dataclass(eq=False)
class Problem:
    """What a search needs to know.

    Attributes:
        ranks: (G, N) int32, the group of each sample at each gate, from 0; ``groups[e]`` for one that never leaves.
        groups: (G,) how many groups there are at each gate.
        right: (E, N) int8, whether the answer at each exit is right; E = G + 1.
        costs: (E,) float64, cost of a sample that is answered at each exit; non-decreasing.
        counts: (N,) int64, how many samples a column stands for; columns that are alike in all else may be merged.
        lines: how many line searches were made.
    """

    ranks: NDArray[np.int32]
    groups: tuple[int, ...]
    right: NDArray[np.int8]
    costs: NDArray[np.float64]
    counts: NDArray[np.int64]
    lines: int = field(default=0)

    @classmethod
    def of(cls, table: GateTable, costs: NDArray[np.float64]) -> Problem:
        """Rank the scores of every gate."""
        ranks = np.empty(table.scores.shape, dtype=np.int32)
        groups = []
        for e, scores in enumerate(table.scores):
            values = table.values(e)  # descending
            groups.append(len(values))
            # searchsorted wants ascending numbers; NaN sorts behind everything and becomes the group that never leaves.
            rank = len(values) - 1 - np.searchsorted(values[::-1], scores)
            ranks[e] = np.where(np.isnan(scores), len(values), rank)
        right = table.right.astype(np.int8)
        counts = np.ones(right.shape[1], dtype=np.int64)
        if table.policy.name in ("patience", "vote") and right.shape[1]:
            # Whole numbers: few different columns among any number of samples.
            columns, counts = np.unique(np.concatenate([ranks, right.astype(np.int32)]), axis=1, return_counts=True)
            ranks, right = columns[: len(ranks)].copy(), columns[len(ranks) :].astype(np.int8)
        return cls(ranks, tuple(groups), right, costs, counts.astype(np.int64))

    @property
    def gates(self) -> int:
        """G, one less than the exits."""
        return self.ranks.shape[0]

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return self.right.shape[1]

    @property
    def samples(self) -> int:
        """How many samples they stand for."""
        return int(self.counts.sum())

    def __post_init__(self) -> None:
        if not self.gates < MAX_EXITS:
            raise ValueError(f"thresholds: the network must have at most {MAX_EXITS} exits, got {self.gates + 1}")
        # A gate is a bit: which gates let a column go is a small number, and its lowest bit the exit it is answered at.
        codes = np.arange(1 << self.gates)
        self._first = np.full(len(codes), self.gates, dtype=np.uint8)
        for e in range(self.gates - 1, -1, -1):
            self._first[codes >> e & 1 == 1] = e
        self._right = np.zeros(self.columns, dtype=np.uint16)
        for e in range(self.gates + 1):
            self._right |= self.right[e].astype(np.uint16) << np.uint16(e)
        self._single = bool((self.counts == 1).all())

    def _taken(self, limits: tuple[int, ...]) -> NDArray[np.uint8]:
        code = np.zeros(self.columns, dtype=np.uint16)
        for e, limit in enumerate(limits):
            if limit:
                code |= (self.ranks[e] < limit).astype(np.uint16) << np.uint16(e)
        return self._first.take(code)

    def _answers(self, taken: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """(N,) 1 where the answer at the exit taken is right, else 0."""
        return self._right >> taken & np.uint16(1)

    def _sum(self, taken: NDArray[np.uint8], answers: NDArray[np.uint16]) -> tuple[int, float]:
        weights = None if self._single else self.counts
        exits = np.bincount(taken, weights=weights, minlength=self.gates + 1)
        right = np.count_nonzero(answers) if self._single else answers.astype(np.int64) @ self.counts
        return int(right), float(exits @ self.costs)

    def exits(self, limits: tuple[int, ...]) -> NDArray[np.int64]:
        """(N,) the exit at which each column is answered."""
        return self._taken(limits).astype(np.int64)

    def totals(self, limits: tuple[int, ...]) -> tuple[int, float]:
        """Right answers, and the sum of the costs, over all samples."""
        taken = self._taken(limits)
        return self._sum(taken, self._answers(taken))

    def line(self, limits: tuple[int, ...], e: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Right answers and cost for every limit of gate e, the others held: both (groups[e] + 1,) float64.

        Exact: the samples that reach gate e are sorted once (their ranks), and each group that leaves here instead of
        later adds its own difference. The cost never rises with the limit.
        """
        self.lines += 1
        taken = self._taken((*limits[:e], 0, *limits[e + 1 :]))  # with this gate off
        answers = self._answers(taken)
        here = np.flatnonzero(taken > e)
        rank = self.ranks[e][here]
        gained = np.subtract(self.right[e], answers, dtype=np.float64)[here]
        saved = (self.costs[e] - self.costs).take(taken[here])
        if not self._single:
            gained *= self.counts[here]
            saved *= self.counts[here]
        size = self.groups[e] + 1
        right, cost = np.empty(size), np.empty(size)
        right[0], cost[0] = self._sum(taken, answers)
        right[1:] = np.bincount(rank, weights=gained, minlength=size)[:-1]
        cost[1:] = np.bincount(rank, weights=saved, minlength=size)[:-1]
        return np.cumsum(right, out=right), np.cumsum(cost, out=cost)
