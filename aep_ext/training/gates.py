"""The gates of a trained model: calibrated on its stored logits, then evaluated on the test images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext._config import RunConfig
from aep_ext.calibration import AccuracyBudget, CachedLogits, Calibration, RiskBudget, calibrate, exit_metrics
from aep_ext.inference import ExitPolicy, GatedNet, GatedOutput, Simulation, near_threshold, simulate
from aep_ext.pruning import mask_of_exits
from aep_ext.training.evaluate import accuracy, right_answers

CURVE_POINTS = 100
EXAMPLES = 8
SINGLES = 256
"""So many test images are also answered one by one."""
TOLERANCE = 1e-5
_SHOWN = ("ece", "nll", "brier", "auroc")

Predictions = dict[str, Tensor]


def calibrated(
    config: RunConfig,
    part: dict[str, Any],
    predictions: Predictions,
    baseline: Predictions,
    split: str,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """The cheapest gated subset of a trained model that keeps the budget: :func:`aep_ext.calibration.calibrate`.

    Args:
        config: what is asked, see :class:`RunConfig`.
        part: the model's ``part.json``.
        predictions: its stored logits.
        baseline: those of the single-exit network of its seed.
        split: on whose images, "val" or "calibration".
        progress: as ``calibrate`` takes it.
    """
    logits, target = predictions[f"{split}_logits"], predictions[f"{split}_labels"]
    points = config.margin if config.budget is None else config.budget
    budget = AccuracyBudget(points) if config.risk is None else RiskBudget(config.risk, config.delta)
    return calibrate(
        CachedLogits(logits, target, role=split),
        costs=part["scores"]["macs"],
        output_weights="fitted" if config.output_weights == "fitted" else part["exit_weights"]["output"],
        budget=budget,
        reference=_reference(config, part, predictions, baseline, split),
        criterion=config.criterion,
        criterion_on=config.criterion_on,
        num_std_errors=config.num_std_errors,
        progress=progress,
    )


def _reference(
    config: RunConfig, part: dict[str, Any], predictions: Predictions, baseline: Predictions, split: str
) -> Tensor:
    """(N,) bool: whether what the budget is held against is right on the images of a split."""
    logits, target = predictions[f"{split}_logits"], predictions[f"{split}_labels"]
    single = right_answers(baseline[f"{split}_logits"][0], target)
    if config.reference == "baseline":
        return single
    rows = part["pruned"]["exits"] if config.reference == "pruned" else list(range(len(logits)))
    weights = torch.tensor(part["exit_weights"]["output"], dtype=torch.float32)[rows]
    own = right_answers(ops.ensemble(logits[rows], weights / weights.sum()), target)
    return single if config.reference == "best" and single.sum() > own.sum() else own


def published_policy(config: RunConfig, part: dict[str, Any]) -> ExitPolicy:
    """The pruned network as a policy: nobody leaves before its last exit."""
    exits = part["pruned"]["exits"]
    gates = len(exits) - 1
    return ExitPolicy(
        output_weights=tuple(part["exit_weights"]["output"][e] for e in exits),
        thresholds=(0.0,) * gates,
        criterion=config.criterion,
        criterion_on=config.criterion_on,
        enabled=(False,) * gates,
        exits=exits,
    )


def evaluated(
    config: RunConfig, part: dict[str, Any], predictions: Predictions, found: Calibration, split: str
) -> dict[str, Any]:
    """What the gates do on the calibration and the test images: an entry ``gated`` of ``results.json``.

    Where no gates keep the budget these are the figures of the pruned network, which then stays; ``notice`` says why.
    """
    policy = found.policy if found.feasible else published_policy(config, part)
    exits, macs = list(policy.exits), part["scores"]["macs"]
    costs = [macs[mask_of_exits(exits[: k + 1]) - 1] for k in range(len(exits))]
    logits, target = predictions["test_logits"][exits], predictions["test_labels"]
    seen_logits, seen_target = predictions[f"{split}_logits"][exits], predictions[f"{split}_labels"]
    outcome = simulate(logits, policy, target=target, costs=costs)
    seen = simulate(seen_logits, policy, target=seen_target, costs=costs)
    classes = logits.shape[2]
    cells = torch.bincount(target * len(exits) + outcome.exit, minlength=classes * len(exits))
    right = torch.bincount(outcome.exit[outcome.correct], minlength=len(exits))
    untempered = replace(policy, temperatures=(1.0,) * len(exits))
    metrics = [exit_metrics(logits, target, one) for one in (untempered, policy)]
    return {
        "feasible": found.feasible,
        "notice": found.notice,
        "policy": policy.to_dict(),
        "costs": costs,
        "parameters": part["scores"]["parameters"][mask_of_exits(exits) - 1],
        "calibration": found.to_dict(),
        "val": {
            "n": len(seen_target),
            "correct1": int(cast(Tensor, seen.correct).sum()),
            "top1": seen.accuracy,
            "mean_macs": seen.mean_cost,
        },
        "test": {
            **accuracy(outcome.logits, target),
            "mean_macs": outcome.mean_cost,
            "exit_counts": outcome.counts.tolist(),
        },
        "curve": _curve(found, logits, target, costs) if found.feasible else [],
        "per_class": cells.reshape(classes, len(exits)).tolist(),
        "right_by_exit": [[n, r] for n, r in zip(outcome.counts.tolist(), right.tolist(), strict=True)],
        "metrics": [
            {
                "exit": exits[k],
                "temperature": policy.temperatures[k],
                **{
                    name: {figure: of[k].to_dict()[figure] for figure in _SHOWN}
                    for name, of in zip(("before", "after"), metrics, strict=True)
                },
            }
            for k in range(len(exits))
        ],
        "examples": _examples(exits, target, outcome),
    }


def _curve(found: Calibration, logits: Tensor, target: Tensor, costs: Sequence[float]) -> list[dict[str, float]]:
    """The Pareto front of the thresholds, each point applied to the test images."""
    some = np.unique(np.linspace(0, len(found.curve) - 1, CURVE_POINTS).round().astype(int))
    rows = []
    for point in (found.curve[number] for number in some if found.curve):
        policy = replace(found.policy, thresholds=point["thresholds"], enabled=point["enabled"])
        outcome = simulate(logits, policy, target=target, costs=costs)
        rows.append(
            {
                "mean_macs": outcome.mean_cost,
                "test_top1": outcome.accuracy,
                "val_macs": point["mean_cost"],
                "val_top1": point["correct"] / found.n,
            }
        )
    return rows


def _examples(exits: Sequence[int], target: Tensor, outcome: Simulation) -> dict[str, list[dict[str, Any]]]:
    """Test images to look at: those that left first, the surest before the others, and those that went to the end, the
    least sure first; at most eight each."""
    taken, sure = outcome.exit.numpy(), outcome.confidence.double().numpy()
    order = np.lexsort((np.arange(len(sure)), -sure, taken))
    early = order[taken[order] < len(exits) - 1][:EXAMPLES]
    late = np.flatnonzero(taken == len(exits) - 1)
    late = late[np.lexsort((late, sure[late]))][:EXAMPLES]

    def described(rows: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "index": int(row),
                "label": int(target[row]),
                "predicted": int(outcome.prediction[row]),
                "exit": exits[int(taken[row])],
                "confidence": float(sure[row]),
            }
            for row in rows
        ]

    return {"early": described(early), "late": described(late)}


def agreement(
    gated: GatedNet, loader: Iterable[Any], logits: Tensor, policy: ExitPolicy, device: torch.device
) -> dict[str, Any]:
    """Executor against simulator, in the loader's batches, and on the first images one by one (under ``single``).

    ``near_threshold`` counts the samples that pass within the tolerance of a threshold: batches of another shape, or
    another device, round the last bits otherwise, and there, but nowhere else, the two may differ.

    Args:
        loader: batches of the test images, in the order of ``logits``.
        logits: (E, N, K) exit logits of the policy's exits, from the run.
    """
    outcome, near = simulate(logits, policy), near_threshold(logits, policy, TOLERANCE)
    gated.to(device)
    outputs, first, held = [], [], 0
    with torch.inference_mode():
        for images, _ in loader:
            if held < SINGLES:
                first.append(images[: SINGLES - held])
                held += len(first[-1])
            outputs.append(gated(images.to(device)))
        singles = [gated(image[None].to(device)) for images in first for image in images]
    gated.cpu()
    joined, alone = (
        GatedOutput(*(torch.cat(column) for column in zip(*some, strict=True))) for some in (outputs, singles)
    )
    return {**_compared(joined, outcome, near), "single": _compared(alone, outcome, near)}


def _compared(live: GatedOutput, outcome: Simulation, near: Tensor) -> dict[str, Any]:
    """How often the two differ, and where."""
    n = len(live.exit)
    same = live.exit.cpu() == outcome.exit[:n]
    differing = ~same | (live.logits.cpu().argmax(1) != outcome.prediction[:n])
    apart = (live.confidence.cpu().double() - outcome.confidence[:n].double()).abs()[same]
    return {
        "n": n,
        "differing": int(differing.sum()),
        "near_threshold": int(near[:n].sum()),
        "differing_elsewhere": int((differing & ~near[:n]).sum()),
        "tolerance": TOLERANCE,
        "max_confidence_difference": float(apart.max()) if len(apart) else 0.0,
    }
