"""Reading ``gates.json``, ``gates_examples.npz`` and ``bench.json`` of a run folder: whole and consistent, or a clear
error."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from aep_ext._io import read_arrays, read_json
from aep_ext._utils import UserError
from aep_ext.report.shape import (
    COUNT,
    FLAG,
    FRACTION,
    INTERVAL,
    NOT_NEGATIVE,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    Each,
    Maybe,
    check,
    misfit,
)

GATES_FORMAT, GATES_VERSION = "aep_ext.gates", 1
BENCH_FORMAT = "aep_ext.bench"

_SPREAD = {"mean": NUMBER, "std": Maybe(NOT_NEGATIVE, absent=False), "values": Each(NUMBER)}
_MODEL = {"top1": FRACTION, "macs": POSITIVE}
_DATA = {"samples": COUNT}
_EXAMPLE = {"label": COUNT, "predicted": COUNT, "exit": COUNT, "confidence": Maybe(NUMBER, absent=False)}
_QUALITY = {"ece": Maybe(NUMBER), "nll": Maybe(NUMBER), "brier": Maybe(NUMBER), "auroc": Maybe(NUMBER)}
_AGREEMENT = {
    "n": COUNT,
    "differing": COUNT,
    "near_threshold": COUNT,
    "differing_elsewhere": COUNT,
    "tolerance": NOT_NEGATIVE,
    "max_confidence_difference": Maybe(NOT_NEGATIVE),
}
_SEED = {
    "seed": COUNT,
    "exits": Each(COUNT),
    "policy": OBJECT,
    "thresholds": Each(Maybe(NUMBER), empty=True),
    "temperatures": Each(POSITIVE),
    "enabled": Each(FLAG, empty=True),
    "costs": Each(POSITIVE),
    "pruned_exits": Each(COUNT),
    "report": {
        "n": COUNT,
        "gated": {"top1": FRACTION, "mean_macs": POSITIVE, "exit_counts": Each(COUNT)},
        "pruned": _MODEL,
        "full": _MODEL,
        "baseline": _MODEL,
        "each_exit": Each({"exit": COUNT, **_MODEL}),
        "drop_points": NUMBER,
        "drop_interval": INTERVAL,
    },
    "gated": Maybe(FLAG),
    "notice": Maybe(TEXT),
    "guarantee": Maybe({"text": TEXT}),
    "curve": Each({"mean_macs": POSITIVE, "report_top1": FRACTION}, empty=True),
    "per_class": Each(Each(COUNT)),
    "right_by_exit": Each(Each(COUNT)),
    "calibration": Each(
        {"exit": COUNT, "temperature": POSITIVE, "converged": Maybe(FLAG), "before": _QUALITY, "after": _QUALITY}
    ),
    "agreement": {**_AGREEMENT, "single": Maybe(_AGREEMENT)},
    "examples": {"first": Each(_EXAMPLE, empty=True), "last": Each(_EXAMPLE, empty=True)},
}
_GATES = {
    "settings": {
        "policy": TEXT,
        "budget": {
            "kind": TEXT,
            **{name: Maybe(NUMBER) for name in ("points", "epsilon", "delta", "mean", "fraction")},
        },
    },
    "data": {
        "temperatures": _DATA,
        "thresholds": _DATA,
        "report": _DATA,
        "shared": FLAG,
        "notices": Each(TEXT, empty=True),
        "judged": COUNT,
    },
    "methods": Each(
        {
            "seeds": Each(_SEED),
            "summary": {
                "gated_top1": _SPREAD,
                "pruned_top1": _SPREAD,
                "mean_macs": _SPREAD,
                "saving": _SPREAD,
                "drop_points": {"mean": NUMBER, "interval": INTERVAL, "confidence": Maybe(FRACTION)},
            },
            "matched": Maybe(COUNT),
        },
        dict,
    ),
    "static": Each({"name": TEXT, "macs": POSITIVE, "seeds": Each({"top1": FRACTION}), "top1": _SPREAD}, empty=True),
    "static_notice": Maybe(TEXT),
    "matched": Maybe(COUNT),
    "delivered": Maybe({"seed": COUNT, "exit_weights": TEXT}),
}
_TIMES = {"p50_ms": POSITIVE, "p95_ms": POSITIVE, "p99_ms": POSITIVE, "images_per_s": POSITIVE}
_BENCH = {
    "samples": COUNT,
    "engine": TEXT,
    "threads": COUNT,
    "rows": Each(
        {
            "batch": COUNT,
            "ungated": _TIMES,
            "gated": _TIMES,
            "ratio": POSITIVE,
            "ratio_interval": INTERVAL,
            "predicted_ratio": Maybe(POSITIVE),
            "share_of_predicted_saving": Maybe(NUMBER),
        }
    ),
}


def read_gates(folder: str | Path, name: str = "gates.json") -> dict[str, Any] | None:
    """The content of ``gates.json``, or of a copy of that ``name``; None where there is none.

    Raises:
        UserError: it is not such a file, not complete, or contradicts itself.
    """
    path = Path(folder) / name
    if not path.exists():
        return None
    gates = read_json(path)
    if not isinstance(gates, dict) or gates.get("format") != GATES_FORMAT:
        raise UserError(f"{path} is not a file of gates (its format must be {GATES_FORMAT!r})")
    if gates.get("version") != GATES_VERSION:
        raise misfit(
            str(path), "version", f"{GATES_VERSION}, the one this version of aep_ext reads", gates.get("version")
        )
    check_gates(gates, str(path))
    return gates


def check_gates(gates: Any, where: str = "gates.json") -> None:
    """Compare with the format of ``gates.json`` and its entries with each other.

    Raises:
        UserError: a place has another shape, or entries contradict each other.
    """
    check(gates, _GATES, where)
    for family, method in gates["methods"].items():
        for index, seed in enumerate(method["seeds"]):
            _check_seed(seed, where, f"methods.{family}.seeds[{index}]")
        for name in ("gated_top1", "pruned_top1", "mean_macs", "saving"):
            values = method["summary"][name]["values"]
            if len(values) != len(method["seeds"]):
                rule = f"{len(method['seeds'])} numbers, one a seed"
                raise misfit(where, f"methods.{family}.summary.{name}.values", rule, values)
        _check_matched(method, gates["static"], where, f"methods.{family}.matched")
    _check_matched(gates, gates["static"], where, "matched")
    delivered = gates.get("delivered")
    if delivered and find_seed(gates, delivered) is None:
        raise misfit(where, "delivered", "one of the seeds of one of the methods", delivered)


def _check_matched(part: dict[str, Any], static: list[Any], where: str, place: str) -> None:
    matched = part.get("matched")
    if matched is not None and matched >= len(static):
        raise misfit(where, place, f"null or the index of one of the {len(static)} static networks", matched)


def _check_seed(seed: dict[str, Any], where: str, place: str) -> None:
    count, report = len(seed["exits"]), seed["report"]
    sizes = {
        "thresholds": count - 1,
        "enabled": count - 1,
        "temperatures": count,
        "costs": count,
        "right_by_exit": count,
    }
    for name, size in sizes.items():
        if len(seed[name]) != size:
            raise misfit(where, f"{place}.{name}", f"{size} entries for {count} gated exits", seed[name])
    counts = report["gated"]["exit_counts"]
    if len(counts) != count or sum(counts) != report["n"]:
        rule = f"{count} counts that add up to the {report['n']} test images"
        raise misfit(where, f"{place}.report.gated.exit_counts", rule, counts)
    for number, row in enumerate(seed["per_class"]):
        if len(row) != count:
            raise misfit(where, f"{place}.per_class[{number}]", f"{count} counts, one for each gated exit", row)
    columns = [sum(column) for column in zip(*seed["per_class"], strict=True)]
    if columns != counts:
        raise misfit(where, f"{place}.per_class", f"counts that add up to {counts} over the classes", columns)
    for number, row in enumerate(seed["right_by_exit"]):
        if len(row) != 2 or row[1] > row[0]:
            raise misfit(where, f"{place}.right_by_exit[{number}]", "[images, right ones among them]", row)
    # The sign of a difference is the easiest thing to get wrong, so it is held against the two accuracies.
    expected = 100 * (report["gated"]["top1"] - report["pruned"]["top1"])
    if abs(report["drop_points"] - expected) > 0.005:
        rule = f"{expected:.4g}, the points of top-1 of gated minus pruned"
        raise misfit(where, f"{place}.report.drop_points", rule, report["drop_points"])


def find_seed(gates: dict[str, Any], named: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of the network with the ``seed`` and the ``exit_weights`` of ``named``; None where there is none."""
    seeds = gates["methods"].get(named["exit_weights"], {"seeds": []})["seeds"]
    return next((seed for seed in seeds if seed["seed"] == named["seed"]), None)


