"""What a gate does on the test images, from cached logits: everything that the report shows of one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aep_ext.calibration.table import GateTable
from aep_ext.termination import ExitCache, Policy, Simulation, ThresholdCurve, as_policy, exit_metrics, simulate
from aep_ext.training.evaluate import accuracy
from aep_ext.training.gating.choice import subset_cache
from aep_ext.training.gating.unit import Unit
from aep_ext.training.verdict import paired_verdict

CURVE_POINTS = 100
EXAMPLES = 8
_SHOWN = ("ece", "nll", "brier", "auroc")


@dataclass(frozen=True, eq=False)
class Gate:
    """A gate as numbers.

    Attributes:
        exits: original numbers of the exits that are gated.
        weights: (E,) float32, their output weights.
        policy: what decides.
        thresholds, enabled: (E-1,) float32 and bool.
        temperatures: (E,) float32.
        costs: multiply-adds of a sample answered at each exit.
    """

    exits: tuple[int, ...]
    weights: Tensor
    policy: Policy
    thresholds: Tensor
    enabled: Tensor
    temperatures: Tensor
    costs: list[int]

    @classmethod
    def from_part(cls, part: dict[str, Any]) -> Gate:
        """The gate of an entry of ``gates.json``."""
        return cls(
            tuple(part["exits"]),
            torch.tensor(part["output_weights"], dtype=torch.float32),
            as_policy(part["policy"]["name"], part["policy"]["on"]),
            torch.tensor(part["thresholds"], dtype=torch.float32),
            torch.tensor(part["enabled"], dtype=torch.bool),
            torch.tensor(part["temperatures"], dtype=torch.float32),
            part["costs"],
        )

    def simulate(self, cache: ExitCache) -> Simulation:
        """What it does on a cache of these exits."""
        return simulate(
            cache.logits,
            cache.weights,
            self.policy,
            self.thresholds,
            temperatures=self.temperatures,
            enabled=self.enabled,
            target=cache.target,
            costs=self.costs,
        )


def select_figures(gate: Gate, unit: Unit, rows: Tensor) -> dict[str, Any]:
    """Right answers on the images on which the gate was chosen: optimistic."""
    outcome = gate.simulate(subset_cache(unit.select.select(rows), gate.exits, gate.weights))
    return {
        "n": len(rows),
        "gated_correct": int(outcome.correct.sum()),
        "pruned_correct": int(unit.right("select", unit.pruned_exits)[rows].sum()),
        "full_correct": int(unit.right("select")[rows].sum()),
        "mean_macs": outcome.mean_cost,
    }


def report_figures(unit: Unit, cache: ExitCache, outcome: Simulation) -> dict[str, Any]:
    """Accuracy and cost of the gate and of all it is compared with, on the test images.

    ``drop_points`` is gated minus pruned, in points (negative: accuracy was lost), ``drop_interval`` its 95 % paired
    interval.
    """
    gated = accuracy(outcome.logits, cache.target)
    verdict = paired_verdict(outcome.correct[None], unit.right("report", unit.pruned_exits)[None], 0.005)
    return {
        "n": len(cache),
        "gated": {
            "top1": gated["top1"],
            "top5": gated["top5"],
            "correct": gated["correct1"],
            "mean_macs": outcome.mean_cost,
            "exit_counts": outcome.counts.tolist(),
        },
        **{
            kind: {"top1": part["report"]["top1"], "top5": part["report"]["top5"], "macs": part["macs"]}
            for kind, part in (
                ("pruned", unit.part["pruned"]),
                ("full", unit.part["full"]),
                ("baseline", unit.baseline),
            )
        },
        "each_exit": [
            {
                "exit": e,
                "top1": accuracy(unit.report.logits[e], unit.report.target)["top1"],
                "macs": unit.macs[(1 << e) - 1],
            }
            for e in range(unit.report.num_exits)
        ],
        "drop_points": 100 * verdict["difference"],
        "drop_interval": [100 * verdict["low"], 100 * verdict["high"]],
        "only_gated_right": verdict["only_a"],
        "only_pruned_right": verdict["only_b"],
    }


def curve_figures(
    curve: ThresholdCurve, cache: ExitCache, costs: Sequence[float], points: int = CURVE_POINTS
) -> list[dict[str, float]]:
    """The accuracy-cost curve of the search, each point's thresholds applied to the test images.

    ``mean_macs`` and ``report_top1`` are those of the test images, ``select_macs`` and ``select_top1`` those of the
    images that were searched.
    """
    some = curve.thinned(points)
    table = GateTable.of(cache.logits, cache.weights, cache.target, some.policy, some.temperatures)
    rows, samples = [], np.arange(len(cache))
    for number in range(len(some)):
        taken = table.leaving(some.thresholds[number].double().numpy(), some.enabled[number].numpy())
        rows.append(
            {
                "mean_macs": float(np.asarray(costs, dtype=np.float64)[taken].mean()),
                "report_top1": float(table.right[taken, samples].mean()),
                "select_macs": float(some.cost[number]),
                "select_top1": float(some.correct[number] / some.n),
            }
        )
    return rows


def calibration_figures(gate: Gate, cache: ExitCache, fits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How good each exit's probabilities are on the test images, before its temperature and after."""
    before = exit_metrics(cache, 1.0, on=gate.policy.on)
    after = exit_metrics(cache, gate.temperatures, on=gate.policy.on)
    return [
        {
            "exit": exit_id,
            "temperature": float(gate.temperatures[k]),
            "converged": bool(fits[k]["converged"]),
            "bounded": fits[k]["bounded"],
            "before": {name: before[k].to_dict()[name] for name in _SHOWN},
            "after": {name: after[k].to_dict()[name] for name in _SHOWN},
        }
        for k, exit_id in enumerate(gate.exits)
    ]


def histogram_figures(gate: Gate, cache: ExitCache, outcome: Simulation) -> dict[str, Any]:
    """Where each class left, and how often the answers at each exit were right."""
    exits, classes = len(gate.exits), cache.num_classes
    cells = torch.bincount(cache.target * exits + outcome.exits, minlength=classes * exits)
    right = torch.bincount(outcome.exits[outcome.correct], minlength=exits)
    return {
        "per_class": cells.reshape(classes, exits).tolist(),
        "right_by_exit": [[n, r] for n, r in zip(outcome.counts.tolist(), right.tolist(), strict=True)],
    }


def example_figures(gate: Gate, cache: ExitCache, outcome: Simulation) -> dict[str, list[dict[str, Any]]]:
    """Test images to look at: those that left first, the surest before the others, and those that went to the end, the
    least sure first; at most eight each."""
    exits, sure = outcome.exits.numpy(), outcome.confidences.double().numpy()
    order = np.lexsort((np.arange(len(sure)), -sure, exits))
    early = order[exits[order] < len(gate.exits) - 1][:EXAMPLES]
    late = np.flatnonzero(exits == len(gate.exits) - 1)
    late = late[np.lexsort((late, sure[late]))][:EXAMPLES]

    def described(rows: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "index": int(row),
                "label": int(cache.target[row]),
                "predicted": int(outcome.predictions[row]),
                "exit": gate.exits[int(exits[row])],
                "confidence": float(sure[row]),
            }
            for row in rows
        ]

    return {"first": described(early), "last": described(late)}
