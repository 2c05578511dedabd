"""From pytest-benchmark's JSON to a result file that is small enough to commit: one line for each case.

    python benchmarks/aggregate.py RAW.json RESULT.json

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
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext._io import write_text  # noqa: E402

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


def aggregate(raw: dict[str, Any]) -> dict[str, Any]:
    """The result of one run of pytest-benchmark, without the machine's name.

    Raises:
        ResultError: two cases have the same name.
    """
    cases: dict[str, Any] = {}
    for benchmark in raw["benchmarks"]:
        if benchmark["name"] in cases:
            raise ResultError(f"aggregate: two cases are called {benchmark['name']}")
        cases[benchmark["name"]] = aggregate_case(benchmark["extra_info"])
    info = raw["machine_info"]
    machine = {key: info.get(key) for key in ("system", "machine", "python_version")} | info.get("aep_ext", {})
    return {"format": FORMAT, "machine": machine, "cases": cases, "skipped": {}}


def merge(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the cases of ``new``.

    Raises:
        ResultError: they come from different machines, versions or settings.
    """
    if old is None:
        return new
    differ = machine_differences(old["machine"], new["machine"])
    if differ:
        raise ResultError(f"merge: the results come from different surroundings: {'; '.join(differ)}")
    cases = old["cases"] | new["cases"]
    skipped = {name: why for name, why in (old["skipped"] | new["skipped"]).items() if name not in cases}
    return {"format": FORMAT, "machine": new["machine"], "cases": cases, "skipped": skipped}


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


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 2:
        print("usage: aggregate.py RAW.json RESULT.json", file=sys.stderr)
        return 2
    try:
        save(arguments[1], aggregate(json.loads(Path(arguments[0]).read_text(encoding="utf-8"))))
    except (OSError, ValueError, KeyError, ResultError) as error:
        print(f"aggregate: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
