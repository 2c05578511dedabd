"""The cheapest way found so far to every number of right answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aep_ext.calibration.problem import Problem

Limits = tuple[int, ...]


class Archive:
    """Remembers, for every number of right answers 0..N, the cheapest limits that any line search has passed.

    A line search yields thousands of points at once; only those that beat the archive are kept, as the line they lie on
    and the limit there, so a whole accuracy-cost curve costs little more than one search.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.cost = np.full(problem.samples + 1, np.inf)
        self._line = np.full(problem.samples + 1, -1, dtype=np.int64)
        self._limit = np.zeros(problem.samples + 1, dtype=np.int64)
        self._lines: list[tuple[Limits, int]] = []

    def search_line(self, limits: Limits, e: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """A line search along gate e, all of whose points are offered to the archive."""
        right, cost = self.problem.line(limits, e)
        # From the cheap end, a point is worth keeping where it is right more often than every cheaper one.
        best = np.maximum.accumulate(right[::-1])
        steps = np.concatenate([[0], np.flatnonzero(best[1:] > best[:-1]) + 1])
        position = len(right) - 1 - steps
        answers = right[position].astype(np.int64)
        better = cost[position] < self.cost[answers]
        if better.any():
            position, answers = position[better], answers[better]
            self.cost[answers] = cost[position]
            self._line[answers] = len(self._lines)
            self._limit[answers] = position
            self._lines.append((limits, e))
        return right, cost

    def limits(self, right: int) -> Limits:
        """The limits behind the entry for ``right`` answers."""
        limits, e = self._lines[self._line[right]]
        return (*limits[:e], int(self._limit[right]), *limits[e + 1 :])

    def cheapest(self, at_least: int) -> int | None:
        """The entry with the lowest cost among those with at least so many right answers; the better one of equals."""
        tail = self.cost[max(at_least, 0) :]
        if not len(tail) or not np.isfinite(tail).any():
            return None
        return max(at_least, 0) + len(tail) - 1 - int(np.argmin(tail[::-1]))

    def best(self, at_most: float) -> int | None:
        """The entry with the most right answers among those with at most this cost."""
        within = np.flatnonzero(self.cost <= at_most)
        return int(within[-1]) if len(within) else None

    def front(self) -> NDArray[np.int64]:
        """The entries that no other beats, fewest right answers (and lowest cost) first."""
        lowest = np.minimum.accumulate(self.cost[::-1])[::-1]
        beaten = np.concatenate([lowest[1:] <= self.cost[:-1], [False]])
        return np.flatnonzero(np.isfinite(self.cost) & ~beaten)
