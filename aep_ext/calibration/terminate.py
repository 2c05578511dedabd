"""``terminate``: a pruned network becomes one that stops early, with gates calibrated on data of the user's."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aep_ext.calibration.budgets import AccuracyBudget, Budget
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.calibrate import calibrate
from aep_ext.calibration.calibration import Calibration
from aep_ext.calibration.exit_costs import exit_costs
from aep_ext.inference._old_criteria import Policy
from aep_ext.inference.gated_net import GatedNet
from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["terminate"]


def terminate(
    pruned: MultiExitNet,
    calibration: Calibration | ExitCache | Iterable[Any],
    *,
    policy: Policy | str = "confidence",
    budget: Budget | float = 0.5,
    costs: Sequence[float] | Tensor | None = None,
    mode: str | Sequence[str] = "auto",
    seed: int = 0,
) -> GatedNet:
    """Gives a network gates, with thresholds that meet a budget on calibration data.

    Temperatures are fitted on a part of the data and thresholds on the rest; see
    :func:`aep_ext.calibration.calibrate`, which has more options. What was found is ``gated.calibration``: accuracy and
    cost there are optimistic, so report those of other data (``gated.calibration.evaluate(cache_of_other_data)``).

    Args:
        pruned: a full or pruned network with at least two exits; it is not copied.
        calibration: labelled data that is used for nothing else: a loader of (x, y) batches, x (N, C, H, W), y (N,)
            integers; an :class:`ExitCache` of them; or a finished :class:`Calibration` (``policy``, ``budget`` and
            ``costs`` are then its own and must be left out).
        policy: a built-in policy or its name.
        budget: an :class:`AccuracyBudget`, :class:`CostBudget` or :class:`RiskBudget`; a number is the accuracy in
            points that may be lost against the full ensemble.
        costs: (E,) non-decreasing cost of a sample answered at each exit. By default its multiply-adds, counted on the
            loader's first image; with an ``ExitCache``, which has no images, they must be given
            (``exit_costs(pruned, (C, H, W))``).
        mode: of :class:`GatedNet`.
        seed: of the split of the data and of the search.

    Returns:
        :class:`GatedNet` in eval mode on the network's device, with the attribute ``calibration``.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: the costs are missing, or an argument breaks a rule.
        RuntimeError: the budget cannot be met; the message says what was the nearest.
    """
    if isinstance(calibration, Calibration):
        if policy != "confidence" or budget != 0.5 or costs is not None:
            raise ValueError(
                "terminate: policy, budget and costs must be left out with a finished Calibration, which has its own"
            )
        result = calibration
    else:
        if not isinstance(pruned, MultiExitNet):
            raise TypeError(f"terminate: pruned must be a MultiExitNet, got {type(pruned).__name__}")
        if pruned.num_exits < 2:
            raise ValueError(f"terminate: pruned must have at least two exits, got {pruned.num_exits}")
        if isinstance(budget, numbers.Real) and not isinstance(budget, bool):
            budget = AccuracyBudget(float(budget))
        if isinstance(calibration, ExitCache):
            cache = calibration
            if costs is None:
                raise ValueError(
                    "terminate: costs must be given with an ExitCache, which has no images to count on, got None "
                    "(termination.exit_costs(pruned, (channels, height, width)))"
                )
        else:
            first: list[Tensor] = []
            cache = ExitCache.collect(pruned, _noting(calibration, first), role="calibration")
            costs = exit_costs(pruned, first[0]) if costs is None else costs
        result = calibrate(cache, costs=costs, budget=budget, policy=policy, seed=seed)
    ids = tuple(getattr(pruned, "exit_ids", ()))
    if result.exit_ids and ids and ids != result.exit_ids:
        raise ValueError(
            f"terminate: pruned must have the exits {list(result.exit_ids)} that were calibrated, got {list(ids)}"
        )
    if not result.feasible:
        raise RuntimeError(
            f"terminate: the budget {result.budget} cannot be met on these data: {result.notice} (nearest: "
            f"{result.correct} of {result.n} right against {result.full_correct}, mean cost {result.cost:.6g} of "
            f"{result.full_cost:.6g})"
        )
    gated = GatedNet.from_calibration(pruned, result, mode)
    device = getattr(getattr(pruned, "output_weights", None), "device", torch.device("cpu"))
    gated.calibration = result
    return gated.to(device).eval()


def _noting(loader: Iterable[Any], first: list[Tensor]) -> Iterator[Any]:
    """The loader's batches; the first image is kept."""
    for batch in loader:
        if not first and isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor) and len(batch[0]):
            first.append(batch[0][:1])
        yield batch
