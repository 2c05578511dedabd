"""Markdown tables of the result files: operators, engines, gates and peers.

Each function of :data:`TABLES` gets the content of a result file. Those of :data:`UNEXPLAINED` name the goals that the
table of the same name shows as missed without a note in notes.toml. The tables of runs are in aep_ext.report.tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks.aggregate import ResultError
from benchmarks.goals import Finding, cpu_findings, load_goals, load_notes

_MET = {True: "met", False: "**missed**", None: ""}
_NOT_EAGER = ("inductor", "reference", "published", "copy", "best_eager")
_BACKENDS = ("openvino", "onnxruntime", "inductor", "eager")
_GATED = {
    "gated_nobody_leaves": "nobody leaves",
    "gated_few_leave": "one image leaves",
    "gated_half_leave_at_the_first_exit": "half leave at the first exit",
    "gated_all_leave_at_the_first_exit": "all leave at the first exit",
}
PEER_FORMAT = "aep_ext.peer"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first ``left`` columns are aligned to the left."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * left + " ---: |" * (len(head) - left)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Two or three digits: what a paired ratio of a noisy machine can bear."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


def _interval(ends: Sequence[float], form: str = ".2f") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _size(text: str) -> str:
    size, *rest = text.split("-")
    return ", ".join([f"({size.replace('x', ', ')})", *rest])


def goals(result: dict[str, Any]) -> str:
    """Goal and result side by side; a miss with what bounds it."""

    def row(finding: Finding) -> list[str]:
        value = number(finding.value) + ("" if not finding.spread else f" (IQR {number(finding.spread)})")
        note = finding.note or ("unexplained" if finding.unexplained else "")
        met = _MET[finding.met] or "not measured"
        return [finding.goal.subject, _size(finding.case), finding.goal.text, finding.goal.bound, value, met, note]

    head = ["operator", "sizes", "against", "goal (stretch)", "result", "", "bounded by"]
    return markdown(head, [row(finding) for finding in cpu_findings(load_goals(), result, load_notes())], 7)


def _unexplained_goals(result: dict[str, Any]) -> Iterator[str]:
    for finding in cpu_findings(load_goals(), result, load_notes()):
        if finding.unexplained:
            yield f"{finding.goal.subject} {finding.case} {finding.goal.measure}"


def operators(result: dict[str, Any]) -> str:
    """Every case marked quick or goal: how many times as long the baselines take."""
    rows = []
    for name, case in result["cases"].items():
        if not case.get("marks") or "case" not in case:
            continue
        ratios = dict(case["paired_ratio"])
        if "naive" not in ratios:
            ratios["naive"] = max((ratios[n] for n in ratios if n not in _NOT_EAGER), default=None)
        label = _size(name.split("-", 1)[1].rstrip("]"))
        rows.append(
            [case["operator"], label, str(case["threads"]), number(case["median_us"]["fused"])]
            + [number(ratios.get(column)) for column in ("naive", "best_eager", "inductor", "reference")]
        )
    head = ["operator", "case", "threads", "fused, µs", "naive eager", "best eager", "torch.compile", "our fallback"]
    return markdown(head, sorted(rows, key=lambda row: row[:1]), 2)


def fallback(result: dict[str, Any]) -> str:
    """What the extension adds: the pure-torch reference's time over the native one's, and over best eager torch's."""
    found: dict[str, list[tuple[float, float | None]]] = {}
    for case in result["cases"].values():
        native = case["paired_ratio"].get("reference")
        if native is not None and case.get("marks"):
            eager = case["paired_ratio"].get("best_eager")
            found.setdefault(case["operator"], []).append((native, eager and native / eager))
    rows = []
    for operator, ratios in sorted(found.items()):
        eager = [ratio for _, ratio in ratios if ratio is not None]
        rows.append([operator, str(len(ratios)), _range([native for native, _ in ratios]), _range(eager)])
    return markdown(["operator", "cases", "reference / native, time", "reference / best eager, time"], rows, 1)


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


def _milliseconds(case: dict[str, Any], name: str) -> str:
    return number(case["median_us"][name] / 1000)


def _trunk_cases(result: dict[str, Any]) -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
    """For every network, size and batch of benchmarks/test_trunk.py the cases by their engine."""
    found: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for case in result["cases"].values():
        more = case["more"]
        if "network" in more:
            found.setdefault((more["network"], more["pixels"], more["batch"]), {})[more["backend"]] = case
    for key, cases in sorted(found.items()):
        yield [str(part) for part in key], cases


def _fastest_staged(cases: dict[str, dict[str, Any]]) -> str | None:
    """The engine that is held against the goal."""
    known = [name for name, case in cases.items() if "goal_met" in case["more"]]
    return min(known, key=lambda name: cases[name]["median_us"]["fused"], default=None)


