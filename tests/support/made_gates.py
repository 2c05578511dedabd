"""``gates.json``, ``gates_examples.npz`` and ``bench.json`` of a run that never was, in the format of ``aep calibrate``
and ``aep bench``: consistent, and plausible enough to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def spread(values: Sequence[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": [float(value) for value in values]}


def make_gates(
    *,
    families: Sequence[str] = ("mixed",),
    seeds: Sequence[int] = (0,),
    exits: Sequence[int] = (0, 1, 3),
    classes: int = 10,
    images: int = 2000,
    static: int = 2,
    matched: int | None = 1,
    budget: float = 0.5,
) -> dict[str, Any]:
    """A gate of a network with four exits; ``static`` networks, of which ``matched`` is the index of the one that is
    not worse."""
    methods = {}
    for number, family in enumerate(families):
        rows = [_seed(seed, number, list(exits), classes, images) for seed in seeds]
        reports = [row["report"] for row in rows]
        saving = [1 - report["gated"]["mean_macs"] / report["pruned"]["macs"] for report in reports]
        drop = float(np.mean([report["drop_points"] for report in reports]))
        methods[family] = {
            "seeds": rows,
            "summary": {
                "gated": len(rows),
                "gated_top1": spread([report["gated"]["top1"] for report in reports]),
                "pruned_top1": spread([report["pruned"]["top1"] for report in reports]),
                "mean_macs": spread([report["gated"]["mean_macs"] for report in reports]),
                "saving": spread(saving),
                "drop_points": {"mean": drop, "interval": [drop - 0.22, drop + 0.22], "confidence": 0.95},
            },
            "matched": matched,
        }
    networks = []
    for number in range(static):
        values = [0.865 + 0.072 * number + 0.001 * seed for seed in seeds]
        networks.append(
            {
                "name": f"resnet_small at width {0.5 + 0.25 * number:g}",
                "macs": 11_000_000 + 11_000_000 * number,
                "parameters": 80_000 * (number + 1),
                "seeds": [{"seed": seed, "top1": value} for seed, value in zip(seeds, values, strict=True)],
                "top1": spread(values),
            }
        )
    return {
        "format": "aep_ext.gates",
        "version": 1,
        "settings": {"policy": "confidence", "budget": {"kind": "accuracy", "points": budget}, "seed": 0},
        "data": {
            **{
                role: {"samples": samples, "sha256": "0" * 64}
                for role, samples in (("temperatures", 1000), ("thresholds", 4000), ("report", images))
            },
            "shared": False,
            "notices": ["thresholds were chosen by cross-validation"],
            "judged": 1,
        },
        "methods": methods,
        "static": networks,
        "static_notice": "",
        "matched": matched,
        "delivered": {"seed": seeds[0], "exit_weights": families[0], "folder": "gated"},
    }


def _seed(seed: int, family: int, exits: list[int], classes: int, images: int) -> dict[str, Any]:
    random = np.random.default_rng([seed, family])
    macs = np.array([9_000_000, 21_000_000, 31_000_000, 40_000_000])
    single = np.clip(np.array([0.62, 0.80, 0.882, 0.904]) + random.normal(0, 0.004, 4), 0, 1)
    count, costs = len(exits), macs[exits]
    labels = np.arange(images) % classes
    hard = np.clip(random.beta(1.2, 1.6, images) + 0.35 * (labels / classes - 0.5), 0, 0.999)
    taken = np.minimum((hard * count).astype(int), count - 1)
    right = random.random(images) < np.array([0.985, 0.93, 0.83, 0.75])[:count][taken]
    counts = np.bincount(taken, minlength=count)
    pruned = float(np.mean(right)) + round(0.002 * images) / images
    grid = np.linspace(0, 1, 60)
    first, last = np.flatnonzero(taken == 0)[:8], np.flatnonzero(taken == count - 1)[:8]
    drop = 100 * (float(right.mean()) - pruned)

    def quality(exit_id: int, after: bool) -> dict[str, float]:
        return {
            "ece": 0.021 if after else 0.064 + 0.003 * exit_id,
            "nll": 0.41 - 0.01 * exit_id - 0.03 * after,
            "brier": 0.19 - 0.01 * exit_id - 0.01 * after,
            "auroc": 0.861 + 0.01 * exit_id,
        }

    def example(row: int) -> dict[str, Any]:
        label = int(labels[row])
        return {
            "index": int(row),
            "label": label,
            "predicted": label if right[row] else (label + 1) % classes,
            "exit": exits[taken[row]],
            "confidence": float(1 - hard[row] / 2),
        }

    compared = {"differing": 0, "near_threshold": 3, "differing_elsewhere": 0, "tolerance": 1e-5}
    return {
        "seed": seed,
        "gated": True,
        "notice": "",
        "exits": exits,
        "policy": {"name": "confidence", "on": "ensemble"},
        "thresholds": [0.91 - 0.02 * k for k in range(count - 1)],
        "temperatures": [1.21 - 0.05 * k for k in range(count)],
        "enabled": [True] * (count - 1),
        "output_weights": [(e + 1) / 10 for e in exits],
        "costs": [int(cost) for cost in costs],
        "pruned_exits": [3],
        "guarantee": None,
        "select": {"n": 4000, "gated_correct": 3600, "pruned_correct": 3612, "full_correct": 3608, "mean_macs": 2e7},
        "report": {
            "n": images,
            "gated": {
                "top1": float(right.mean()),
                "top5": 0.99,
                "mean_macs": float(costs[taken].mean()),
                "exit_counts": counts.tolist(),
            },
            "pruned": {"top1": pruned, "macs": int(macs[3])},
            "full": {"top1": pruned - 0.003, "macs": int(macs[3]) + 200_000},
            "baseline": {"top1": pruned - 0.012 + 0.001 * seed, "macs": 39_900_000},
            "each_exit": [{"exit": e, "top1": float(single[e]), "macs": int(macs[e])} for e in range(4)],
            "drop_points": drop,
            "drop_interval": [drop - 0.4, drop + 0.4],
        },
        "curve": [
            {
                "mean_macs": float(costs[0] + x * (costs[-1] - costs[0])),
                "select_top1": 0.62 + 0.29 * (1 - (1 - x) ** 10),
                "report_top1": float(0.62 + (pruned - 0.62) * (1 - (1 - x) ** 10) + random.normal(0, 0.0006)),
            }
            for x in grid
        ],
        "per_class": [np.bincount(taken[labels == k], minlength=count).tolist() for k in range(classes)],
        "right_by_exit": [[int(counts[k]), int(right[taken == k].sum())] for k in range(count)],
        "calibration": [
            {
                "exit": e,
                "temperature": 1.21 - 0.05 * k,
                "converged": True,
                "before": quality(e, False),
                "after": quality(e, True),
            }
            for k, e in enumerate(exits)
        ],
        "agreement": {
            "n": images,
            **compared,
            "max_confidence_difference": 3.1e-7,
            "single": {"n": 256, **compared, "max_confidence_difference": 2.9e-7},
        },
        "examples": {"first": [example(row) for row in first], "last": [example(row) for row in last]},
    }


def make_examples(gates: dict[str, Any], side: int = 32, channels: int = 3) -> np.ndarray:
    """Images for the first seed of the first method: uint8 (n, side, side, channels)."""
    examples = next(iter(gates["methods"].values()))["seeds"][0]["examples"]
    count = len(examples["first"]) + len(examples["last"])
    across = np.linspace(0, 255, side)
    random = np.random.default_rng(0)
    noise = random.normal(0, np.linspace(5, 60, count)[:, None, None, None], (count, side, side, channels))
    return np.clip(across[None, None, :, None] + noise, 0, 255).astype(np.uint8)


def make_bench(batches: Sequence[int] = (1, 8, 64, 256)) -> dict[str, Any]:
    """Measurements at some batch sizes; gains shrink as batches grow."""
    rows = []
    for number, batch in enumerate(batches):
        ratio, base = 1.52 - 0.13 * number, 1.9 * batch**0.8
        times = {
            kind: {
                "p50_ms": time,
                "p95_ms": 1.21 * time,
                "p99_ms": 1.4 * time,
                "images_per_s": 1000 * batch / (1.03 * time),
            }
            for kind, time in (("ungated", base), ("gated", base / ratio))
        }
        rows.append(
            {
                "batch": batch,
                **times,
                "ratio": ratio,
                "ratio_interval": [ratio - 0.02, ratio + 0.02],
                "predicted_ratio": 1.56,
                "share_of_predicted_saving": (1 - 1 / ratio) / (1 - 1 / 1.56),
                "mean_exit": 1.7,
            }
        )
    return {
        "format": "aep_ext.bench",
        "environment": {"torch": "2"},
        "samples": 2048,
        "engine": "eager",
        "threads": 1,
        "rows": rows,
    }
