"""Which exits are gated, at which thresholds: chosen together, by cross-validation.

The pruned subset is often one exit alone, which cannot be gated. So every subset of at least two exits is a candidate,
and the floor is the pruned ensemble's accuracy on the same images. The cheapest of many thresholds of many subsets that
*seem* to keep the floor is partly cheap by luck: a joint search over three gates fits the noise of its images, and what
is exactly within the budget there is beyond it elsewhere. Two things answer that.

- Cross-validation. A subset's search is made on four fifths of the images for a row of tightened budgets, and judged on
  the fifth it has not seen, five times. That gives, for every subset and tightened budget, the drop and the cost on
  unseen images. The subset and the tightened budget are chosen by these figures, and only then the search is made on
  all of the images. (M. Stone, "Cross-validatory choice and assessment of statistical predictions", 1974.)
- Caution. The cross-validated drop is itself an estimate, and a budget that is kept in expectation is missed every
  other time. So ``caution`` standard errors are added before it is held against the budget (as in the one-standard-
  error rule of L. Breiman et al., "Classification and regression trees", 1984).

What remains is the choice between the candidates by their cross-validated figures, which are strongly alike: they share
most of their exits and all of their images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.calibration.table import GateTable
from aep_ext.ensemble import fit_output_weights
from aep_ext.pruning import mask_of_exits
from aep_ext.termination import ExitCache, Policy, ThresholdCurve, ThresholdSearch, fit_temperatures
from aep_ext.training.gating.settings import FOLDS

ALL_SUBSETS = 7
"""Up to so many exits every subset is a candidate."""
CROSS_VALIDATED = 15
"""So many candidates are cross-validated; of more, those whose search on all images gave the cheapest points."""
_TARGETS = 81
_POINTS = 2000


@dataclass(frozen=True)
class Candidate:
    """A subset at a tightened budget, with what cross-validation says of it.

    Attributes:
        exits: original numbers.
        weights: their output weights.
        target: the tightened budget in points: what the search may lose on the images it sees.
        drop: points lost on unseen images, against the pruned ensemble.
        error: standard error of the drop, in points.
        cost: mean multiply-adds on unseen images.
        keeps: whether drop and error keep the budget.
    """

    exits: tuple[int, ...]
    weights: tuple[float, ...]
    target: float
    drop: float
    error: float
    cost: float
    keeps: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "exits": list(self.exits),
            "output_weights": list(self.weights),
            "target_points": self.target,
            "drop_points": self.drop,
            "standard_error": self.error,
            "mean_macs": self.cost,
            "keeps": self.keeps,
        }


@dataclass(frozen=True, eq=False)
class Choice:
    """The gate that was chosen: a subset, its temperatures, and the point of its curve.

    Attributes:
        chosen: the candidate.
        candidates: the best of every subset that was cross-validated, the cheapest that keep the budget first.
        curve: the subset's accuracy-cost curve on all images of the search.
        point: the curve's entry that was taken.
        fits: how the temperatures were found, one dict per exit.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    curve: ThresholdCurve
    point: int
    fits: tuple[dict[str, Any], ...]


def costs_of(exits: Sequence[int], macs: Sequence[int]) -> list[int]:
    """Multiply-adds of a sample answered at each exit of a subset: the extracted network up to there.

    Args:
        macs: of every subset; entry m-1 is the one of mask m.
    """
    return [macs[mask_of_exits(exits[: k + 1]) - 1] for k in range(len(exits))]


def candidate_subsets(exits: int, macs: Sequence[int], limit: float) -> list[tuple[int, ...]]:
    """Subsets that may be gated, of E exits.

    Every subset of at least two; of more than 7 exits, all pairs and triples and the set of all, since with a fourth
    gate little is gained and the subsets are too many. Left out are those whose first exit alone costs ``limit``
    multiply-adds or more: they cannot be cheaper.
    """
    sizes = range(2, exits + 1) if exits <= ALL_SUBSETS else (2, 3, exits)
    found = [subset for size in sizes for subset in itertools.combinations(range(exits), size)]
    return [subset for subset in found if macs[(1 << subset[0]) - 1] < limit]


