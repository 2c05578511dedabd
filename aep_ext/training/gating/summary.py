"""Over all seeds: what the gates do, on which images they were chosen, and which one is delivered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aep_ext.training.data import ImageDataModule
from aep_ext.training.gating.choice import subset_cache
from aep_ext.training.gating.decide import data_rows
from aep_ext.training.gating.figures import Gate
from aep_ext.training.gating.settings import FOLDS, CalibrationSettings
from aep_ext.training.gating.unit import Unit
from aep_ext.training.splits import split_sha256
from aep_ext.training.summary import spread
from aep_ext.training.verdict import paired_verdict


def data_roles(
    calibration: Tensor, images: str, data: ImageDataModule, settings: CalibrationSettings, judged: int
) -> dict[str, Any]:
    """Which images were used for what, and what must be said of that.

    Args:
        calibration: indices of the calibration images in their source.
        images: "select" or "spare": which images these are.
        data: the run's images.
        judged: how often calibrations of this run have looked at the test images.
    """
    _, report = data.roles.parts["report"]
    rows = data_rows(len(calibration), settings)
    used = {name: {"samples": len(part), "sha256": split_sha256(calibration[part])} for name, part in rows.items()}
    count = {name: f"{len(part):,}" for name, part in rows.items()}
    pool = {"select": "images to select on", "spare": "training images that the run left aside"}[images]
    notices = [
        f"temperatures were fitted on {count['temperatures']} of the {pool}, the gated exits and "
        f"their thresholds chosen on {count['thresholds']} others by {FOLDS}-fold cross-validation"
        + (
            f", with {settings.caution:g} standard error{'s' * (settings.caution != 1)} of the drop "
            "added before it was held against the budget"
            if settings.caution
            else ""
        ),
    ]
    if images == "select":
        notices.append("epochs and pruned subsets had been chosen on all images to select on before")
    if "test" in rows:
        notices.append(
            f"the guarantee was tested on {count['test']} more"
            + (
                "; its premise, images that had no part in anything before, holds but for the choice of epoch and "
                "pruned subset"
                if images == "select"
                else ""
            )
        )
    if judged > 1:
        notices.append(
            f"the test images were looked at {judged} times by calibrations of this run: settings that were "
            "chosen knowing what others gave there make these figures optimistic"
        )
    report_identity = {"samples": len(report), "sha256": split_sha256(report)}
    return {**used, "images": images, "report": report_identity, "shared": False, "notices": notices, "judged": judged}


def delivered(units: list[Unit], parts: list[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Which gated network is delivered: that of the network which the run delivers, or, where it has no gate, the one
    that is right most often on the images to select on; None where nothing is gated."""
    ranked = [
        (
            (unit.seed, unit.name) == (wanted["seed"], wanted["exit_weights"]),
            part["select"]["gated_correct"] / part["select"]["n"],
            -number,
            unit,
        )
        for number, (unit, part) in enumerate(zip(units, parts, strict=True))
        if part["gated"]
    ]
    if not ranked:
        return None
    unit = max(ranked, key=lambda entry: entry[:3])[3]
    return {"seed": unit.seed, "exit_weights": unit.name, "folder": "gated"}


def method_summary(units: list[Unit], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and spreads over the seeds; the drop pooled over seeds and images."""
    reports = [part["report"] for part in parts]
    gates = [Gate.from_part(part) for part in parts]
    gated = [
        gate.simulate(subset_cache(unit.report, gate.exits, gate.weights)).correct
        for gate, unit in zip(gates, units, strict=True)
    ]
    pruned = [unit.right("report", unit.pruned_exits) for unit in units]
    verdict = paired_verdict(torch.stack(gated), torch.stack(pruned), 0.005)
    return {
        "gated": sum(part["gated"] for part in parts),
        "gated_top1": spread([report["gated"]["top1"] for report in reports]),
        "pruned_top1": spread([report["pruned"]["top1"] for report in reports]),
        "mean_macs": spread([report["gated"]["mean_macs"] for report in reports]),
        "pruned_macs": spread([report["pruned"]["macs"] for report in reports]),
        "saving": spread([1 - report["gated"]["mean_macs"] / report["pruned"]["macs"] for report in reports]),
        "drop_points": {
            "mean": 100 * verdict["difference"],
            "interval": [100 * verdict["low"], 100 * verdict["high"]],
            "confidence": verdict["confidence"],
            "values": [report["drop_points"] for report in reports],
        },
    }
