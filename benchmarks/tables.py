"""Markdown tables of a benchmark result (the JSON of condense.py)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import trunk
from benchmarks.goals import Verdict, judge, load_goals, load_notes
from benchmarks.table_text import markdown, number

_MET = {True: "met", False: "**missed**", None: "not measured"}


def _size(text: str) -> str:
    size, *rest = text.split("-")
    return ", ".join([f"({size.replace('x', ', ')})", *rest])


def goals(result: dict[str, Any]) -> str:
    """Goal and result side by side; a miss with what bounds it."""

    def row(verdict: Verdict) -> list[str]:
        goal, spread = verdict.goal, verdict.spread
        value = number(verdict.value) + ("" if not spread else f" (IQR {number(spread)})")
        note = verdict.note or ("unexplained" if verdict.unexplained else "")
        return [goal.operator, _size(goal.case), goal.against, goal.text, value, _MET[verdict.met], note]

    head = ["operator", "sizes", "against", "goal (stretch)", "result", "", "bounded by"]
    return markdown(head, [row(verdict) for verdict in judge(load_goals(), result, load_notes())], 7)


def operators(result: dict[str, Any]) -> str:
    """Every case marked quick or goal: how many times as long the rivals take."""
    columns = ("naive", "best_eager", "inductor", "reference")
    rows = []
    for name, case in result["cases"].items():
        if not case.get("marks") or "case" not in case:
            continue
        ratios = dict(case["paired_ratio"])
        if "naive" not in ratios:
            ratios["naive"] = max((case["paired_ratio"][n] for n in _eager(case)), default=None)
        label = _size(name.split("-", 1)[1].rstrip("]"))
        rows.append(
            [case["operator"], label, str(case["threads"]), number(case["median_us"]["fused"])]
            + [number(ratios.get(column)) for column in columns]
        )
    head = ["operator", "case", "threads", "fused, µs", "naive eager", "best eager", "torch.compile", "our fallback"]
    return markdown(head, sorted(rows, key=lambda row: row[:1]), 2)


def _eager(case: dict[str, Any]) -> list[str]:
    return [n for n in case["paired_ratio"] if n not in ("inductor", "reference", "published", "copy", "best_eager")]


def fallback(result: dict[str, Any]) -> str:
    """What the extension adds: the pure-torch reference's time over the native one's, and over best eager torch's."""
    operators: dict[str, list[tuple[float, float | None]]] = {}
    for case in result["cases"].values():
        native = case["paired_ratio"].get("reference")
        if native is not None and case.get("marks"):
            eager = case["paired_ratio"].get("best_eager")
            operators.setdefault(case["operator"], []).append((native, eager and native / eager))
    rows = []
    for operator, found in sorted(operators.items()):
        native = [entry[0] for entry in found]
        eager = [entry[1] for entry in found if entry[1] is not None]
        rows.append([operator, str(len(found)), _range(native), _range(eager)])
    head = ["operator", "cases", "reference / native, time", "reference / best eager, time"]
    return markdown(head, rows, 1)


def _range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def machine(result: dict[str, Any]) -> str:
    """Where the numbers come from, in one line."""
    m = result["machine"]
    allocator = m.get("allocator", "default")
    if isinstance(allocator, dict):
        allocator = ", ".join(f"{name}={value}" for name, value in allocator.items())
    bandwidths: dict[tuple[int, str], list[float]] = {}
    for case in result["cases"].values():
        for kind in ("read", "copy"):
            if (value := case["more"].get(f"{kind}_gb_per_s")) is not None:
                bandwidths.setdefault((case["threads"], kind), []).append(value)
    memory = "; ".join(
        f"{kind} with {threads} thread{'s' * (threads > 1)} {statistics.median(values):.0f} GB/s"
        for (threads, kind), values in sorted(bandwidths.items())
    )
    memory = f"; memory as measured in the same runs: {memory}" if memory else ""
    return (
        f"{m['processor']}, {m['cores_used']} of {m['cores']} cores, {m['isa_in_use'] or 'no'} kernels, "
        f"torch {m['torch']}, allocator: {allocator}{memory}.\n"
    )


TABLES = {
    "goals": goals,
    "operators": operators,
    "fallback": fallback,
    "machine": machine,
    "trunk": trunk.against_goal,
    "engines": trunk.engines,
}
