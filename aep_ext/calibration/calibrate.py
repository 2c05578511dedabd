"""calibrate(): which exits, output weights, temperatures and thresholds keep a budget, from cached logits alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext._utils import per_exit, using_threads
from aep_ext.calibration.budgets import (
    AccuracyBudget,
    Budget,
    CostBudget,
    RiskBudget,
    as_budget,
    budget_from_dict,
    budget_to_dict,
)
from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.calibration.risk_control import conformal_risk_control, learn_then_test
from aep_ext.calibration.selection import Candidate, Selection, candidate_subsets
from aep_ext.calibration.thresholds import ExitTable, ParetoFront, search_thresholds
from aep_ext.inference.criteria import CRITERIA, check_criterion, criterion_name
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.simulate import Simulation, simulate
from aep_ext.pruning.subsets import checked_exits

_CURVE_POINTS = 100
_PATH_STEPS = 100
_SMALL = 1 << 20
_SHARED = 0.01
"""From this share of equal rows on, two data sets overlap; single duplicates are common in real data."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """An :class:`~aep_ext.inference.ExitPolicy` and what is known of it.

    Attributes:
        policy: the policy; where ``feasible`` is False the nearest that was found.
        feasible: whether the budget is kept.
        notice: if not, which rule refused, by how much, and what helps.
        budget: what was asked for.
        n, correct, reference_correct: samples, right answers of the policy and of the reference. On the data that the
            policy was fitted to, hence optimistic; for a :class:`RiskBudget` on the half that tested it.
        mean_cost, counts: mean cost, and how many were answered at each exit, on the same samples.
        full_cost: cost of all exits that there were.
        drop_points: points of top-1 below the reference: cross-validated, or on the half that tested a risk.
        std_error, interval: its standard error, and its paired 95 % interval (low, high), in points.
        costs: cost of a sample that is answered at each exit of the policy.
        candidates: the best candidate of every subset that was cross-validated, the chosen one first.
        curve: the Pareto front of the policy's exits on the data they were fitted to, the cheapest first: dicts of
            "thresholds", "enabled", "correct" and "mean_cost".
        guarantee: what is promised on data of the same distribution, in words; empty where nothing is.
        data: role, number and fingerprint of the samples; and of how many ``subsets`` of the exits how many were
            ``screened`` and how many ``cross_validated``.
        num_std_errors, folds, seed: as they were used.
    """

    policy: ExitPolicy
    feasible: bool
    notice: str
    budget: Budget
    n: int
    correct: int
    reference_correct: int
    mean_cost: float
    counts: tuple[int, ...]
    full_cost: float
    drop_points: float
    std_error: float
    interval: tuple[float, float]
    costs: tuple[float, ...]
    candidates: tuple[Candidate, ...]
    curve: tuple[dict[str, Any], ...]
    guarantee: str
    data: Mapping[str, Any]
    num_std_errors: float
    folds: int
    seed: int
    _hashes: NDArray[np.uint64] | None = field(default=None, repr=False)

    def evaluate(self, logits: CachedLogits) -> Simulation:
        """What the policy does on other data, by the simulator.

        Args:
            logits: of the same network: the policy's exits are looked up by their numbers.

        Raises:
            ValueError: an exit is missing, there is no sample, or these are (in part) the data of the calibration. Rows
                are compared one by one; after :meth:`from_dict`, only the data set as a whole.
        """
        if not set(self.policy.exits) <= set(logits.exits):
            raise ValueError(
                f"Calibration.evaluate: logits must hold the exits {list(self.policy.exits)}, got {list(logits.exits)}"
            )
        if not len(logits):
            raise ValueError("Calibration.evaluate: logits must hold at least one sample, got none")
        part = logits.select_exits([logits.exits.index(e) for e in self.policy.exits])
        shared = len(part) if part.fingerprint == self.data["fingerprint"] else 0
        if self._hashes is not None:
            shared = int(np.isin(part.row_hashes, self._hashes).sum())
        if shared > _SHARED * len(part):
            raise ValueError(
                f"Calibration.evaluate: logits must be of other samples than those of the calibration "
                f"({self.data['role']}), got {shared} of {len(part)} that are the same"
            )
        return simulate(part.logits, self.policy, target=part.target, costs=self.costs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        values = asdict(replace(self, _hashes=None))
        del values["_hashes"]
        return {**values, "budget": budget_to_dict(self.budget)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The reverse of :meth:`to_dict`.

        Raises:
            ValueError: an entry is missing or unknown, or breaks the rules of its kind.
        """
        known = set(cls.__dataclass_fields__) - {"_hashes"}
        if not isinstance(values, Mapping) or set(values) != known:
            wrong = sorted(set(values) ^ known) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"Calibration.from_dict: entries must be {', '.join(sorted(known))}; differing: {wrong}")
        made = {
            "policy": ExitPolicy.from_dict(values["policy"]),
            "budget": budget_from_dict(values["budget"]),
            "candidates": tuple(Candidate(**_tuples(one)) for one in values["candidates"]),
            "curve": tuple(_tuples(point) for point in values["curve"]),
        }
        return cls(**{**_tuples(values), **made})

    def __str__(self) -> str:
        low, high = self.interval
        lines = [
            str(self.policy),
            f"top-1 {self.drop_points:.2f} points below the reference (95 % interval {low:.2f} to {high:.2f}), "
            f"mean cost {100 * self.mean_cost / self.full_cost:.1f} % of all exits' ({self.n} samples)",
        ]
        counts = [self.data.get(name, 0) for name in ("cross_validated", "screened", "subsets")]
        if 1 < counts[1] and counts[0] < counts[2]:  # not where the exits were given
            lines.append(f"{counts[0]:,} subsets of the exits cross-validated of {counts[1]:,} tried of {counts[2]:,}")
        return "\n".join([*lines, *(text for text in (self.guarantee, self.notice) if text)])


