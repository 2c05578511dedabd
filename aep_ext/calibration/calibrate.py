"""calibrate(): temperatures and thresholds for a budget, from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from aep_ext.calibration.budgets import AccuracyBudget, Budget, CostBudget, RiskBudget
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.calibration import Calibration, refuse_same_data
from aep_ext.calibration.curve import Thresholds
from aep_ext.calibration.exit_costs import checked_costs
from aep_ext.calibration.identity import DataIdentity, is_reported_on
from aep_ext.calibration.path import ThresholdPath, losses_at
from aep_ext.calibration.risk_control import conformal_risk_control, learn_then_test
from aep_ext.calibration.temperature import fit_temperatures
from aep_ext.calibration.thresholds import ThresholdSearch
from aep_ext.inference._old_criteria import Policy, as_policy


def calibrate(
    cache: ExitCache,
    *,
    costs: Sequence[float] | Tensor,
    budget: Budget,
    policy: Policy | str = "confidence",
    on: str | None = None,
    temperatures: str | Sequence[float] | Tensor | None = "fit",
    path: ThresholdPath | None = None,
    share: float | None = None,
    seed: int = 0,
    method: str = "auto",
    bound_steps: int = 200,
    allow_same_data: bool = False,
) -> Calibration:
    """Temperatures and thresholds that meet a budget on a cache of calibration data.

    What is fitted in turn is fitted on different samples: ``share`` of the cache, drawn with ``seed``, goes to the
    first step (temperatures; for a risk also the path), the rest to the second (thresholds; the test).

    Args:
        cache: calibration data of the network that will be gated.
        costs: (E,) non-decreasing cost of a sample that is answered at each exit: ``exit_costs``, or measured times.
        budget: :class:`AccuracyBudget`, :class:`CostBudget` or :class:`RiskBudget`.
        policy: a built-in policy or its name.
        on: "ensemble" or "exit", where ``policy`` is a name.
        temperatures: "fit", (E,) numbers, or None for 1.
        path: for a risk, a path fixed on other data, which also settles policy and temperatures; by default the
            curve of that loss against the cost on the first part of the cache.
        share: by default 0.2, for a risk 0.5. 0: both steps on all samples (not for a risk). Without a first step
            everything goes to the second.
        method, bound_steps: of :class:`ThresholdSearch`.
        allow_same_data: accept a cache for reporting (role "test" or "report"), or a path made from the cache itself;
            the result is marked and nothing is guaranteed.

    Returns:
        A :class:`Calibration`; where the budget cannot be met ``feasible`` is False and ``notice`` says so.

    Raises:
        TypeError: the budget is none of the three.
        ValueError: data roles are mixed, or an argument breaks its rule.
    """
    if not isinstance(budget, (AccuracyBudget, CostBudget, RiskBudget)):
        raise TypeError(
            f"calibrate: budget must be an AccuracyBudget, CostBudget or RiskBudget, got {type(budget).__name__}"
        )
    same = _refuse_reporting("calibrate", cache, allow_same_data)
    if path is not None:
        if not isinstance(budget, RiskBudget):
            raise ValueError(f"calibrate: path must be left out but for a RiskBudget, got {type(budget).__name__}")
        return control_risk(cache, path, budget, costs=costs, seed=seed, allow_same_data=allow_same_data)
    rule = as_policy(policy, on)
    risk = isinstance(budget, RiskBudget)
    part = (0.5 if risk else 0.2) if share is None else float(share)
    if not 0 <= part < 1 or (risk and part == 0):
        raise ValueError(f"calibrate: share must be within {'(0' if risk else '[0'}, 1), got {part}")
    if isinstance(temperatures, str) and temperatures != "fit":
        raise ValueError(f"calibrate: temperatures must be 'fit', numbers or None, got {temperatures!r}")
    fitted = isinstance(temperatures, str)
    if part == 0 or not (risk or fitted):
        first = second = cache
    else:
        first, second = cache.split([part, 1 - part], seed=seed)
        if not len(first) or not len(second):
            raise ValueError(f"calibrate: cache must hold enough samples for a share of {part:g}, got {len(cache)}")
    fits = fit_temperatures(first, on=rule.on) if fitted else ()
    scales = [fit.temperature for fit in fits] if fitted else temperatures
    notice = "; ".join(f"exit {e + 1}: {fit.remark}" for e, fit in enumerate(fits) if fit.remark)
    if isinstance(budget, RiskBudget):
        search = ThresholdSearch(first, rule, costs, scales, loss=budget.loss, seed=seed, method=method)
        path = ThresholdPath.from_curve(search.curve(points=100), [first.identity])
        # Both parts have the cache's role; that they are disjoint is known here.
        result = _risk(second, path, budget, costs, seed, same, (first.identity, second.identity))
    else:
        search = ThresholdSearch(second, rule, costs, scales, seed=seed, method=method)
        found = (
            search.for_accuracy(budget.drop, bound_steps=bound_steps)
            if isinstance(budget, AccuracyBudget)
            else search.for_cost(budget.limit(float(search.problem.costs[-1])), bound_steps=bound_steps)
        )
        identities = (second.identity,) if first is second else (first.identity, second.identity)
        result = from_thresholds(
            found, second, search.problem.costs.tolist(), budget=budget, data=identities, allow_same_data=same
        )
        if fitted and first is second:
            result = result.marked("temperatures and thresholds were fitted on the same samples")
    result = replace(result, temperature_fits=tuple(fit.to_dict() for fit in fits))
    return result.marked(notice) if notice else result


def from_thresholds(
    found: Thresholds,
    cache: ExitCache,
    costs: Sequence[float],
    *,
    budget: Budget | None = None,
    data: Sequence[DataIdentity] | None = None,
    allow_same_data: bool = False,
    guarantee: str = "",
) -> Calibration:
    """A :class:`Calibration` of thresholds that a :class:`ThresholdSearch` found on a cache.

    Args:
        found: of a search on ``cache``.
        cache: the data that were searched.
        costs: (E,) those of the search.
        budget: what was asked for.
        data: identities of other data that were used, for temperatures say; the cache's own is added if it is missing.
        allow_same_data: accept a cache for reporting (role "test" or "report"); the result is marked.
        guarantee: what is promised, in words.

    Raises:
        ValueError: the thresholds were found on other data, or on data for reporting.
    """
    if found.data is not None and found.data.sha256 != cache.identity.sha256:
        raise ValueError(
            f"from_thresholds: cache must be the one that was searched, {found.data}, got {cache.identity}"
        )
    same_data = _refuse_reporting("from_thresholds", cache, allow_same_data)
    used = tuple(data or ())
    used = used if cache.identity in used else (*used, cache.identity)
    return Calibration(
        found.policy,
        found.thresholds,
        found.enabled,
        found.temperatures,
        cache.weights,
        tuple(costs),
        found.correct,
        found.full_correct,
        found.n,
        found.cost,
        found.full_cost,
        found.counts,
        budget,
        found.feasible,
        found.exact,
        found.bound,
        found.gap,
        guarantee,
        used,
        same_data,
        found.seed,
        found.notice,
        exit_ids=cache.exit_ids,
    )


def control_risk(
    cache: ExitCache,
    path: ThresholdPath,
    budget: RiskBudget,
    *,
    costs: Sequence[float] | Tensor,
    seed: int = 0,
    allow_same_data: bool = False,
) -> Calibration:
    """The cheapest step of a path whose risk is kept: learn-then-test, or conformal risk control.

    Args:
        cache: calibration data that had no part in the path or its temperatures.
        path: see :class:`ThresholdPath`.
        budget: epsilon, delta, loss and method.
        costs: (E,) cost of a sample that is answered at each exit.
        seed: of the order in which samples are looked at; kept in the result.
        allow_same_data: accept a path made from these data; the result is marked and nothing is guaranteed.

    Returns:
        A :class:`Calibration` with the guarantee in words. Where no step holds, every gate is off, which has no risk,
        and ``feasible`` is False.

    Raises:
        ValueError: the path was made from these data (or from data of their role), or a shape does not fit.
    """
    same = refuse_same_data("control_risk", cache, path.sources, allow_same_data)
    same |= _refuse_reporting("control_risk", cache, allow_same_data)
    return _risk(cache, path, budget, costs, seed, same, (*path.sources, cache.identity))


def _refuse_reporting(function: str, cache: ExitCache, allow_same_data: bool) -> bool:
    """Whether a cache is for reporting; an error unless that is allowed."""
    if not is_reported_on(cache.role):
        return False
    if not allow_same_data:
        raise ValueError(
            f"{function}: data must not have the role {cache.role!r}, which is reported on; "
            "allow_same_data=True does it all the same and marks the result"
        )
    return True


def _risk(
    cache: ExitCache,
    path: ThresholdPath,
    budget: RiskBudget,
    costs: Sequence[float] | Tensor,
    seed: int,
    same: bool,
    data: tuple[DataIdentity, ...],
) -> Calibration:
    prices = checked_costs("control_risk", costs, cache.num_exits)
    if not len(cache):
        raise ValueError("control_risk: cache must hold at least one sample, got none")
    taken, table = path.exits(cache)
    losses = losses_at(taken, table, budget.loss)
    test = (
        learn_then_test(losses, budget.epsilon, budget.delta, seed=seed)
        if budget.method == "ltt"
        else conformal_risk_control(losses, budget.epsilon)
    )
    n, gates = len(cache), cache.num_exits - 1
    notice = guarantee = ""
    if test.accepted:
        # All accepted steps hold at once, so the cheapest may be taken; of equals the most careful.
        means = prices[taken[: test.accepted]].mean(axis=1)
        step = int(np.argmin(means))
        thresholds, enabled, answered = path.thresholds[step].clone(), path.enabled[step].clone(), taken[step]
    else:
        thresholds, enabled = path.thresholds[0].clone(), torch.zeros(gates, dtype=torch.bool)
        answered = np.full(n, gates)
        notice = (
            f"no step of the path can be shown to keep the risk within {budget.epsilon:g} with {n} samples; "
            "every gate is off, which has no risk"
        )
    if test.accepted and not same:
        guarantee = _promise(budget, n, test.method)
    correct = int(table.right[answered, np.arange(n)].sum())
    return Calibration(
        path.policy,
        thresholds,
        enabled,
        path.temperatures.clone(),
        cache.weights,
        tuple(float(p) for p in prices),
        correct,
        int(table.right[-1].sum()),
        n,
        float(prices[answered].mean()),
        float(prices[-1]),
        tuple(np.bincount(answered, minlength=gates + 1).tolist()),
        budget,
        bool(test.accepted),
        False,
        None,
        None,
        guarantee,
        data,
        same,
        seed,
        notice,
        exit_ids=cache.exit_ids,
    )


def _promise(budget: RiskBudget, n: int, method: str) -> str:
    risk = {
        "degradation": "the probability that only the full ensemble is right",
        "drop": "the loss of top-1 accuracy against the full ensemble",
        "disagreement": "the probability of another answer than the full ensemble's",
    }[budget.loss]
    if budget.method == "crc":
        return (
            f"{risk} is at most {budget.epsilon:g} in expectation over calibration and later data (conformal risk "
            f"control, {n} samples)"
        )
    return (
        f"{risk} is at most {budget.epsilon:g} with probability {1 - budget.delta:g} over the calibration data "
        f"(learn-then-test, fixed sequence, {method}, {n} samples)"
    )