def trunk(result: dict[str, Any]) -> str:
    """The fastest staged trunk against the faster of the two engines on the whole network, and the goal.

    A miss has its note in notes.toml, by the key ``trunk NETWORK PIXELS BATCH``.
    """
    rows, notes = [], load_notes()
    for about, cases in _trunk_cases(result):
        name = _fastest_staged(cases)
        if name is None:
            continue
        case, more = cases[name], cases[name]["more"]
        note = "" if more["goal_met"] else notes.get(" ".join(["trunk", *about]), "unexplained")
        rows.append(
            [
                *about,
                f"{number(more['best_engine_us'] / 1000)} ({more['best_engine']})",
                f"{_milliseconds(case, 'fused')} ({name})",
                _milliseconds(case, "with_heads"),
                f"{more['excess_percent']:+.1f} %",
                f"{more['excess_per_boundary_us']:+.0f}",
                _MET[more["goal_met"]],
                note,
            ]
        )
    head = ["network", "pixels", "batch", "whole network, ms", "staged trunk, ms", "with heads, ms"]
    return markdown([*head, "staged against whole", "µs per boundary", "goal", "bounded by"], rows, 1)


def _unexplained_trunk(result: dict[str, Any]) -> Iterator[str]:
    for about, cases in _trunk_cases(result):
        name, key = _fastest_staged(cases), " ".join(["trunk", *about])
        if name is not None and not cases[name]["more"]["goal_met"] and key not in load_notes():
            yield key


def engines(result: dict[str, Any]) -> str:
    """Every engine: the whole network, and the same cut into stages, in milliseconds; eager torch as it is."""
    rows = []
    for about, cases in _trunk_cases(result):
        eager = next((_milliseconds(case, "eager") for case in cases.values() if "eager" in case["median_us"]), "")
        cells = [
            f"{_milliseconds(cases[name], 'whole')} / {_milliseconds(cases[name], 'fused')}" if name in cases else ""
            for name in _BACKENDS
        ]
        rows.append([*about, eager, *cells])
    return markdown(["network", "pixels", "batch", "eager", *(f"{b}, whole / staged" for b in _BACKENDS)], rows, 1)