def read_examples(folder: str | Path, examples: dict[str, list[Any]]) -> np.ndarray | None:
    """The example images, uint8 (n, H, W, C) with C 1 or 3: those that left first, then those that left last. None
    where the file is not there.

    Args:
        folder: the run.
        examples: what ``gates.json`` says of them.

    Raises:
        UserError: the file is no such archive, or holds another number of images than ``gates.json`` names.
    """
    path = Path(folder) / "gates_examples.npz"
    if not path.exists():
        return None
    try:
        images = read_arrays(path)["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an archive with an array 'images': {error}") from error
    count = len(examples["first"]) + len(examples["last"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) != count:
        raise UserError(
            f"{path}: images must be uint8 of shape ({count}, H, W, 1 or 3), as many as gates.json names, "
            f"got {images.dtype} of shape {images.shape}"
        )
    return images


def read_bench(folder: str | Path, name: str = "bench.json") -> dict[str, Any] | None:
    """The content of ``bench.json``, or of a copy of that ``name``; None where there is none.

    Raises:
        UserError: it is not such a file, or not complete.
    """
    path = Path(folder) / name
    if not path.exists():
        return None
    bench = read_json(path)
    if not isinstance(bench, dict) or bench.get("format") != BENCH_FORMAT:
        raise UserError(f"{path} is not a file of measurements (its format must be {BENCH_FORMAT!r})")
    check(bench, _BENCH, str(path))
    return bench
