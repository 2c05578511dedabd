"""From the trained models of a run to ``results.json``: means and spreads, paired intervals, what is delivered."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from aep_ext._config import CALIBRATION_FIELDS, RUNTIME_FIELDS, RunConfig
from aep_ext._version import __version__
from aep_ext.inference import ExitPolicy, simulate
from aep_ext.pruning import (
    MEASURES,
    SubsetCosts,
    SubsetScore,
    SubsetScores,
    exits_of_mask,
    mask_of_exits,
    non_inferiority_test,
    pareto_front,
    score_logits,
    smallest_non_inferior,
)
from aep_ext.training.data import ImageDataModule
from aep_ext.training.evaluate import right_answers
from aep_ext.training.folder import BASELINE, RunFolder

Latencies = Mapping[tuple[str, str], Mapping[str, float]]
"""Of one seed: for each model's name and kind of network its mean, median, p95 and ratio to the baseline's."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for a single value) of one figure over the seeds."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def _model(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One kind of network over all seeds. ``top1`` and ``top5`` are on the test images, ``val_top1`` on the validation
    images."""
    return {
        "exits": [row["exits"] for row in rows],
        "parameters": spread([row["parameters"] for row in rows]),
        "macs": spread([row["macs"] for row in rows]),
        "top1": spread([row["test"]["top1"] for row in rows]),
        "top5": spread([row["test"]["top5"] for row in rows]),
        "val_top1": spread([row["val"]["top1"] for row in rows]),
        "latency": None,
    }


def _scores(predictions: dict[str, Tensor], split: str, part: dict[str, Any]) -> SubsetScores:
    """Every subset's answers on one split, from the stored exit logits."""
    weights = torch.tensor(part["exit_weights"]["output"], dtype=torch.float32)
    costs = SubsetCosts(tuple(part["scores"]["parameters"]), tuple(part["scores"]["macs"]))
    logits, labels = predictions[f"{split}_logits"], predictions[f"{split}_labels"]
    return score_logits(logits, weights, labels, costs=costs, keep_correct=True, split=split)


def _smallest(
    parts: list[dict[str, Any]], predictions: list[dict[str, Tensor]], baselines: list[dict[str, Tensor]], margin: float
) -> dict[str, Any] | None:
    """The smallest ungated subset inside the margin: chosen on the validation images, judged on the test images."""
    val, test = (
        [_scores(arrays, split, part) for arrays, part in zip(predictions, parts, strict=True)]
        for split in ("val", "test")
    )
    reference = [right_answers(arrays["val_logits"][0], arrays["val_labels"]) for arrays in baselines]
    found = smallest_non_inferior(val, torch.stack(reference), margin)
    if found is None:
        return None
    score, _ = found
    rows = [
        {
            "exits": list(score.exits),
            "parameters": score.parameters,
            "macs": score.macs,
            "test": {"top1": on_test[score.mask].top1, "top5": on_test[score.mask].top5},
            "val": {"top1": on_val[score.mask].top1},
        }
        for on_test, on_val in zip(test, val, strict=True)
    ]
    answers = torch.stack([cast(Tensor, one.correct)[score.mask - 1] for one in test])
    baseline = torch.stack([arrays["test_correct_full"] for arrays in baselines])
    return {**_model(rows), "non_inferiority": non_inferiority_test(answers, baseline, margin).to_dict()}


def selected(
    config: RunConfig,
    part: dict[str, Any],
    predictions: dict[str, Tensor],
    baseline: dict[str, Any],
    baseline_predictions: dict[str, Tensor],
) -> tuple[dict[str, Any], SubsetScore]:
    """The ungated subset that is best for the run's objective on the validation images, against the single-exit network
    of its seed: an entry ``selected`` of a trained model, and the choice.

    Raises:
        ValueError: no subset meets the constraints.
    """
    scores, single = _scores(predictions, "val", part), baseline["full"]
    costs = SubsetCosts((single["parameters"],), (single["macs"],))
    logits, labels = (baseline_predictions[f"val_{what}"] for what in ("logits", "labels"))
    last = scores.num_exits - 1
    reference = score_logits(logits, [1.0], labels, costs=costs, exit_ids=[last], keep_correct=True, split="val")
    timed = SubsetScores.from_dict(part["scores"]).latency
    if timed:  # the last exit alone is the single-exit network
        alone = timed[(1 << last) - 1]
        scores, reference = replace(scores, latency=timed), replace(reference, latency=(alone,))
    chosen = scores.best(config.objective, constraints=config.constraints, reference=reference)
    on_test = _scores(predictions, "test", part)[chosen.mask]
    entry = {
        "exits": list(chosen.exits),
        "parameters": chosen.parameters,
        "macs": chosen.macs,
        "selection": chosen.selection,
    }
    for split, score in (("val", chosen), ("test", on_test)):
        entry[split] = {name: getattr(score, name) for name in ("n", "correct1", "correct5", "top1", "top5")}
    return entry, chosen


def _selected(
    parts: list[dict[str, Any]], predictions: list[dict[str, Tensor]], reference: Tensor, margin: float
) -> dict[str, Any] | None:
    """The chosen subsets of all seeds; None where a seed has none."""
    rows = [part.get("selected") for part in parts]
    if not all(rows):
        return None
    answers = [
        cast(Tensor, _scores(arrays, "test", part).correct)[mask_of_exits(part["selected"]["exits"]) - 1]
        for part, arrays in zip(parts, predictions, strict=True)
    ]
    compared = non_inferiority_test(torch.stack(answers), reference, margin).to_dict()
    return {**_model([row for row in rows if row]), "non_inferiority": compared}


def _subsets(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every subset with its costs and its accuracy on the validation images, over all seeds; ``front``: no other has as
    few multiply-adds and as high a top-1, and is better in one."""
    scores = [SubsetScores.from_dict(part["scores"]) for part in parts]
    pooled = SubsetScores.pooled(scores)
    front = {score.mask for score in pareto_front(pooled)}
    rows = []
    for mask in scores[0].masks:
        timed = [ms for score in scores if (ms := score[mask].latency_ms) is not None]
        rows.append(
            {
                "exits": list(exits_of_mask(mask)),
                "parameters": scores[0][mask].parameters,
                "macs": scores[0][mask].macs,
                "latency_ms": statistics.median(timed) if len(timed) == len(scores) else None,
                "top1": spread([score[mask].top1 for score in scores]),
                "top5": spread([score[mask].top5 for score in scores]),
                "nll": pooled[mask].nll,
                "front": mask in front,
            }
        )
    return rows


def _gated(
    parts: list[dict[str, Any]],
    predictions: list[dict[str, Tensor]],
    baselines: list[dict[str, Any]],
    reference: Tensor,
    margin: float,
) -> dict[str, Any]:
    """The gated networks of all seeds; ``macs`` are means over the test images."""
    rows, answers = [], []
    for part, arrays in zip(parts, predictions, strict=True):
        gated = part["gated"]
        policy = ExitPolicy.from_dict(gated["policy"])
        logits = arrays["test_logits"][list(policy.exits)]
        answers.append(cast(Tensor, simulate(logits, policy, target=arrays["test_labels"]).correct))
        rows.append({**gated, "exits": list(policy.exits), "macs": gated["test"]["mean_macs"]})
    costs = zip(rows, baselines, strict=True)
    return {
        **_model(rows),
        "non_inferiority": non_inferiority_test(torch.stack(answers), reference, margin).to_dict(),
        "saving": spread([1 - row["macs"] / baseline["full"]["macs"] for row, baseline in costs]),
        "feasible": sum(row["feasible"] for row in rows),
    }


def summarise(folder: RunFolder, seeds: list[dict[str, Any]], margin: float) -> dict[str, Any]:
    """Every kind of network over all seeds, without latencies.

    Args:
        seeds: for each seed ``{"seed", "baseline": part, "methods": {name: part}}``.
        margin: of non-inferiority, as a fraction of 1.
    """
    numbers = [entry["seed"] for entry in seeds]
    baselines = [entry["baseline"] for entry in seeds]
    answered = [folder.predictions(seed, BASELINE) for seed in numbers]
    reference = torch.stack([arrays["test_correct_full"] for arrays in answered])
    methods: dict[str, Any] = {}
    for name in seeds[0]["methods"]:
        parts = [entry["methods"][name] for entry in seeds]
        predictions = [folder.predictions(seed, name) for seed in numbers]
        methods[name] = {
            "subsets": _subsets(parts),
            "exit_weights": parts[0]["exit_weights"],
            "smallest": _smallest(parts, predictions, answered, margin),
            "selected": _selected(parts, predictions, reference, margin),
            "gated": None,
        }
        for kind in ("full", "pruned"):
            right = torch.stack([arrays[f"test_correct_{kind}"] for arrays in predictions])
            compared = non_inferiority_test(right, reference, margin).to_dict()
            methods[name][kind] = {**_model([part[kind] for part in parts]), "non_inferiority": compared}
        if parts[0]["gated"]:
            methods[name]["gated"] = _gated(parts, predictions, baselines, reference, margin)
    return {"baseline": _model([part["full"] for part in baselines]), "methods": methods}


def add_latencies(summary: dict[str, Any], timed: Sequence[Latencies]) -> None:
    """Fill in ``latency`` of every kind of network: the means over the seeds."""
    for name, kind in timed[0]:
        model = summary["baseline"] if name == BASELINE else summary["methods"][name][kind]
        names = ("mean", "median", "p95", "ratio")
        model["latency"] = {key: statistics.fmean(one[name, kind][key] for one in timed) for key in names}


def delivered(config: RunConfig, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Which network is delivered: of the methods whose gates keep the budget for most seeds, and then at the least
    mean cost, the seed with the highest top-1 on the calibration images. With the published objective, and where no
    gates keep the budget, the pruned network with the highest validation top-1. With another objective or constraints,
    of the subsets chosen for it the one that is best in it. The first of several."""
    models = [(entry["seed"], name, part) for entry in seeds for name, part in entry["methods"].items()]
    gated = [one for one in models if one[2]["gated"] and one[2]["gated"]["feasible"]]
    if config.objective == "gated" and gated:
        costs: dict[str, list[float]] = {}
        for _, name, part in gated:
            costs.setdefault(name, []).append(part["gated"]["calibration"]["mean_cost"])
        best = min(costs, key=lambda name: (-len(costs[name]), statistics.fmean(costs[name])))
        among = [one for one in gated if one[1] == best]
        seed, name, part = max(among, key=lambda one: one[2]["gated"]["calibration"]["correct"])
        kind, exits, notice = "gated", part["gated"]["policy"]["exits"], ""
    elif config.selects and (among := _with_selected(seeds, models)):
        objective = "top1" if config.objective == "published" else config.objective

        def quality(one: tuple[int, str, dict[str, Any]]) -> tuple[float, int]:
            chosen = one[2]["selected"]
            return MEASURES[objective] * chosen["selection"][objective], chosen["val"]["correct1"]

        seed, name, part = max(among, key=quality)
        kind, exits, notice = "selected", part["selected"]["exits"], ""
    else:
        seed, name, part = max(models, key=lambda one: one[2]["pruned"]["val"]["correct1"])
        kind, exits, notice = "pruned", part["pruned"]["exits"], ""
        if config.selects:
            notice = "no subset meets the constraints for every seed, so the published choice is delivered"
        if config.objective == "gated" and part["gated"]:
            notice = "no gates keep the budget, so the published choice is delivered"  # why is among the notices
    chosen = part[kind].get("selection")
    if kind == "gated":
        found = part["gated"]["calibration"]
        chosen = {
            **{"objective": "gated", "budget": found["budget"], "reference": config.reference, "exits": exits},
            **{name: found[name] for name in ("drop_points", "interval", "mean_cost", "data")},
        }
    return {"seed": seed, "method": name, "kind": kind, "exits": exits, "notice": notice, "selection": chosen}


def _with_selected(seeds: list[dict[str, Any]], models: list[tuple[int, str, Any]]) -> list[tuple[int, str, Any]]:
    """The trained models of the methods for which every seed has a chosen subset."""
    return [one for one in models if all(entry["methods"][one[1]].get("selected") for entry in seeds)]


def calibration_settings(config: RunConfig, data: ImageDataModule) -> dict[str, Any]:
    """What is asked of a calibration, as plain values."""
    values = config.to_dict()
    asked = {name: values[name] for name in CALIBRATION_FIELDS if name not in ("terminate", "risk", "delta")}
    if not config.constraints:  # an older calibration knew none
        del asked["constraints"]
    if config.risk is None:
        points = config.margin if config.budget is None else config.budget
        asked["budget"] = {"kind": "accuracy", "points": points}
    else:
        asked["budget"] = {"kind": "risk", "epsilon": config.risk, "delta": config.delta}
    split = data.calibration_split
    images = data.dataset(split) if data.skip_bad_images else data.splits.parts[split][1]
    return {**asked, "images": split, "samples": len(images)}


def notices(calibration: dict[str, Any] | None, seeds: list[dict[str, Any]], looks: int) -> list[str]:
    """What a reader of the figures must know."""
    lines = []
    if calibration:
        count = f"{calibration['samples']:,}"
        if calibration["images"] == "val":
            lines.append(
                f"gates were cross-validated on the {count} validation images, on which epochs and pruned subsets had "
                "been chosen before"
            )
        else:
            lines.append(f"gates were cross-validated on {count} held-out training images")
    for entry in seeds:
        for name, part in {BASELINE: entry["baseline"], **entry["methods"]}.items():
            where = f"seed {entry['seed']} / {name}"
            if part["training"].get("notice"):
                lines.append(f"{where}: WARNING: {part['training']['notice']}")
            if part.get("selected_notice"):
                lines.append(f"{where}: {part['selected_notice']}")
            if not part["gated"]:
                continue
            if not part["gated"]["feasible"]:
                lines.append(f"{where}: {part['gated']['notice']}")
            live = part["gated"]["agreement"]
            wrong = [one["differing_elsewhere"] for one in (live, live["single"])]
            if any(wrong):
                lines.append(
                    f"{where}: WARNING: the live network and the simulator differ on {wrong[0]} test images (one by "
                    f"one: {wrong[1]}) that are near no threshold"
                )
    if looks > 1:
        lines.append(
            f"{looks} calibrations of this run have looked at the test images: settings that were chosen knowing what "
            "others gave there make these figures optimistic"
        )
    return lines


def outcome_line(gated: dict[str, Any], baseline: dict[str, Any]) -> str:
    """A calibration in a line: exits, what it expects, test top-1 and mean multiply-adds beside the single-exit
    network's."""
    if not gated["feasible"]:
        return "no gates keep the budget"  # the outcome says why
    exits = "+".join(str(e + 1) for e in gated["policy"]["exits"])
    gain = 100 * (gated["test"]["top1"] - baseline["full"]["test"]["top1"])
    share = 100 * gated["test"]["mean_macs"] / baseline["full"]["macs"]
    found = gated["calibration"]
    high, low = (-bound + 0.0 for bound in found["interval"])
    expected = f"{-found['drop_points'] + 0.0:+.2f} [{low:+.2f}, {high:+.2f}] expected"
    return f"exits {exits} gated, {gain:+.2f} points ({expected}), {share:.0f} % of the baseline's multiply-adds"


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and threads."""
    return {
        "aep_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }


def public_config(config: RunConfig) -> dict[str, Any]:
    """The configuration without the paths of one machine, so that a result file can be shown to others."""
    values = {name: value for name, value in config.to_dict().items() if name not in RUNTIME_FIELDS}
    kind, colon, rest = config.data.rpartition(":")
    if "/" in rest or "\\" in rest:
        values["data"] = f"{kind}{colon}{Path(rest).name}"
    return values