def subset_cache(cache: ExitCache, exits: Sequence[int], weights: Sequence[float] | Tensor) -> ExitCache:
    """The cache of some exits with these output weights."""
    rows = list(exits)
    return ExitCache.from_logits(cache.logits[rows], cache.target, weights, role=cache.role, exit_ids=rows, copy=False)


def output_weights(cache: ExitCache, exits: Sequence[int], kind: str) -> Tensor:
    """Output weights of some exits, float32: "run", as the network has them, or "fitted" on the samples of ``cache``.

    The run's weights follow the position of an exit alone. Where an early exit is much weaker than the next, its share
    costs the prefix ensembles accuracy; fitted ones give it no more than it is worth, so no prefix ensemble is worse
    than its last exit but by chance.
    """
    rows = list(exits)
    if kind == "run":
        return cache.weights[rows].float()
    return torch.tensor(fit_output_weights(cache.logits[rows], cache.target).weights, dtype=torch.float32)


def _search(cache: ExitCache, rule: Policy, costs: Sequence[float], scales: Tensor, seed: int) -> ThresholdCurve:
    # The same effort everywhere: a harder search on all images would fit more of their noise than was judged.
    search = ThresholdSearch(cache, rule, costs, scales, seed=seed, method="search")
    return search.curve(points=_POINTS, polish=6)


def _entry(curve: ThresholdCurve, reference: int, target: float) -> int:
    """The cheapest point that loses at most ``target`` points against so many right answers; else the best there is."""
    needed = math.ceil(reference - target * curve.n / 100 - 1e-9 * curve.n)
    return min(int(np.searchsorted(curve.correct, needed)), len(curve) - 1)


def targets_for(budget: float) -> NDArray[np.float64]:
    """Tightened budgets in points, from the budget itself down to where no search gets."""
    return np.linspace(budget, min(budget, 0.0) - 3.0, _TARGETS)


