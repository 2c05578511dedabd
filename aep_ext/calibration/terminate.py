"""terminate(): a trained network becomes one that stops early, calibrated on data of the user's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext._utils import inputs_of
from aep_ext.calibration.budgets import Budget
from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.calibration.calibrate import calibrate
from aep_ext.inference import GatedNet, collect_logits
from aep_ext.pruning.cost import exit_costs, subset_costs
from aep_ext.pruning.subsets import MAX_EXITS
from aep_ext.surgery.multi_exit import MultiExitNet


def terminate(
    net: MultiExitNet,
    loader: Iterable[Any],
    *,
    budget: Budget | float = 0.5,
    reference: str | Tensor | NDArray[np.bool_] = "ensemble",
    costs: Sequence[float] | Tensor | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> GatedNet:
    """The cheapest early-exit version of a network that keeps a budget, chosen by
    :func:`~aep_ext.calibration.calibrate`.

    Accuracy and cost in ``gated.calibration`` are of the data at hand; report those of others::

        gated = terminate(net, val_loader)
        print(gated.calibration.evaluate(CachedLogits(*collect_logits(net, test_loader), role="test")))

    Args:
        net: a full or pruned network; left as it is.
        loader: (x, y) batches of labelled samples that the network was not trained on, x (N, C, H, W), y (N,) integers;
            or dicts, as :func:`collect_logits` takes them.
        budget: an :class:`AccuracyBudget` (or its points), a :class:`CostBudget` or a :class:`RiskBudget`.
        reference: what the drop is measured against. "ensemble": the network itself, all of its exits; "last": its last
            exit alone; or (N,) bool, the right answers of any other classifier on the samples, in the loader's order.
        costs: see ``calibrate``. By default the multiply-adds of every subset, counted on the loader's first image;
            above 16 exits those of all exits up to each.
        device: where to collect logits; by default where the network is.
        options: further arguments of ``calibrate``: criterion, criterion_on, exits, output_weights, num_std_errors,
            folds, seed, last_alone, progress.

    Returns:
        :class:`GatedNet` in eval mode on the network's device, with the attribute ``calibration``. Where nothing keeps
        the budget it is the nearest that was found, with a warning.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """
    if not isinstance(net, MultiExitNet):
        raise TypeError(f"terminate: net must be a MultiExitNet, got {type(net).__name__}")
    if isinstance(reference, str) and reference not in ("ensemble", "last"):
        raise ValueError(f"terminate: reference must be 'ensemble', 'last' or right answers, got {reference!r}")
    first: list[Tensor] = []
    logits = CachedLogits(*collect_logits(net, _noting(loader, first), device=device), exits=net.exit_ids)
    if isinstance(reference, str):
        weights = net.output_weights.detach().cpu().float()
        answers = logits.logits[-1] if reference == "last" else torch.einsum("e,enk->nk", weights, logits.logits)
        reference = answers.argmax(1) == logits.target
    if costs is None:
        few = net.num_exits <= MAX_EXITS
        costs = subset_costs(net, first[0]).macs if few else exit_costs(net, first[0])
    result = calibrate(logits, costs=costs, budget=budget, reference=reference, **options)
    if not result.feasible:
        warnings.warn(f"terminate: {result.notice}", stacklevel=2)
    gated = GatedNet.from_policy(net, result.policy)
    gated.calibration = result
    return gated.to(net.output_weights.device).eval()


def _noting(loader: Iterable[Any], first: list[Tensor]) -> Iterator[Any]:
    """The loader's batches; the first image is kept."""
    for batch in loader:
        if not first and len(inputs := inputs_of("terminate", batch)):
            first.append(inputs[:1])
        yield batch
