"""The gate of one network: chosen for a budget or tested for a guarantee, or none, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aep_ext.termination import as_policy
from aep_ext.training.gating.choice import Choice, candidate_subsets, choose, costs_of, subset_cache
from aep_ext.training.gating.figures import Gate
from aep_ext.training.gating.guarantee import guaranteed
from aep_ext.training.gating.settings import TEMPERATURE_SHARE, TEST_SHARE, CalibrationSettings
from aep_ext.training.gating.unit import Unit


@dataclass(frozen=True, eq=False)
class Decision:
    """What came of it.

    Attributes:
        gated: whether there is a gate; else ``gate`` is the pruned ensemble with nothing gated.
        gate: exits, thresholds and the rest.
        choice: how it was chosen; None where nothing can be cheaper than the pruned ensemble.
        notice: why there is no gate, or "".
        guarantee: what is promised, or None.
    """

    gated: bool
    gate: Gate
    choice: Choice | None
    notice: str = ""
    guarantee: dict[str, Any] | None = None


def data_rows(n: int, settings: CalibrationSettings) -> dict[str, Tensor]:
    """Rows of the N images to select on, by what they are for: "temperatures", "thresholds" and, for a guarantee,
    "test". No row is in two, and every seed's network gets the same."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    first = round(TEMPERATURE_SHARE * n)
    if settings.risk is None:
        return {"temperatures": order[:first], "thresholds": order[first:]}
    second = n - round(TEST_SHARE * n)
    return {"temperatures": order[:first], "thresholds": order[first:second], "test": order[second:]}


def decide(
    unit: Unit, rows: dict[str, Tensor], settings: CalibrationSettings, progress: Callable[[str], None] | None
) -> Decision:
    """The gate of one network, from the images to select on alone.

    Args:
        unit: the network's stored logits.
        rows: see :func:`data_rows`.
        settings: what is asked.
        progress: takes a line now and then.
    """
    rule = as_policy(settings.policy, settings.judge)
    ids = unit.pruned_exits
    off = torch.zeros(len(ids) - 1)
    own = unit.select.weights[ids].float()
    pruned = Gate(tuple(ids), own, rule, off, off.bool(), torch.ones(len(ids)), costs_of(ids, unit.macs))
    if not candidate_subsets(unit.select.num_exits, unit.macs, unit.pruned_macs):
        return Decision(False, pruned, None, "no other exit costs less than the pruned ensemble, which stays")
    reference = unit.right("select", ids)
    choice = choose(
        unit.select.select(rows["temperatures"]),
        unit.select.select(rows["thresholds"]),
        reference[rows["thresholds"]],
        unit.macs,
        rule,
        budget=settings.points,
        limit=unit.pruned_macs,
        caution=settings.caution,
        weights=settings.output_weights,
        seed=settings.seed,
        progress=progress,
    )
    best, curve = choice.chosen, choice.curve
    costs = costs_of(best.exits, unit.macs)

    def gate_at(point: int) -> Gate:
        thresholds, enabled = curve.thresholds[point], curve.enabled[point]
        return Gate(best.exits, torch.tensor(best.weights), rule, thresholds, enabled, curve.temperatures, costs)

    if settings.risk is not None:
        cache = subset_cache(unit.select.select(rows["test"]), best.exits, best.weights)
        test = guaranteed(curve, cache, reference[rows["test"]], costs, settings.risk, settings.delta)
        if test.step is None:
            return Decision(False, pruned, choice, f"{test.text}; it stays")
        if test.cost >= unit.pruned_macs:
            return Decision(False, pruned, choice, "what can be guaranteed is not cheaper than the pruned ensemble")
        return Decision(True, gate_at(test.step), choice, guarantee=test.to_dict())
    if best.keeps:
        return Decision(True, gate_at(choice.point), choice)
    return Decision(
        False,
        pruned,
        choice,
        f"no gated subset keeps within {settings.points:g} points of the pruned ensemble at fewer multiply-adds, so it "
        f"stays; the nearest, exits {'+'.join(str(e + 1) for e in best.exits)}, loses {best.drop:.2f} points (standard "
        f"error {best.error:.2f}) at {100 * best.cost / unit.pruned_macs:.1f} % of its multiply-adds",
    )
