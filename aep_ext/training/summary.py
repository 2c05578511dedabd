"""From the finished parts of a run to ``results.json``: means and spreads, verdicts, latencies, what is delivered."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aep_ext import __version__
from aep_ext._io import read_arrays
from aep_ext.pruning import SubsetScores, exits_of_mask, prune, score_logits, single_exit
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.training.config import RunConfig
from aep_ext.training.data import ImageDataModule
from aep_ext.training.evaluate import latency_in_turn
from aep_ext.training.folder import BASELINE, RunFolder
from aep_ext.training.verdict import paired_verdict, smallest_within_margin

FORMAT = "aep_ext.run"
VERSION = 1


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value) of one figure over the seeds."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _model(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One kind of model over all seeds. ``top1`` and ``top5`` are on the test images, ``select_top1`` on the validation
    images."""
    return {
        "exits": [outcome["exits"] for outcome in outcomes],
        "parameters": spread([outcome["parameters"] for outcome in outcomes]),
        "macs": spread([outcome["macs"] for outcome in outcomes]),
        "top1": spread([outcome["report"]["top1"] for outcome in outcomes]),
        "top5": spread([outcome["report"]["top5"] for outcome in outcomes]),
        "select_top1": spread([outcome["select"]["top1"] for outcome in outcomes]),
    }


def _scores(predictions: dict[str, Any], role: str, part: dict[str, Any]) -> SubsetScores:
    """Every subset's answers on one role's images, from the stored exit logits."""
    stored = SubsetScores.from_dict(part["scores"])
    logits, labels = (torch.from_numpy(predictions[f"{role}_{what}"]) for what in ("logits", "labels"))
    weights = torch.tensor(part["exit_weights"]["output"], dtype=torch.float32)
    scores = score_logits(logits, weights, labels, keep_correct=True)
    return SubsetScores(
        scores.counts, scores.n, stored.exit_ids, parameters=stored.parameters, macs=stored.macs, correct=scores.correct
    )


def _stack(arrays: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(array) for array in arrays])


def _baseline_right(predictions: dict[str, Any], role: str) -> Tensor:
    """Whether the single-exit network (its output weight is 1) is right on each image of a role."""
    logits, labels = (torch.from_numpy(predictions[f"{role}_{what}"]) for what in ("logits", "labels"))
    correct = score_logits(logits, [1.0], labels, keep_correct=True).correct
    assert correct is not None
    return correct[0]


def _compact(
    parts: list[dict[str, Any]], predictions: list[dict[str, Any]], baselines: list[dict[str, Any]], margin: float
) -> dict[str, Any] | None:
    """The smallest subset inside the margin: chosen on the images to select on, judged on those to report on."""
    found = smallest_within_margin(
        [_scores(arrays, "select", part) for arrays, part in zip(predictions, parts, strict=True)],
        _stack([_baseline_right(arrays, "select") for arrays in baselines]),
        margin,
    )
    if found is None:
        return None
    score, chosen_by = found
    report = [_scores(arrays, "report", part) for arrays, part in zip(predictions, parts, strict=True)]
    select = [_scores(arrays, "select", part) for arrays, part in zip(predictions, parts, strict=True)]
    answers = _stack([one.correct[score.mask - 1] for one in report])  # type: ignore[index]
    outcomes = [
        {
            "exits": list(score.exits),
            "parameters": score.parameters,
            "macs": score.macs,
            "report": {"top1": on_report[score.mask].top1, "top5": on_report[score.mask].top5},
            "select": {"top1": on_select[score.mask].top1},
        }
        for on_report, on_select in zip(report, select, strict=True)
    ]
    judged = paired_verdict(answers, _stack([_baseline_right(arrays, "report") for arrays in baselines]), margin)
    return {**_model(outcomes), "exits": list(score.exits), "select_verdict": chosen_by, "verdict": judged}