def calibrate(
    logits: CachedLogits,
    *,
    costs: Sequence[float] | Tensor | NDArray[np.floating],
    output_weights: str | Sequence[float] | Tensor = "fitted",
    budget: Budget | float = 0.5,
    reference: Tensor | NDArray[np.bool_] | None = None,
    criterion: str = "confidence",
    criterion_on: str = "ensemble",
    exits: str | Sequence[int] = "auto",
    num_std_errors: float = 0.0,
    folds: int | None = None,
    seed: int = 0,
    last_alone: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Exits, output weights, temperatures and thresholds that keep a budget.

    Every subset of the exits is a candidate. For each, everything is fitted on all folds but one, for a row of
    tightened budgets, and evaluated on the fold left out; chosen is the cheapest whose cross-validated drop plus
    ``num_std_errors`` standard errors is within the budget (of those within 2 % of its cost, the one with the
    smallest drop), which is then fitted on all samples. The estimate is noisy where images are few, and the best of
    many is optimistic: with 0, the default, more than every other choice loses more than its budget on new images; 1
    is the one-standard-error rule (L. Breiman et al., "Classification and regression trees", 1984). The interval is in
    the result.

    For a :class:`RiskBudget` one half of the samples does all this; the other half tests the policies of the curve from
    careful to bold, and the cheapest that passes is taken.

    Args:
        logits: of all exits, of samples that the network was not trained on.
        costs: cost of the extracted network by subset (2^E - 1 numbers, that of mask m at m - 1), for instance
            ``subset_costs(net, example).macs``; or E non-descending costs of a sample answered at each exit.
        output_weights: "fitted", or E positive numbers.
        budget: an :class:`AccuracyBudget` (or its points), a :class:`CostBudget` or a :class:`RiskBudget`.
        reference: (N,) bool, right answers of the classifier that the drop is measured against. By default the ensemble
            of all exits with the output weights given, or with those fitted to these logits (for a risk, to the half
            that chooses).
        criterion, criterion_on: see :class:`~aep_ext.inference.ExitPolicy`; a name.
        exits: "auto", or positions of exits in the logits: only thresholds are chosen then.
        num_std_errors: standard errors added to the cross-validated drop before it is held against the budget.
        folds: by default 5; 10 below 2,000 samples and 20 below 200 (never more than there are samples).
        seed: of folds, starts and halves; the same arguments give the same result.
        last_alone: the last exit is kept and answers alone, see :class:`~aep_ext.inference.ExitPolicy`; only the early
            exits' weights are fitted.
        progress: called with the number of fits done, and of all.

    Returns:
        A :class:`Calibration`. Where nothing keeps the budget ``feasible`` is False and ``notice`` says why.

    Raises:
        TypeError, ValueError: an argument breaks its rule, or the logits have the role "test".
    """
    wanted = as_budget(budget)
    risk = isinstance(wanted, RiskBudget)
    n, count = len(logits), logits.num_exits
    if logits.role == "test":
        raise ValueError("calibrate: logits must not have the role 'test', whose samples are reported on")
    check_criterion("calibrate", criterion, criterion_on)
    if criterion not in CRITERIA:
        raise ValueError(
            f"calibrate: criterion must be one of {', '.join(CRITERIA)}, got {criterion_name(criterion)}, "
            "whose thresholds mean what only its author knows"
        )
    if n < 1 + risk:
        raise ValueError(f"calibrate: logits must hold at least {1 + risk} samples, got {n}")
    if not num_std_errors >= 0:
        raise ValueError(f"calibrate: num_std_errors must be at least 0, got {num_std_errors}")
    if folds is not None and folds < 2:
        raise ValueError(f"calibrate: folds must be at least 2, got {folds}")
    weights: str | tuple[float, ...] = "fitted"
    if not isinstance(output_weights, str):
        weights = per_exit("calibrate", "output_weights", output_weights, count, positive=True)
    elif output_weights != "fitted":
        raise ValueError(f"calibrate: output_weights must be 'fitted' or numbers, got {output_weights!r}")
    if isinstance(exits, str) and exits != "auto":
        raise ValueError(f"calibrate: exits must be 'auto' or positions, got {exits!r}")
    subsets = candidate_subsets(count) if isinstance(exits, str) else [checked_exits("calibrate", exits, count)]
    if last_alone:
        subsets = [subset for subset in subsets if subset[-1] == count - 1]
        if not subsets:
            raise ValueError(f"calibrate: exits must hold the last one, {count - 1}, with last_alone, got {exits}")
    chosen_on = tested_on = np.arange(n)
    if isinstance(wanted, RiskBudget):
        chosen_on, tested_on = np.array_split(np.random.default_rng(seed).permutation(n), 2)
        # The test asks for about so many: a policy that keeps the risk by less would hardly pass it.
        needed = NormalDist().inv_cdf(1 - wanted.delta) if wanted.method == "ltt" else 0.0
        num_std_errors = max(num_std_errors, needed)
    size = len(chosen_on)
    usual = 20 if size < 200 else 10 if size < 2000 else 5
    selection = Selection(
        logits.select(torch.from_numpy(chosen_on)),
        np.empty(0, dtype=bool),
        _costs(costs, count),
        AccuracyBudget(100 * wanted.epsilon) if isinstance(wanted, RiskBudget) else wanted,
        weights,
        criterion,
        criterion_on,
        float(num_std_errors),
        min(size, usual if folds is None else folds),
        seed,
        last_alone,
    )
    for subset in subsets:
        if (np.diff(selection.costs_of(subset)) < 0).any():
            raise ValueError(
                "calibrate: costs must not descend from exit to exit, "
                f"got {selection.costs_of(subset).tolist()} for exits {list(subset)}"
            )
    if reference is None:
        right = ExitTable.of(logits, selection.fit(range(count))).correct[-1]
    else:
        right = _reference(reference, n)
    selection = replace(selection, reference=right[chosen_on])
    # On small tensors threads wait for one another longer than they compute.
    with using_threads(1 if logits.logits.numel() < _SMALL else None):
        candidates = selection.candidates(subsets, progress)
    best = candidates[0]
    policy, own_costs = selection.fit(best.exits), selection.costs_of(best.exits)
    part = logits.select_exits(best.exits)
    table = ExitTable.of(part, policy)
    seen, tested = table.select(chosen_on), table.select(tested_on)
    front = search_thresholds(seen, own_costs)
    guarantee = notice = ""
    if isinstance(wanted, RiskBudget):
        path = front
        if wanted.loss == "degradation":  # where the reference is wrong nothing is lost
            path = search_thresholds(replace(seen, correct=seen.correct | ~right[chosen_on]), own_costs)
        thresholds, enabled, guarantee = _tested_step(wanted, path, tested, own_costs, right[tested_on], seed)
        feasible = bool(guarantee)
    else:
        feasible = best.qualifies
        # A disabled gate's threshold is not used: any will do.
        point = 0 if best.target is None else selection.point(front, best.target, selection.reference)
        thresholds, enabled = front.thresholds[point], front.enabled[point] & (best.target is not None)
    taken, correct = tested.answers(thresholds, enabled)
    mean_cost = float(own_costs[taken].mean())
    if isinstance(wanted, RiskBudget):
        best = replace(selection, reference=right[tested_on]).candidate(best.exits, None, correct, mean_cost)
    if not feasible:
        notice = _notice(wanted, selection, best, policy.exits, len(tested_on))
    return Calibration(
        policy=replace(policy, thresholds=thresholds.tolist(), enabled=enabled.tolist()),
        feasible=feasible,
        notice=notice,
        budget=wanted,
        n=len(tested_on),
        correct=int(correct.sum()),
        reference_correct=int(right[tested_on].sum()),
        mean_cost=mean_cost,
        counts=tuple(np.bincount(taken, minlength=len(best.exits)).tolist()),
        full_cost=selection.full_cost,
        drop_points=best.drop_points,
        std_error=best.std_error,
        interval=best.interval,
        costs=tuple(own_costs.tolist()),
        candidates=tuple(replace(one, exits=tuple(logits.exits[e] for e in one.exits)) for one in candidates),
        curve=_curve(front),
        guarantee=guarantee,
        data={
            **{"role": logits.role, "n": n, "fingerprint": part.fingerprint},
            **{"subsets": (1 << count) - 1, "screened": len(subsets), "cross_validated": len(candidates)},
        },
        num_std_errors=selection.num_std_errors,
        folds=selection.folds,
        seed=seed,
        _hashes=part.row_hashes,
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _reference(values: Tensor | NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    right = np.asarray(torch.as_tensor(values).detach().cpu())
    if right.shape != (n,) or right.dtype != bool:
        raise ValueError(f"calibrate: reference must be bool of shape [{n}], got {right.dtype} {list(right.shape)}")
    return right


def _costs(values: Any, exits: int) -> NDArray[np.float64]:
    costs = np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float64)
    if costs.shape not in ((exits,), ((1 << exits) - 1,)):
        raise ValueError(
            f"calibrate: costs must be {(1 << exits) - 1} numbers (by subset) or {exits} (by exit), "
            f"got shape {list(costs.shape)}"
        )
    if not (np.isfinite(costs) & (costs > 0)).all():
        raise ValueError(f"calibrate: costs must be positive and finite, got {costs.min()}..{costs.max()}")
    return costs


def _tested_step(
    budget: RiskBudget,
    front: ParetoFront,
    tested: ExitTable,
    costs: NDArray[np.float64],
    reference: NDArray[np.bool_],
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.bool_], str]:
    """Thresholds and flags of the cheapest point of the front that passes, and the promise; the most careful point and
    "" where none does. The front must come from other samples than ``tested``."""
    path = np.unique(np.linspace(0, len(front) - 1, _PATH_STEPS).round().astype(int))[::-1]
    answers = [tested.answers(front.thresholds[step], front.enabled[step]) for step in path]
    correct = np.stack([right for _, right in answers])
    if budget.loss == "drop":
        losses = reference.astype(np.int8) - correct.astype(np.int8)
    else:
        losses = (reference & ~correct).astype(np.int8)
    if budget.method == "crc":
        accepted = conformal_risk_control(losses, budget.epsilon)
    else:
        accepted = learn_then_test(losses, budget.epsilon, budget.delta, seed=seed)
    if not accepted:
        return front.thresholds[path[0]], front.enabled[path[0]], ""
    # All accepted steps hold at once, so the cheapest may be taken.
    means = [costs[taken].mean() for taken, _ in answers[:accepted]]
    step = path[int(np.argmin(means))]
    risk = {
        "drop": "the loss of top-1 accuracy against the reference",
        "degradation": "the probability that only the reference is right",
    }[budget.loss]
    kept, method = f"with probability {1 - budget.delta:g} over the calibration data", "learn-then-test"
    if budget.method == "crc":
        kept, method = "in expectation over calibration and later data", "conformal risk control"
    promise = f"{risk} is at most {budget.epsilon:g} {kept} ({method}, {len(reference)} samples)"
    return front.thresholds[step], front.enabled[step], promise


def _notice(budget: Budget, selection: Selection, best: Candidate, exits: tuple[int, ...], n: int) -> str:
    """Why nothing keeps the budget, and what helps."""
    nearest = "+".join(str(e + 1) for e in exits)
    low, high = best.interval
    figures = f"{best.drop_points:.2f} points below the reference (95 % interval {low:.2f} to {high:.2f})"
    if isinstance(budget, RiskBudget):
        return (
            f"no policy could be shown to keep a risk of {budget.epsilon:g} with {n} samples: the most careful one, "
            f"exits {nearest}, is {figures}; allow a larger risk or calibrate on more images"
        )
    if isinstance(budget, CostBudget):
        return (
            f"no policy keeps a mean cost of {selection.limit:g}: the nearest, exits {nearest}, costs "
            f"{best.mean_cost:g}; allow a larger cost"
        )
    added, careful = selection.num_std_errors, ""
    remedies = "calibrate on more images, or allow a larger budget (--budget, --margin)"
    if added:
        total = best.drop_points + added * best.std_error
        careful = f"; with {added:g} standard errors of {best.std_error:.2f} added, as is asked, {total:.2f}"
        if best.drop_points <= selection.limit:
            remedies = f"{remedies}, or hold the plain estimate against it (num_std_errors=0, --num-std-errors 0)"
    return (
        f"no policy keeps within {selection.limit:g} points of the reference: the nearest, exits {nearest}, is "
        f"{figures} by cross-validation on {n} images{careful}; {remedies}"
    )


def _curve(front: ParetoFront) -> tuple[dict[str, Any], ...]:
    """At most so many points, evenly spread over the cost, both ends among them."""
    kept = np.arange(len(front))
    if len(front) > _CURVE_POINTS:
        evenly = np.linspace(front.cost[0], front.cost[-1], _CURVE_POINTS)
        kept = np.unique(np.searchsorted(front.cost, evenly).clip(0, len(front) - 1))
    return tuple(
        {
            "thresholds": tuple(front.thresholds[i].tolist()),
            "enabled": tuple(front.enabled[i].tolist()),
            "correct": int(front.correct[i]),
            "mean_cost": float(front.cost[i]),
        }
        for i in kept
    )
