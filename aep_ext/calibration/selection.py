"""Which exits are kept and how careful their thresholds are: chosen together, by cross-validation.

The thresholds that *seem* to keep a budget on the data they were searched on are partly good by luck and lose more
elsewhere. So, for every subset of the exits, output weights, temperatures and thresholds are fitted on all folds but
one for a row of tightened budgets, and evaluated on the fold that was left out. The subset and the tightened budget are
chosen by these figures, and only then everything is fitted on all of the data. (M. Stone, "Cross-validatory choice and
assessment of statistical predictions", 1974.)

What remains is the choice between candidates by their cross-validated figures, which are strongly alike: they share
most of their exits and all of their samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from aep_ext.calibration.budgets import AccuracyBudget, CostBudget
from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.calibration.temperature import BOUNDS, fit_temperatures
from aep_ext.calibration.thresholds import ExitTable, ParetoFront, search_thresholds
from aep_ext.ensemble.output_weights import fit_output_weights
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.pruning.non_inferiority import non_inferiority_test
from aep_ext.pruning.subsets import mask_of_exits

ALL_SUBSETS = 7
"""Up to so many exits every subset is a candidate; of more, those of one to three exits and the set of all."""
CROSS_VALIDATED = 15
"""So many subsets are cross-validated; of more, those that a search on part of the data finds most promising."""
_SCREENING_ROWS = 2000
_FIT_ROWS = 4000
_TARGETS = 40
_ABOUT_EQUAL = 0.02


@dataclass(frozen=True)
class Candidate:
    """A subset of the exits at one tightened budget, and what cross-validation says of it.

    Attributes:
        exits: positions of the exits in the logits.
        target: the tightened budget, which thresholds keep on the data they are fitted on: points below the reference,
            or a mean cost. None: no gates, the last exit answers.
        drop_points: points of top-1 below the reference on left-out samples.
        std_error: standard error of the drop, in points.
        interval: paired 95 % interval of the drop (low, high), in points.
        mean_cost: on left-out samples.
        qualifies: whether the budget is kept.
    """

    exits: tuple[int, ...]
    target: float | None
    drop_points: float
    std_error: float
    interval: tuple[float, float]
    mean_cost: float
    qualifies: bool


@dataclass(frozen=True, eq=False)
class Selection:
    """What is known when exits are chosen. The arguments are those of :func:`aep_ext.calibration.calibrate`, checked.

    Attributes:
        logits: of all E exits, N samples.
        reference: (N,) bool, the reference's right answers.
        costs: (2^E-1,) or (E,) float64.
        budget: of accuracy or cost.
        output_weights: "fitted", or E numbers.
        criterion, criterion_on, num_std_errors, folds, seed, last_alone: as there.
    """

    logits: CachedLogits
    reference: NDArray[np.bool_]
    costs: NDArray[np.float64]
    budget: AccuracyBudget | CostBudget
    output_weights: str | tuple[float, ...]
    criterion: str
    criterion_on: str
    num_std_errors: float
    folds: int
    seed: int
    last_alone: bool = False

    def costs_of(self, exits: Sequence[int]) -> NDArray[np.float64]:
        """Cost of a sample that is answered at each exit of a subset: of the extracted network up to there."""
        if len(self.costs) == self.logits.num_exits:
            return self.costs[list(exits)]
        return self.costs[[mask_of_exits(exits[: k + 1]) - 1 for k in range(len(exits))]]

    @property
    def full_cost(self) -> float:
        """Cost of all exits."""
        return float(self.costs_of(range(self.logits.num_exits))[-1])

    @property
    def limit(self) -> float:
        """What the budget allows: points, or a mean cost."""
        if isinstance(self.budget, AccuracyBudget):
            return float(self.budget.points)
        return self.budget.limit(self.full_cost)

    def targets(self) -> list[float]:
        """Tightened budgets, from the budget itself on; close together near it."""
        steps = np.linspace(0, 1, _TARGETS) ** 2
        if isinstance(self.budget, CostBudget):
            return (self.limit * (1 - 0.2 * steps)).tolist()
        # Down to where no search gets; what a search gains by luck grows as samples become fewer.
        depth = min(self.limit, 0.0) - 3.0 - 200 / np.sqrt(len(self.logits)) - self.limit
        return (self.limit + depth * steps).tolist()

    def fit(self, exits: Sequence[int], rows: NDArray[np.int64] | None = None) -> ExitPolicy:
        """Output weights that sum to 1, and temperatures, of a subset, fitted on some rows or all: float32 numbers, in
        a policy whose gates are all disabled."""
        if self.last_alone and len(exits) > 1:  # the early exits vote, the last one answers on its own
            early, last = self.fit(exits[:-1], rows), self.fit(exits[-1:], rows)
            return replace(
                early,
                output_weights=(*(weight / 2 for weight in early.output_weights), 0.5),
                temperatures=early.temperatures + last.temperatures,
                thresholds=(1.0,) * (len(exits) - 1),
                enabled=(False,) * (len(exits) - 1),
                exits=early.exits + last.exits,
                last_alone=True,
            )
        part = self.logits.select_exits(exits)
        if rows is not None:
            part = part.select(torch.from_numpy(rows))
        temperatures: Sequence[float] | None = None
        if len(exits) == 1:
            weights: Sequence[float] = [1.0]
        elif isinstance(self.output_weights, str):
            fit = fit_output_weights(part.logits, part.target, tolerance=1e-3)
            weights = fit.weights
            if self.criterion_on == "ensemble":
                temperatures = [min(max(value, BOUNDS[0]), BOUNDS[1]) for value in fit.temperatures]
        else:
            kept = [self.output_weights[e] for e in exits]
            weights = [value / sum(kept) for value in kept]
        if temperatures is None:
            temperatures = fit_temperatures(part, weights, criterion_on=self.criterion_on)
        return ExitPolicy(
            output_weights=tuple(torch.tensor(weights).tolist()),
            temperatures=tuple(torch.tensor(temperatures).tolist()),
            criterion=self.criterion,
            criterion_on=self.criterion_on,
            enabled=(False,) * (len(exits) - 1),
            exits=part.exits,
        )

    def point(self, front: ParetoFront, target: float, reference: NDArray[np.bool_]) -> int:
        """The front's point for a target on the samples that the front was found on."""
        if isinstance(self.budget, CostBudget):
            return front.most_accurate(target)
        return front.cheapest(int(reference.sum()) - target * len(reference) / 100)

    def cross_validate(
        self, exits: Sequence[int], targets: Sequence[float], progress: Callable[[], None]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Left-out answers of a subset for every target, and without gates in the last row.

        Returns:
            (T+1, N) bool, whether the answer is right; (T+1,) float64, the mean cost.
        """
        n, costs, part = len(self.logits), self.costs_of(exits), self.logits.select_exits(exits)
        order = np.random.default_rng(self.seed).permutation(n)
        correct = np.empty((len(targets) + 1, n), dtype=bool)
        cost = np.zeros(len(targets) + 1)
        for fold in np.array_split(order, self.folds):
            seen = np.setdiff1d(order, fold) if self.folds > 1 else order
            shuffled = np.random.default_rng(self.seed).permutation(seen)
            table = ExitTable.of(part, self.fit(exits, shuffled[:_FIT_ROWS]))
            front = search_thresholds(table.select(seen), costs)
            left_out = table.select(fold)
            points = [self.point(front, target, self.reference[seen]) for target in targets]
            for point in set(points):
                taken, right = left_out.answers(front.thresholds[point], front.enabled[point])
                rows = np.flatnonzero(np.array(points) == point)
                correct[np.ix_(rows, fold)] = right
                cost[rows] += costs[taken].sum()
            correct[-1, fold] = left_out.correct[-1]
            cost[-1] += costs[-1] * len(fold)
            progress()
        return correct, cost / n

    def promising(self, subsets: Sequence[tuple[int, ...]], progress: Callable[[], None]) -> list[tuple[int, ...]]:
        """The most promising subsets by a search on part of the data."""
        rows = np.random.default_rng(self.seed).permutation(len(self.logits))[:_SCREENING_ROWS]
        part, reference = self.logits.select(torch.from_numpy(rows)), self.reference[rows]
        keys: dict[tuple[int, ...], tuple[float, float]] = {}
        for subset in subsets:
            table = ExitTable.of(part.select_exits(subset), self.fit(subset, rows))
            front = search_thresholds(table, self.costs_of(subset))
            point = self.point(front, self.limit, reference)
            lost, cost = int(reference.sum()) - int(front.correct[point]), float(front.cost[point])
            if isinstance(self.budget, CostBudget):
                keys[subset] = (max(cost - self.limit, 0.0), lost)
            else:
                keys[subset] = (max(lost - self.limit * len(rows) / 100, 0.0), cost)
            progress()
        return sorted(subsets, key=lambda subset: keys[subset])[:CROSS_VALIDATED]

    def candidates(
        self, subsets: Sequence[tuple[int, ...]], progress: Callable[[int, int], None] | None = None
    ) -> list[Candidate]:
        """The best candidate of every subset that was cross-validated, the chosen one first.

        Args:
            subsets: positions of exits.
            progress: called with the number of fits done and of all.
        """
        screening = len(subsets) if len(subsets) > CROSS_VALIDATED else 0
        total = screening + self.folds * min(len(subsets), CROSS_VALIDATED)
        done = itertools.count(1)

        def step() -> None:
            number = next(done)
            if progress is not None:
                progress(number, total)

        kept = self.promising(subsets, step) if screening else list(subsets)
        targets = self.targets()
        best = []
        for subset in kept:
            correct, cost = self.cross_validate(subset, targets, step)
            found = [
                self.candidate(subset, target, correct[row], float(cost[row]))
                for row, target in enumerate([*targets, None])
            ]
            best.append(self.choose(found))
        first = self.choose(best)
        return [first, *sorted((one for one in best if one is not first), key=self._rank)]

    def candidate(
        self, exits: tuple[int, ...], target: float | None, correct: NDArray[np.bool_], cost: float
    ) -> Candidate:
        """A candidate from its left-out answers."""
        lost = self.reference.astype(np.int8) - correct.astype(np.int8)
        drop, n = float(lost.mean()), len(lost)
        # One pair more than was seen to differ: no difference among few samples is not certainty.
        error = float(np.sqrt((np.square(lost - drop).sum() + 1) / n / n))
        if isinstance(self.budget, CostBudget):
            qualifies = cost <= self.limit * (1 + 1e-9)
        else:
            qualifies = 100 * (drop + self.num_std_errors * error) <= self.limit + 1e-9
        paired = non_inferiority_test(torch.from_numpy(correct), torch.from_numpy(self.reference), 1.0)
        interval = (-100 * paired.high, -100 * paired.low)
        return Candidate(exits, target, 100 * drop, 100 * error, interval, cost, qualifies)

    def _rank(self, one: Candidate) -> tuple[bool, float, float]:
        """What is better, smaller first: those that qualify, then cost or (cautious) drop."""
        drop = one.drop_points + self.num_std_errors * one.std_error
        by_cost = one.qualifies == isinstance(self.budget, AccuracyBudget)
        return (not one.qualifies, *((one.mean_cost, drop) if by_cost else (drop, one.mean_cost)))

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best; for an accuracy budget, among those of about equal cost that with the smallest drop."""
        best = min(candidates, key=lambda one: (*self._rank(one), len(one.exits)))
        if not best.qualifies or isinstance(self.budget, CostBudget):
            return best
        equal = [one for one in candidates if one.qualifies and one.mean_cost <= best.mean_cost * (1 + _ABOUT_EQUAL)]
        return min(equal, key=lambda one: (one.drop_points, len(one.exits), one.mean_cost))


def candidate_subsets(exits: int) -> list[tuple[int, ...]]:
    """The subsets of E exits that are candidates."""
    sizes = range(1, exits + 1) if exits <= ALL_SUBSETS else (1, 2, 3, exits)
    return [subset for size in sizes for subset in itertools.combinations(range(exits), size)]