def _subsets(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every subset with its costs and its accuracy on the images to select on, over all seeds."""
    scores = [SubsetScores.from_dict(part["scores"]) for part in parts]
    first = scores[0]
    assert first.macs is not None and first.parameters is not None
    rows = []
    for mask in first.masks:
        timed = [score[mask].latency_ms for score in scores]
        rows.append(
            {
                "exits": list(exits_of_mask(mask)),
                "parameters": first.parameters[mask - 1],
                "macs": first.macs[mask - 1],
                "latency_ms": statistics.median(timed) if all(value is not None for value in timed) else None,
                "top1": spread([score[mask].top1 for score in scores]),
                "top5": spread([score[mask].top5 for score in scores]),
            }
        )
    return rows


def _latencies(
    structure: MultiExitNet, subsets: Sequence[tuple[int, ...]], shape: tuple[int, int, int], device: torch.device
) -> dict[tuple[int, ...], dict[str, float]]:
    """Latency of the baseline (key: the empty tuple), the full network and some subsets, taking turns."""
    everything = tuple(range(structure.num_exits))
    nets = {"baseline": single_exit(structure), "full": structure}
    nets.update({str(exits): prune(structure, exits) for exits in subsets if exits != everything})
    timed = latency_in_turn(nets, shape, device)
    return {
        (): timed["baseline"],
        everything: timed["full"],
        **{exits: timed[str(exits)] for exits in subsets if exits != everything},
    }


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "aep_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }


def _public_config(config: RunConfig) -> dict[str, Any]:
    """The configuration without the paths of one machine, so that a result file can be shown to others."""
    values = config.to_dict()
    for name in ("output", "data_root", "workers", "threads", "device"):
        values.pop(name)
    kind, colon, rest = config.data.rpartition(":")
    if "/" in rest or "\\" in rest:
        values["data"] = f"{kind}{colon}{Path(rest).name}"
    return values


def summarise(
    config: RunConfig,
    data: ImageDataModule,
    folder: RunFolder,
    structure: MultiExitNet,
    seeds: list[dict[str, Any]],
    device: torch.device,
    *,
    class_weight: Tensor | None,
) -> dict[str, Any]:
    """Everything that the report shows, as plain values.

    Args:
        structure: the network, trained or not: latency does not depend on its numbers.
        seeds: for each seed ``{"seed", "baseline": part, "methods": {name: part}}``.
    """
    margin = config.margin / 100
    numbers = [seed["seed"] for seed in seeds]
    baselines = [read_arrays(folder.unit(seed, BASELINE) / "predictions.npz") for seed in numbers]
    reference = _stack([arrays["report_right_full"] for arrays in baselines])
    methods: dict[str, Any] = {}
    for name in config.exit_weights:
        parts = [seed["methods"][name] for seed in seeds]
        predictions = [read_arrays(folder.unit(seed, name) / "predictions.npz") for seed in numbers]
        methods[name] = {
            "subsets": _subsets(parts),
            "exit_weights": parts[0]["exit_weights"],
            "compact": _compact(parts, predictions, baselines, margin),
        }
        for kind in ("full", "pruned"):
            right = _stack([arrays[f"report_right_{kind}"] for arrays in predictions])
            methods[name][kind] = {
                **_model([part[kind] for part in parts]),
                "verdict": paired_verdict(right, reference, margin),
            }
    summary = {"baseline": _model([seed["baseline"] for seed in seeds]), "methods": methods}
    _add_latencies(summary, structure, (data.channels, data.image_size, data.image_size), device)
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": _public_config(config),
        "recipe": asdict(config.training()),
        "environment": _environment(device),
        "data": {**_public_data(data, config), "class_weight": None if class_weight is None else class_weight.tolist()},
        "network": {"name": config.network, "exits": structure.num_exits},
        "summary": summary,
        "seeds": seeds,
        "delivered": _delivered(seeds),
    }


def _public_data(data: ImageDataModule, config: RunConfig) -> dict[str, Any]:
    return {**data.describe(), "spec": _public_config(config)["data"]}


def _add_latencies(
    summary: dict[str, Any], structure: MultiExitNet, shape: tuple[int, int, int], device: torch.device
) -> None:
    """Fill in ``latency`` for every model; the pruned networks of several seeds may be different subsets."""
    wanted = {tuple(exits) for method in summary["methods"].values() for exits in method["pruned"]["exits"]}
    wanted |= {tuple(method["compact"]["exits"]) for method in summary["methods"].values() if method["compact"]}
    timed = _latencies(structure, sorted(wanted), shape, device)
    summary["baseline"]["latency"] = _latency([timed[()]])
    for method in summary["methods"].values():
        method["full"]["latency"] = _latency([timed[tuple(range(structure.num_exits))]])
        method["pruned"]["latency"] = _latency([timed[tuple(exits)] for exits in method["pruned"]["exits"]])
        if method["compact"]:
            method["compact"]["latency"] = _latency([timed[tuple(method["compact"]["exits"])]])


def _latency(measured: list[dict[str, float]]) -> dict[str, float]:
    """The mean over the seeds' networks of their batch-1 latency in ms, and of their ratio to the baseline's."""
    return {name: statistics.fmean(one[name] for one in measured) for name in ("median", "p95", "ratio")}


def _delivered(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The pruned network with the highest top-1 on the images to select on; the first of several."""
    best = max(
        (
            (part["pruned"]["select"]["correct1"], -order, seed["seed"], name)
            for order, (seed, name, part) in enumerate(
                (seed, name, part) for seed in seeds for name, part in seed["methods"].items()
            )
        )
    )
    _, _, number, name = best
    part = next(seed for seed in seeds if seed["seed"] == number)["methods"][name]
    return {"seed": number, "exit_weights": name, "exits": part["pruned"]["exits"]}