def cross_validate(
    cache: ExitCache,
    reference: NDArray[np.bool_],
    rule: Policy,
    costs: Sequence[float],
    scales: Tensor,
    targets: NDArray[np.float64],
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Drop and standard error in points and mean cost on unseen images, for every tightened budget: three (T,) arrays.

    Args:
        cache: of the subset, N samples.
        reference: (N,) whether the pruned ensemble is right.
    """
    n, prices = len(cache), np.asarray(costs, dtype=np.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    lost = np.empty((len(targets), n), dtype=np.int8)
    cost = np.empty((len(targets), n))
    for unseen in order.tensor_split(FOLDS):
        seen = torch.ones(n, dtype=torch.bool)
        seen[unseen] = False
        curve = _search(cache.select(seen), rule, costs, scales, seed)
        rows = unseen.numpy()
        part = cache.select(unseen)
        table = GateTable.of(part.logits, part.weights, part.target, rule, scales)
        known: dict[int, tuple[NDArray[np.int8], NDArray[np.float64]]] = {}
        for number, target in enumerate(targets):
            entry = _entry(curve, int(reference[seen.numpy()].sum()), float(target))
            if entry not in known:
                taken = table.leaving(curve.thresholds[entry].double().numpy(), curve.enabled[entry].numpy())
                right = table.right[taken, np.arange(len(rows))]
                known[entry] = reference[rows].astype(np.int8) - right.astype(np.int8), prices[taken]
            lost[number, rows], cost[number, rows] = known[entry]
    drop = lost.mean(axis=1, dtype=np.float64)
    # One pair more than was seen to differ: no difference among few images is not certainty.
    spread = (np.square(lost - drop[:, None]).sum(axis=1) + 1) / n
    return 100 * drop, 100 * np.sqrt(spread / n), cost.mean(axis=1)


def choose(
    temperature_part: ExitCache,
    cache: ExitCache,
    reference: Tensor,
    macs: Sequence[int],
    rule: Policy,
    *,
    budget: float,
    limit: float,
    caution: float,
    weights: str,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> Choice:
    """The cheapest gate that keeps the floor; see the module.

    Args:
        temperature_part: all exits' logits of the samples on which temperatures and output weights are fitted.
        cache: the same of the N samples on which subset and thresholds are chosen; no sample is in both.
        reference: (N,) bool, whether the pruned ensemble is right.
        macs: of every subset; entry m-1 is the one of mask m.
        rule: the policy.
        budget: points that may be lost against the pruned ensemble.
        limit: multiply-adds of the pruned ensemble.
        caution: standard errors added to the cross-validated drop.
        weights: "run" or "fitted", see :func:`output_weights`.
        seed: of folds and search.
        progress: takes a line now and then.

    Returns:
        The choice; its ``chosen.keeps`` is False where nothing cheaper than ``limit`` keeps the budget, and it is then
        the nearest that was found.

    Raises:
        ValueError: there is no candidate: nothing can be cheaper than ``limit``.
    """
    subsets = candidate_subsets(cache.num_exits, macs, limit)
    if not subsets:
        raise ValueError(f"choose: a subset must begin at less than {limit:g} multiply-adds, got none")
    right = reference.numpy()
    mixtures = {s: output_weights(temperature_part, s, weights) for s in subsets}
    fits = {s: fit_temperatures(subset_cache(temperature_part, s, mixtures[s]), on=rule.on) for s in subsets}
    scales = {s: torch.tensor([fit.temperature for fit in fits[s]], dtype=torch.float32) for s in subsets}
    curves: dict[tuple[int, ...], ThresholdCurve] = {}

    def curve_of(subset: tuple[int, ...]) -> ThresholdCurve:
        if subset not in curves:
            part = subset_cache(cache, subset, mixtures[subset])
            curves[subset] = _search(part, rule, costs_of(subset, macs), scales[subset], seed)
        return curves[subset]

    if len(subsets) > CROSS_VALIDATED:

        def promise(subset: tuple[int, ...]) -> tuple[int, float]:
            curve = curve_of(subset)
            entry = _entry(curve, int(right.sum()), budget)
            short = max(0, int(right.sum()) - int(curve.correct[entry]) - int(max(budget, 0) * curve.n / 100))
            return short, float(curve.cost[entry])

        if progress is not None:
            progress(f"{len(subsets)} subsets: the {CROSS_VALIDATED} most promising are cross-validated")
        subsets = sorted(subsets, key=promise)[:CROSS_VALIDATED]
    targets = targets_for(budget)
    found = []
    for subset in subsets:
        drop, error, cost = cross_validate(
            subset_cache(cache, subset, mixtures[subset]),
            right,
            rule,
            costs_of(subset, macs),
            scales[subset],
            targets,
            seed,
        )
        excess = drop + caution * error - budget
        keeps = (excess <= 1e-9) & (cost < limit)
        if keeps.any():
            best = int(np.flatnonzero(keeps)[np.argmin(cost[keeps])])
        else:  # the nearest: least beyond the budget among what is cheaper at all
            best = int(np.argmin(excess + np.where(cost < limit, 0.0, 1e3)))
        found.append(
            Candidate(
                subset,
                tuple(mixtures[subset].tolist()),
                float(targets[best]),
                float(drop[best]),
                float(error[best]),
                float(cost[best]),
                bool(keeps[best]),
            )
        )
    found.sort(key=lambda one: (not one.keeps, one.cost if one.keeps else one.drop + caution * one.error, one.exits))
    chosen = found[0]
    curve = curve_of(chosen.exits)
    return Choice(
        chosen,
        tuple(found),
        curve,
        _entry(curve, int(right.sum()), chosen.target),
        tuple(fit.to_dict() for fit in fits[chosen.exits]),
    )
