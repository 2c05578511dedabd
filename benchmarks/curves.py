"""Accuracy against cost of the gated networks of a finished run, on its validation images, from the stored logits.

    python -m benchmarks.curves RUN benchmarks/results/NAME.json

For every method and a row of mean costs, as shares of the single-exit baseline's multiply-adds, exits, output weights,
temperatures and thresholds are fitted on the run's calibration images (``--calibration-samples``) and applied to its
validation images, on which nothing but the epoch was chosen. The test images are not looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aep_ext._io import write_json
from aep_ext.calibration import CachedLogits, CostBudget, calibrate
from aep_ext.inference import simulate
from aep_ext.pruning.subsets import mask_of_exits
from aep_ext.report import read_results

SHARES = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def curves(run: Path) -> dict[str, Any]:
    """What :func:`main` writes."""
    results = read_results(run / "results.json")
    found: list[dict[str, Any]] = []
    for entry in results["seeds"]:
        folder = run / f"seed-{entry['seed']}"
        with np.load(folder / "baseline" / "predictions.npz") as stored:
            single = float((stored["val_logits"][-1].argmax(1) == stored["val_labels"]).mean())
        base = entry["baseline"]["full"]["macs"]
        for name, part in entry["methods"].items():
            with np.load(folder / name / "predictions.npz") as stored:
                given = {key: torch.from_numpy(stored[key]) for key in stored if key.endswith(("logits", "labels"))}
            costs, exits = part["scores"]["macs"], len(given["val_logits"])
            cached = CachedLogits(given["calibration_logits"], given["calibration_labels"], role="calibration")
            points = []
            for share in SHARES:
                policy = calibrate(cached, costs=costs, budget=CostBudget(mean=share * base)).policy
                kept = list(policy.exits)
                by_exit = [costs[mask_of_exits(kept[: k + 1]) - 1] for k in range(len(kept))]
                outcome = simulate(given["val_logits"][kept], policy, target=given["val_labels"], costs=by_exit)
                points.append({"share": share, "cost": outcome.mean_cost / base, "top1": outcome.accuracy})
            alone = (given["val_logits"].argmax(2) == given["val_labels"]).double().mean(1).tolist()
            prefix = [costs[mask_of_exits([e]) - 1] / base for e in range(exits)]
            method = {"seed": entry["seed"], "name": name, "exits": alone, "costs": prefix, "gated": points}
            found.append({"single_exit": single, **method})
    return {
        "config": results["config"],
        "network": results["network"]["name"],
        "images": len(given["val_labels"]),
        "methods": found,
    }


def main(argv: list[str]) -> None:
    """The command line: the run's folder and the result file."""
    run, target = map(Path, argv)
    content = curves(run)
    write_json(target, content)


if __name__ == "__main__":
    main(sys.argv[1:])
