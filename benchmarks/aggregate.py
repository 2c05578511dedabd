"""Result files: what is kept of every benchmark case, small enough to commit, one line for each case.

    {"format": 1,
     "machine": {...},
     "cases": {"test_ensemble_stats[cpu-4x64x100]": {
         "operator": "ensemble_stats", "case": {"size": "4x64x100", ...}, "marks": ["goal"], "threads": 1, "rounds": 51,
         "median_us": {"fused": 9.1, "eager": 61.0, ...}, "ratio": {...}, "paired_ratio": {...}, "iqr": {...},
         "more": {"gb_per_s": ..., "peak_over_logits": ..., ...}}},
     "skipped": {"test_trunk[resnet50-64px-batch1-inductor]": "why"}}

Every ratio is a baseline's time over the fused operator's; ``paired_ratio`` is the median over rounds of the ratio
within a round, ``iqr`` the distance between the quartiles of the same; ``ratio``, of the medians, stands where no
paired one does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aep_ext._io import write_text

FORMAT = 1
_PREFIXES = (("paired_ratio_", "paired_ratio"), ("ratio_", "ratio"), ("iqr_", "iqr"))
_PLAIN = ("operator", "case", "marks", "threads", "rounds")
_DROPPED = ("calls_per_round", "input_sets")


class ResultError(Exception):
    """A result file cannot be read or used; the message is one line."""


def _short(value: Any) -> Any:
    """Four significant digits: more would be noise, and bytes."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def aggregate_case(extra_info: dict[str, Any]) -> dict[str, Any]:
    """One case from its ``extra_info``."""
    case: dict[str, Any] = {"median_us": {}, "ratio": {}, "paired_ratio": {}, "iqr": {}, "more": {}}
    for key, value in extra_info.items():
        if key in _PLAIN:
            case[key] = value
        elif key.endswith("_median_us"):
            case["median_us"][key.removesuffix("_median_us")] = _short(value)
        elif found := next((entry for entry in _PREFIXES if key.startswith(entry[0])), None):
            case[found[1]][key.removeprefix(found[0])] = _short(value)
        elif key not in _DROPPED:
            case["more"][key] = _short(value)
    # Beside a paired ratio the ratio of the medians says nothing more.
    case["ratio"] = {name: value for name, value in case["ratio"].items() if name not in case["paired_ratio"]}
    return case


def open_result(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """The content of a result file, or that of a new one.

    Raises:
        ResultError: it is no result file, or comes from another machine, other versions or settings.
    """
    if not path.is_file():
        return {"format": FORMAT, "machine": machine, "cases": {}, "skipped": {}}
    result = load(path)
    if differ := machine_differences(result["machine"], machine):
        raise ResultError(f"{path.name} comes from different surroundings: {'; '.join(differ)}")
    return result


def machine_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, each as ``name: old, new``."""
    return [
        f"{key}: {old.get(key)!r}, {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def load(path: str | Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ResultError: it is not one.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT or "cases" not in result:
        raise ResultError(f"{path} is no benchmark result of format {FORMAT} (see benchmarks/aggregate.py)")
    return result


def save(path: str | Path, result: dict[str, Any]) -> None:
    """Writes a result file, whole or not at all, with one line for each case: a changed case is a changed line."""

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(f"{json.dumps(name)}: {json.dumps(entries[name])}" for name in sorted(entries))

    write_text(
        path,
        f'{{"format": {result["format"]},\n"machine": {json.dumps(result["machine"])},\n'
        f'"cases": {{\n{lines(result["cases"])}\n}},\n"skipped": {{\n{lines(result["skipped"])}\n}}}}\n',
    )
