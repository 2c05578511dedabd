"""``results.json`` of a run that never was: consistent, and plausible enough to draw."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

MACS = (5_000_000, 9_000_000, 12_500_000, 16_000_000)
PARAMETERS = (5_000, 20_000, 78_000, 310_000)
TEST, VAL = 1000, 500


def spread(values: Sequence[float]) -> dict[str, Any]:
    values = [float(value) for value in values]
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "values": values}


def counted(n: int, top1: float) -> dict[str, Any]:
    correct = round(n * top1)
    return {"n": n, "correct1": correct, "correct5": n, "top1": correct / n, "top5": 1.0}


def make_results(
    *, seeds: Sequence[int] = (0, 1), methods: Sequence[str] = ("mixed",), classes: int = 10, gates: bool = True
) -> dict[str, Any]:
    """A run of a network with four exits; ``gates`` and ``aep bench`` or neither of them."""
    trained = []
    for seed in seeds:
        parts = {name: _trained(seed, name, number, classes, gates) for number, name in enumerate(methods)}
        trained.append({"seed": seed, "baseline": _baseline(seed), "methods": parts})
    summary: dict[str, Any] = {"baseline": _model([seed["baseline"]["full"] for seed in trained]), "methods": {}}
    for name in methods:
        parts = [seed["methods"][name] for seed in trained]
        kinds = {kind: _model([part[kind] for part in parts]) for kind in ("full", "pruned")}
        kinds["smallest"] = _model([_network([2], 0.90)] * len(parts))
        kinds["gated"] = None
        if gates:
            networks = [
                {
                    "exits": part["gated"]["policy"]["exits"],
                    "parameters": 310_000,
                    "macs": test["mean_macs"],
                    "test": test,
                }
                for part in parts
                for test in [part["gated"]["test"]]
            ]
            saving = spread([1 - network["macs"] / MACS[-1] for network in networks])
            kinds["gated"] = {**_model(networks), "saving": saving, "feasible": len(parts)}
        for kind, model in kinds.items():
            if model:
                difference = model["top1"]["mean"] - summary["baseline"]["top1"]["mean"]
                model["non_inferiority"] = {
                    "difference": difference,
                    "low": difference - 0.004,
                    "high": difference + 0.004,
                    "margin": 0.005,
                    "confidence": 0.95,
                    "non_inferior": difference - 0.004 >= -0.005,
                }
                model["latency"] = {"mean": 0.5, "median": 0.48, "p95": 0.7, "ratio": 0.8 if kind == "gated" else 1.0}
        subsets = [[e for e in range(4) if mask >> e & 1] for mask in range(1, 16)]
        kinds["subsets"] = [_subset(exits, len(parts)) for exits in subsets]
        summary["methods"][name] = {**kinds, "exit_weights": {"loss": [0.25] * 4, "output": [0.25] * 4}}
    kind = "gated" if gates else "pruned"
    first = trained[0]["methods"][methods[0]]
    return {
        "format": "aep_ext.run",
        "version": 2,
        "config": {"data": "made", "margin": 0.5, "methods": list(methods), "seeds": list(seeds)},
        "recipe": {"name": "quick", "lr": 0.003},
        "environment": {"torch": "2", "device": "cpu", "threads": 1},
        "data": {
            "title": "made images",
            "classes": [f"class {number}" for number in range(classes)],
            "image_size": 8,
            "splits": {
                "train": {"samples": 2000},
                "val": {"samples": VAL},
                "test": {"samples": TEST},
                "calibration": None,
            },
        },
        "network": {"name": "resnet_small", "exits": 4},
        "calibration": {
            "budget": {"kind": "accuracy", "points": 0.5},
            "reference": "baseline",
            "criterion": "confidence",
            "criterion_on": "ensemble",
            "num_std_errors": 0.0,
            "images": "val",
            "samples": VAL,
        }
        if gates
        else None,
        "test_looks": 1,
        "notices": [],
        "seeds": trained,
        "summary": summary,
        "delivered": {
            "seed": seeds[0],
            "method": methods[0],
            "kind": kind,
            "exits": first["gated"]["policy"]["exits"] if gates else first["pruned"]["exits"],
            "notice": "",
        },
        "static": [
            {"name": "half width", "macs": 4_000_000, "parameters": 80_000, "top1": spread([0.85] * len(seeds))}
        ],
        "bench": make_bench() if gates else None,
    }


def _model(networks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "exits": [network["exits"] for network in networks],
        "parameters": spread([network["parameters"] for network in networks]),
        "macs": spread([network["macs"] for network in networks]),
        "top1": spread([network["test"]["top1"] for network in networks]),
        "top5": spread([network["test"]["top5"] for network in networks]),
        "val_top1": spread([network["test"]["top1"] for network in networks]),
    }


def _network(exits: list[int], top1: float) -> dict[str, Any]:
    last = exits[-1]
    return {
        "exits": exits,
        "parameters": PARAMETERS[last],
        "macs": MACS[last],
        "val": counted(VAL, top1),
        "test": counted(TEST, top1),
    }


def _training(top1: float, exits: int) -> dict[str, Any]:
    history = [
        {"val/top1": top1 - 0.2 / (epoch + 1)}
        | {f"val/exit{e}_top1": top1 - 0.4 / (epoch + e + 1) for e in range(exits)}
        for epoch in range(3)
    ]
    return {"epochs": 3, "best_epoch": 2, "stopped_early": False, "seconds": 4.5, "history": history}


def _baseline(seed: int) -> dict[str, Any]:
    top1 = 0.92 + 0.002 * seed
    full = _network([3], top1)
    return {
        "seed": seed,
        "name": "baseline",
        "training": _training(top1, 1),
        "full": full,
        "pruned": None,
        "gated": None,
    }


def _trained(seed: int, name: str, number: int, classes: int, gates: bool) -> dict[str, Any]:
    top1 = 0.925 + 0.002 * seed - 0.01 * number
    each = [{"exit": e, "macs": MACS[e], "test": counted(TEST, 0.6 + 0.1 * e)} for e in range(4)]
    return {
        "seed": seed,
        "name": name,
        "training": _training(top1, 4),
        "full": {**_network([0, 1, 2, 3], top1), "each_exit": each},
        "pruned": _network([1, 3] if seed else [3], top1 + 0.005),
        "gated": _gated(seed, classes) if gates else None,
    }


def _gated(seed: int, classes: int) -> dict[str, Any]:
    exits, random = [1, 2, 3], np.random.default_rng(seed)
    costs, label = [MACS[e] for e in exits], np.arange(TEST) % classes
    taken = random.choice(3, TEST, p=[0.5, 0.3, 0.2])
    right = random.random(TEST) < np.array([0.99, 0.9, 0.75])[taken]
    counts = np.bincount(taken, minlength=3)
    quality = {"ece": 0.05, "nll": 0.4, "brier": 0.2, "auroc": 0.85}
    compared = {"n": TEST, "differing": 0, "near_threshold": 1, "differing_elsewhere": 0, "tolerance": 1e-5}
    example = {"index": 3, "label": 0, "predicted": 0, "exit": 1, "confidence": 0.999}
    return {
        "feasible": True,
        "notice": "",
        "policy": {
            "output_weights": [0.1, 0.3, 0.6],
            "thresholds": [0.9, 0.7],
            "criterion": "confidence",
            "criterion_on": "ensemble",
            "temperatures": [1.1, 1.0, 0.9],
            "enabled": [True, True],
            "exits": exits,
        },
        "costs": costs,
        "parameters": 310_000,
        "calibration": {"n": VAL, "drop_points": 0.2, "std_error": 0.3, "interval": [-0.4, 0.8], "guarantee": None},
        "test": {
            **counted(TEST, right.mean()),
            "mean_macs": float(np.array(costs)[taken].mean()),
            "exit_counts": counts.tolist(),
        },
        "curve": [{"mean_macs": 9e6 + 1e6 * step, "test_top1": 0.8 + 0.02 * step} for step in range(7)],
        "per_class": [np.bincount(taken[label == number], minlength=3).tolist() for number in range(classes)],
        "right_by_exit": [[int(counts[e]), int(right[taken == e].sum())] for e in range(3)],
        "metrics": [
            {"exit": e, "temperature": 1.1, "before": quality, "after": {**quality, "ece": 0.01}} for e in exits
        ],
        "agreement": {**compared, "max_confidence_difference": 3e-7, "single": {**compared, "n": 256}},
        "examples": {"early": [example] * 3, "late": [{**example, "predicted": 1, "exit": 3, "confidence": None}] * 2},
    }


def _subset(exits: list[int], seeds: int) -> dict[str, Any]:
    top1 = spread([0.6 + 0.1 * exits[-1] + 0.005 * len(exits)] * seeds)
    last = exits[-1]
    costs = {"parameters": PARAMETERS[last], "macs": MACS[last] + len(exits)}
    return {"exits": exits, **costs, "top1": top1, "top5": None, "front": exits == list(range(last + 1))}


def make_bench() -> dict[str, Any]:
    def times(ms: float, batch: int) -> dict[str, float]:
        return {"p50_ms": ms, "p95_ms": 1.2 * ms, "p99_ms": 1.4 * ms, "images_per_s": 1000 * batch / ms}

    rows = [
        {
            "batch": batch,
            "ungated": times(batch**0.8, batch),
            "gated": times(batch**0.8 / ratio, batch),
            "ratio": ratio,
            "ratio_interval": [ratio - 0.02, ratio + 0.02],
            "predicted_ratio": 1.5,
            "share_of_predicted_saving": 0.7,
            "gates": batch == 1,
        }
        for batch, ratio in ((1, 1.4), (64, 1.0))
    ]
    return {
        "backend": "eager",
        "threads": 1,
        "samples": 512,
        "environment": {"torch": "2"},
        "rows": rows,
        "notices": [],
    }


def make_images(results: dict[str, Any], channels: int = 3) -> np.ndarray:
    """Images for the delivered model's examples: uint8 (n, 8, 8, channels)."""
    examples = results["seeds"][0]["methods"][results["delivered"]["method"]]["gated"]["examples"]
    count = len(examples["early"]) + len(examples["late"])
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
