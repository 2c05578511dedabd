"""A run's results, made up: two seeds, two exits, names that an unwary page would take for markup."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

EVIL = "<script>alert('x')</script> & \"$\\bad$\" -->"


def spread(*values: float) -> dict[str, Any]:
    mean = sum(values) / len(values)
    std = (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5 if len(values) > 1 else None
    return {"mean": mean, "std": std, "values": list(values)}


def verdict(difference: float) -> dict[str, Any]:
    return {
        "difference": difference,
        "low": difference - 0.004,
        "high": difference + 0.004,
        "confidence": 0.95,
        "non_inferior": difference > -0.006,
    }


def _model(exits: Any, parameters: int, macs: int, *top1: float) -> dict[str, Any]:
    return {
        "exits": exits,
        "parameters": spread(*[parameters] * 2),
        "macs": spread(*[macs] * 2),
        "top1": spread(*top1),
        "top5": spread(1.0, 1.0),
        "select_top1": spread(*top1),
        "latency": {"median": macs / 1e7, "p95": macs / 8e6, "ratio": macs / 4e6},
        "verdict": verdict(top1[0] - 0.95),
    }


def _part(exits: int, top1: float) -> dict[str, Any]:
    def epoch(number: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "epoch": number,
            "seconds": 1.5,
            "val/loss": 1 / (number + 1),
            "val/top1": top1 - 0.1 / (number + 1),
        }
        for e in range(exits):
            row |= {
                f"val/exit{e}_loss": None if number == 0 else 1.5 / (number + e + 1),
                f"val/exit{e}_top1": top1 - 0.2 / (number + 1),
            }
        return row

    figures = {"n": 100, "correct1": round(100 * top1), "correct5": 100, "top1": top1, "top5": 1.0}
    return {
        "fit": {
            "epochs": 3,
            "best_epoch": 2,
            "stopped_early": False,
            "seconds": 4.5,
            "history": [epoch(n) for n in range(3)],
        },
        "exits": list(range(exits)),
        "parameters": 300_000,
        "macs": 4_000_000,
        "select": figures,
        "report": figures,
    }


def make_results() -> dict[str, Any]:
    """What ``results.json`` of a run with two seeds and MIX and DESC holds."""
    seeds, methods = [], {}
    for seed in (0, 1):
        part = _part(2, 0.95 + 0.01 * seed)
        both = {"fit": part["fit"], "full": part, "pruned": {**part, "exits": [seed], "macs": 2_000_000}}
        seeds.append(
            {"seed": seed, "baseline": _part(1, 0.94), "methods": {"mixed": both, "descending": copy.deepcopy(both)}}
        )
    subsets = [
        {
            "exits": exits,
            "parameters": parameters,
            "macs": macs,
            "latency_ms": macs / 1e7,
            "top1": spread(*top1),
            "top5": spread(1, 1),
        }
        for exits, parameters, macs, top1 in (
            ([0], 80_000, 2_000_000, (0.30, 0.35)),
            ([1], 299_000, 3_990_000, (0.95, 0.96)),
            ([0, 1], 300_000, 4_000_000, (0.96, 0.97)),
        )
    ]
    subsets[0]["latency_ms"] = None
    for family in ("mixed", "descending"):
        methods[family] = {
            "subsets": copy.deepcopy(subsets),
            "exit_weights": {"loss": [0.6, 0.4], "output": [0.4, 0.6]},
            "full": _model([[0, 1], [0, 1]], 300_000, 4_000_000, 0.95, 0.96),
            "pruned": _model([[0], [1]], 200_000, 3_000_000, 0.955, 0.955),
            "compact": _model([1], 299_000, 3_990_000, 0.94, 0.95) if family == "mixed" else None,
        }
    roles = {role: {"samples": 1000, "sha256": "0" * 64} for role in ("fit", "select", "report")}
    recipe = {
        "name": "quick",
        "optimizer": "adam",
        "lr": 0.003,
        "weight_decay": 0.01,
        "schedule": "cosine",
        "batch_size": 64,
        "epochs": 3,
        "patience": 12,
    }
    return {
        "format": "aep_ext.run",
        "version": 1,
        "config": {"recipe": "quick", "margin": 1.0, "data": EVIL},
        "recipe": recipe,
        "environment": {"torch": "2", "device": "cpu", "threads": 1},
        "network": {"name": EVIL, "exits": 2},
        "data": {"title": EVIL, "image_size": 8, "roles": roles, "classes": [EVIL]},
        "seeds": seeds,
        "summary": {"baseline": _model([[1], [1]], 299_000, 4_000_000, 0.94, 0.96), "methods": methods},
        "delivered": {"seed": 0, "exit_weights": "mixed", "exits": [0]},
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def folder(tmp_path: Path, results: dict[str, Any]) -> Path:
    """A folder with these results and nothing else."""
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path
