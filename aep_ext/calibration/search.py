"""Joint search over the limits of all gates: exact line searches, many starts, pairs of gates, and a bound.

Choosing the limits of several gates together is a hard combinatorial problem: who reaches a gate depends on all
earlier ones, and what leaving is worth on all later ones. With all but one gate held, however, the best limit is found
exactly by one sort and one running sum. The search makes such steps from many starts, on the Lagrangian
``right - price * cost`` for a row of prices, then for the budget itself, also over pairs of gates. How far it may be
from the optimum is said by :mod:`aep_ext.calibration.bound`. Small problems are solved by trying everything.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from aep_ext.calibration.archive import Archive, Limits
from aep_ext.calibration.problem import Problem

EXHAUSTIVE_LINES = 20_000
"""Up to so many line searches (each covers one gate completely) everything is tried."""
EXHAUSTIVE_WORK = 40_000_000
"""And up to so many samples and groups passed in them."""
_SWEEPS = 50
_PAIR_POINTS = 24
_PAIR_ROUNDS = 2


def exhaustive_lines(problem: Problem) -> int:
    """How many line searches it takes to see every combination: the largest gate is the line."""
    sizes = sorted(g + 1 for g in problem.groups)
    return math.prod(sizes[:-1])


def is_small(problem: Problem) -> bool:
    """Whether everything can be tried in a few seconds."""
    lines = exhaustive_lines(problem)
    # A line costs about as much as 2000 entries even when it is empty.
    return (
        lines <= EXHAUSTIVE_LINES
        and lines * (problem.columns + max(problem.groups, default=0) + 2000) <= EXHAUSTIVE_WORK
    )


def search_everything(archive: Archive) -> None:
    """Offer every combination of limits to the archive."""
    problem = archive.problem
    if problem.gates == 0:
        return
    widest = int(np.argmax(problem.groups))
    others = [range(g + 1) if e != widest else range(1) for e, g in enumerate(problem.groups)]
    for limits in itertools.product(*others):
        archive.search_line(limits, widest)


def climb(archive: Archive, limits: Limits, price: float) -> tuple[Limits, float]:
    """Line searches over one gate after another until none raises ``right - price * cost``: the limits and the value.

    From the last gate to the first, so that a gate is set knowing what the later ones do.
    """
    value = -math.inf
    for _ in range(_SWEEPS):
        before = value
        for e in range(archive.problem.gates - 1, -1, -1):
            right, cost = archive.search_line(limits, e)
            values = right - price * cost
            top = int(np.argmax(values))
            # Staying put on a tie: otherwise two gates could hand the same samples to and fro.
            if values[top] > values[limits[e]] + 1e-9 * max(1.0, abs(values[top])):
                limits = (*limits[:e], top, *limits[e + 1 :])
                value = float(values[top])
            else:
                value = float(values[limits[e]])
        if not value > before + 1e-9 * max(1.0, abs(value)):
            break
    return limits, value


def prices(problem: Problem, count: int) -> NDArray[np.float64]:
    """Right answers per unit of cost, ascending: from almost free computing to leaving at the first exit.

    At 1 / (c_E - c_1) one more right answer is worth taking one sample through the whole network.
    """
    span = float(problem.costs[-1] - problem.costs[0])
    unit = 1.0 / span if span > 0 else 1.0
    return np.geomspace(1e-3, 8.0, count) * unit


def _starts(problem: Problem, rng: np.random.Generator) -> list[Limits]:
    """Equal shares of every gate's samples, and random ones."""
    shares = [[q] * problem.gates for q in (0.05, 0.2, 0.5)]
    shares += rng.beta(0.7, 1.5, size=(5, problem.gates)).tolist()
    return [tuple(int(q * g) for q, g in zip(share, problem.groups, strict=True)) for share in shares]


def search_front(archive: Archive, seed: int, count: int = 16) -> dict[float, tuple[Limits, float]]:
    """Climb at a row of prices from several starts; for each price the best limits and the value they reach."""
    problem = archive.problem
    rng = np.random.default_rng(seed)
    off: Limits = (0,) * problem.gates
    row = [float(p) for p in prices(problem, count)]
    best: dict[float, tuple[Limits, float]] = {}

    def offer(price: float, start: Limits) -> Limits:
        limits, value = climb(archive, start, price)
        if price not in best or value > best[price][1]:
            best[price] = limits, value
        return best[price][0]

    limits = off
    for price in row:  # warm from the dearer network down to the cheapest ...
        limits = offer(price, limits)
    for price in reversed(row):  # ... and back
        limits = offer(price, limits)
    for number, start in enumerate(_starts(problem, rng)):
        offer(row[(2 * number + 1) * len(row) // 16 % len(row)], start)
    limits = off
    for price in row:  # what the other starts found, carried to the neighbours
        limits = offer(price, limits)
    return best


def neighbours(archive: Archive, limits: Limits) -> None:
    """Every line through ``limits``."""
    for e in range(archive.problem.gates):
        archive.search_line(limits, e)


def pairs(archive: Archive, limits: Limits, points: int = _PAIR_POINTS) -> None:
    """For every pair of gates: some limits of the one, around its own and over its whole range, all of the other."""
    problem = archive.problem
    for e, f in itertools.permutations(range(problem.gates), 2):
        if problem.groups[e] > problem.groups[f] and e > f:
            continue  # the line runs over the gate with more groups, in either order of ties
        size = problem.groups[e]
        wide = np.linspace(0, size, points // 2)
        near = limits[e] + np.linspace(-0.06, 0.06, points - points // 2) * size
        for limit in np.unique(np.clip(np.rint(np.concatenate([wide, near])), 0, size).astype(int)):
            archive.search_line((*limits[:e], int(limit), *limits[e + 1 :]), f)


def kick(archive: Archive, limits: Limits, rng: np.random.Generator) -> None:
    """Move one or two gates a little, at random, and search every line from there."""
    problem = archive.problem
    moved = list(limits)
    for e in rng.choice(problem.gates, size=min(2, problem.gates), replace=False):
        moved[e] = int(np.clip(round(moved[e] + rng.normal() * 0.05 * problem.groups[e]), 0, problem.groups[e]))
    neighbours(archive, tuple(moved))


def polish(
    archive: Archive,
    *,
    at_least: int | None = None,
    at_most: float | None = None,
    with_pairs: bool = True,
    rounds: int = 12,
    kicks: int = 0,
    seed: int = 0,
) -> int | None:
    """Improve the archive's answer to one budget until nothing more is found: its entry, or None where none fits.

    Lines through the answer, then pairs of gates, and at last so many kicks.
    """

    def answer() -> int | None:
        if at_least is not None:
            return archive.cheapest(at_least)
        return archive.best(math.inf if at_most is None else at_most)

    def quality(entry: int) -> tuple[float, float]:
        cost = float(archive.cost[entry])
        return (cost, -entry) if at_least is not None else (-entry, cost)

    entry = answer()
    paired: list[Limits] = []
    for _ in range(rounds):
        if entry is None:
            return None
        before, limits = quality(entry), archive.limits(entry)
        neighbours(archive, limits)
        entry = answer()
        if entry is not None and quality(entry) < before:
            continue
        if not with_pairs or limits in paired or len(paired) == _PAIR_ROUNDS:
            break
        paired.append(limits)
        pairs(archive, limits)
        entry = answer()
        if entry is None or not quality(entry) < before:
            break
    rng = np.random.default_rng(seed)
    for _ in range(kicks):
        if entry is None:
            break
        kick(archive, archive.limits(entry), rng)
        entry = answer()
    return entry
