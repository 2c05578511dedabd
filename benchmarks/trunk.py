"""Tables of the trunk on inference engines (results of benchmarks/test_trunk.py, condensed)."""

from __future__ import annotations

from typing import Any

from benchmarks.goals import load_notes
from benchmarks.table_text import markdown, number

_BACKENDS = ("openvino", "onnxruntime", "inductor", "eager")
Key = tuple[str, int, int]  # network, pixels, batch


def _by_network(result: dict[str, Any]) -> dict[Key, dict[str, dict[str, Any]]]:
    """For every network, size and batch the cases by their engine."""
    found: dict[Key, dict[str, dict[str, Any]]] = {}
    for case in result["cases"].values():
        more = case["more"]
        if "network" in more:
            found.setdefault((more["network"], more["pixels"], more["batch"]), {})[more["backend"]] = case
    return dict(sorted(found.items()))


def _milliseconds(case: dict[str, Any], contestant: str) -> str:
    return number(case["median_us"][contestant] / 1000)


def against_goal(result: dict[str, Any]) -> str:
    """The quickest staged trunk against the faster of the two engines on the whole network, and the goal.

    The goal: within 3 %, or 30 microseconds for each boundary between stages, whichever is larger. A miss has its note
    in notes.toml, by the key ``trunk NETWORK PIXELS BATCH``.
    """
    notes = load_notes()
    rows = []
    for (network, pixels, batch), cases in _by_network(result).items():
        judged = {name: case for name, case in cases.items() if "goal_met" in case["more"]}
        if not judged:
            continue
        name = min(judged, key=lambda name: judged[name]["median_us"]["fused"])
        case, more = judged[name], judged[name]["more"]
        key = f"trunk {network} {pixels} {batch}"
        note = "" if more["goal_met"] else notes.get(key, "unexplained")
        rows.append(
            [
                network,
                str(pixels),
                str(batch),
                f"{number(more['best_engine_us'] / 1000)} ({more['best_engine']})",
                f"{_milliseconds(case, 'fused')} ({name})",
                _milliseconds(case, "with_heads"),
                f"{more['excess_percent']:+.1f} %",
                f"{more['excess_per_boundary_us']:+.0f}",
                "met" if more["goal_met"] else "**missed**",
                note,
            ]  # fmt: skip
        )
    head = ["network", "pixels", "batch", "whole network, ms", "staged trunk, ms", "with heads, ms"]
    head += ["staged against whole", "µs per boundary", "goal", "bounded by"]
    return markdown(head, rows, 1)


def engines(result: dict[str, Any]) -> str:
    """Every engine: the whole network, and the same cut into stages, in milliseconds; eager torch as it is."""
    rows = []
    for (network, pixels, batch), cases in _by_network(result).items():
        eager = next((_milliseconds(c, "eager") for c in cases.values() if "eager" in c["median_us"]), "")
        cells = [
            f"{_milliseconds(cases[name], 'whole')} / {_milliseconds(cases[name], 'fused')}" if name in cases else ""
            for name in _BACKENDS
        ]
        rows.append([network, str(pixels), str(batch), eager, *cells])
    return markdown(["network", "pixels", "batch", "eager", *(f"{b}, whole / staged" for b in _BACKENDS)], rows, 1)


def unexplained(result: dict[str, Any]) -> list[str]:
    """The keys of the misses without a note."""
    notes = load_notes()
    missed = []
    for (network, pixels, batch), cases in _by_network(result).items():
        judged = [case for case in cases.values() if "goal_met" in case["more"]]
        key = f"trunk {network} {pixels} {batch}"
        if judged and not min(judged, key=lambda c: c["median_us"]["fused"])["more"]["goal_met"] and key not in notes:
            missed.append(key)
    return missed