def _gated_cases(result: dict[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """The cases of benchmarks/test_gated.py: key in notes.toml, what each is about, and the case."""
    found = [case for case in result["cases"].values() if case.get("operator") in _GATED]
    for case in found:
        for name in ("network", "pixels", "engine", "batch"):
            if name not in case["more"]:
                raise ResultError(f"overhead: a case of {case['operator']} does not say its {name}")
    order = list(_GATED)
    for case in sorted(
        found, key=lambda c: (order.index(c["operator"]), *(c["more"][k] for k in ("network", "engine", "batch")))
    ):
        more, way = case["more"], case["operator"]
        about = [_GATED[way], more["network"], str(more["pixels"]), more["engine"], str(more["batch"])]
        yield f"{way} {more['network']} {more['engine']} {more['batch']}", about, case


def overhead(result: dict[str, Any]) -> str:
    """What the gates cost where hardly anybody leaves, with the goals; and what leaving gains."""
    costs, gains, notes = [], [], load_notes()
    for key, about, case in _gated_cases(result):
        more = case["more"]
        if "overhead_percent" in more:
            low, high = more["overhead_interval"]
            cost = f"{more['overhead_percent']:+.2f} [{low:+.2f}, {'?' if high is None else f'{high:+.2f}'}]"
            goal = f"<= {more['goal_percent']:g}" if "goal_percent" in more else ""
            note = notes.get(key, "unexplained") if more.get("goal_met") is False else ""
            costs.append([*about, cost, goal, _MET[more.get("goal_met")], note])
        else:
            gains.append([*about, *(_with_notch(case, n) for n in ("ungated", "stage_and_head", "mask", "naive"))])
    left, tables = ["case", "network", "pixels", "engine", "batch"], []
    if costs:
        tables.append(markdown([*left, "beyond the ungated network, %", "goal", "", "bounded by"], costs, 5))
    if gains:
        against = ["ungated", "bare stage and head", "all carried on", "a loop by hand"]
        tables.append(markdown([*left, *against], gains, 5))
    where = "Intervals are the notches around medians of paired rounds, about 95 %."
    if gains:
        where += " Below, times over the gated network's: above 1 it is faster." if costs else ""
    return "\n".join([where, "", *tables])


def _with_notch(case: dict[str, Any], name: str) -> str:
    """A paired ratio with its notch (see benchmarks/test_gated.py)."""
    ratio = case["paired_ratio"].get(name)
    if ratio is None:
        return ""
    notch = 1.57 * case["iqr"].get(name, 0.0) / math.sqrt(case["rounds"])
    return f"{ratio:.2f} {_interval((ratio - notch, ratio + notch))}"


def _unexplained_overhead(result: dict[str, Any]) -> Iterator[str]:
    for key, _, case in _gated_cases(result):
        if case["more"].get("goal_met") is False and key not in load_notes():
            yield key


def peer(result: dict[str, Any]) -> str:
    """Accuracy, cost and times of aep_ext's gates and another library's: what benchmarks/peers/earlyon.py wrote."""
    if result.get("format") != PEER_FORMAT:
        raise ResultError(f"not a comparison with another library (its format must be {PEER_FORMAT!r})")
    rows = []
    for name in ("aep_ext", "aep_calibrate", "earlyon"):
        if summary := result["summary"].get(name):
            macs, ungated = summary["mean_macs"]["mean"], summary["ungated_macs"]["mean"]
            points = 100 * (summary["top1"]["mean"] - summary["ungated_top1"]["mean"])
            accuracy = [_percent(summary[key]) for key in ("top1", "ungated_top1")]
            cost = [_millions(macs), _millions(ungated), f"{100 * (1 - macs / ungated):.1f} %"]
            title = {"aep_calibrate": "aep_ext, as `aep calibrate` delivers it"}.get(name, name)
            rows.append([title, *accuracy, f"{points:+.2f}", *cost])
    head = ["gates", "test top-1", "without gates", "points", "mean multiply-adds", "all without gates", "saving"]
    parts = [markdown(head, rows, 1), _peer_times(result["timed"]["rows"])]
    return "\n".join([*parts, *(f"- {line}" for line in _peer_notes(result))]) + "\n"


def _percent(spread: dict[str, Any]) -> str:
    std = "" if spread["std"] is None else f" ± {100 * spread['std']:.2f}"
    return f"{100 * spread['mean']:.2f}{std} %"


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g} M"


def _peer_times(batches: Sequence[dict[str, Any]]) -> str:
    rows = []
    for row in batches:
        for name, times in row["times"].items():
            ratio = row["ratios"].get(name)
            rows.append(
                [
                    str(row["batch"]),
                    name + (" (its quickest)" if name == row["quickest_earlyon"] else ""),
                    *(f"{times[key]:.4g}" for key in ("p50_ms", "p95_ms", "images_per_s")),
                    "" if ratio is None else f"{ratio['ratio']:.2f} {_interval(ratio['interval'])}",
                ]
            )
    head = ["batch", "network", "p50, ms", "p95, ms", "images/s", "time over that of aep_ext, gated"]
    return markdown(head, rows, 2)


def _peer_notes(result: dict[str, Any]) -> Iterator[str]:
    timed, seeds, where = result["timed"], [str(seed["seed"]) for seed in result["seeds"]], result["environment"]
    exits = "+".join(str(e + 1) for e in result["exits"])
    yield (
        f"{result['peer']['name']} {result['peer']['version']}; {result['network']}, exits {exits}, "
        f"{result['exit_weights']} exit weights, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}. Each may lose "
        f"{result['drop_points']:g} points against its own answer without gates: aep_ext's is the ensemble of all "
        "exits, earlyon's the last exit."
    )
    engine = f"; the engine is {timed['engine']}" if timed.get("engine") else ""
    yield (
        f"Times of seed {timed['seed']}, {timed['samples']:,} test images in turn, torch {where['torch']}, "
        f"{where['threads']} thread{'s' * (where['threads'] != 1)}{engine}; above 1 aep_ext is faster, intervals are "
        "of 95 %."
    )
    for row in timed["rows"]:
        if whole := row.get("earlyon_batched"):
            yield (
                f"earlyon's way for batches answers otherwise than image by image: at batch {row['batch']}, seed "
                f"{timed['seed']}, {100 * whole['top1']:.2f} % with {_millions(whole['mean_macs'])} multiply-adds."
            )


def curves(result: dict[str, Any]) -> str:
    """Accuracy of the exits and of the gated networks of a run, by benchmarks/curves.py; each with its mean cost."""
    methods = result["methods"]

    def cell(top1: float, cost: float) -> str:
        return f"{100 * top1:.2f} % ({100 * cost:.0f} %)"

    rows = [
        [f"exit {e + 1} alone", *(cell(m["exits"][e], m["costs"][e]) for m in methods)]
        for e in range(len(methods[0]["exits"]))
    ]
    for number, point in enumerate(methods[0]["gated"]):
        gated = [m["gated"][number] for m in methods]
        rows.append([f"gated, at most {100 * point['share']:.0f} %", *(cell(p["top1"], p["cost"]) for p in gated)])
    rows.append(["single exit", *(cell(m["single_exit"], 1) for m in methods)])
    return markdown([f"{result['images']:,} images", *(m["name"] for m in methods)], rows, 1)


TABLES = {
    "goals": goals,
    "operators": operators,
    "fallback": fallback,
    "machine": machine,
    "trunk": trunk,
    "engines": engines,
    "overhead": overhead,
    "peer": peer,
    "curves": curves,
}
UNEXPLAINED = {"goals": _unexplained_goals, "trunk": _unexplained_trunk, "overhead": _unexplained_overhead}
