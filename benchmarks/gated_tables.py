"""Markdown tables of gated networks, each from one file in benchmarks/results:

- ``gates``: the ``gates.json`` of ``aep calibrate`` (as benchmarks/keep.py keeps it): accuracy and multiply-adds;
- ``bench``: the ``bench.json`` of ``aep bench``: latency and throughput;
- ``peer``: what benchmarks/peers/earlyon.py wrote: another library's gates on the same network;
- ``overhead``: what benchmarks/matrix.py wrote of benchmarks/test_gated.py: the cost of the gates themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aep_ext._io import read_json
from aep_ext._utils import UserError
from aep_ext.report.gates_file import read_bench, read_gates
from aep_ext.report.gates_tables import BENCH_HEAD, SUMMARY_HEAD, bench_rows, gates_rows
from aep_ext.report.gates_words import agreement_words, allowed_points, data_words, policy_words, rivals_words
from aep_ext.report.numbers import amount, exits, method_name, percent, percent_spread
from aep_ext.report.shape import COUNT, FRACTION, INTERVAL, NUMBER, POSITIVE, TEXT, Each, Maybe, check
from benchmarks.condense import ResultError, load
from benchmarks.goals import load_notes
from benchmarks.table_text import markdown

PEER_FORMAT = "aep_ext.peer"
_PEER_SPREAD = {"mean": NUMBER, "std": Maybe(NUMBER, absent=False)}
_PEER_SUMMARY = {name: _PEER_SPREAD for name in ("top1", "ungated_top1", "mean_macs", "ungated_macs")}
_PEER = {
    "peer": {"name": TEXT, "version": TEXT},
    "environment": {"torch": TEXT, "threads": COUNT},
    "network": TEXT,
    "exits": Each(COUNT),
    "exit_weights": TEXT,
    "drop_points": NUMBER,
    "summary": {"aep_ext": _PEER_SUMMARY, "earlyon": _PEER_SUMMARY, "aep_calibrate": Maybe(_PEER_SUMMARY)},
    "seeds": Each({"seed": COUNT}),
    "timed": {
        "seed": COUNT,
        "samples": COUNT,
        "engine": Maybe(TEXT),
        "rows": Each(
            {
                "batch": COUNT,
                "times": Each({"p50_ms": POSITIVE, "p95_ms": POSITIVE, "images_per_s": POSITIVE}, dict),
                "ratios": Each({"ratio": POSITIVE, "interval": INTERVAL}, dict),
                "quickest_earlyon": TEXT,
                "earlyon_batched": Maybe({"top1": FRACTION, "mean_macs": POSITIVE}),
            }
        ),
    },
}
# Who stands in the result of benchmarks/peers/earlyon.py.
_CONTESTANTS = {
    "aep_ext": "aep_ext, gated",
    "aep_calibrate": "aep_ext, as `aep calibrate` delivers it",
    "aep_ext_on_engine": "aep_ext, gated, on the engine",
    "aep_calibrate_on_engine": "as `aep calibrate` delivers it, on the engine",
    "ensemble": "aep_ext, all exits, no gates",
    "last_exit": "the last exit alone, no gates",
    "earlyon_wrapper": "earlyon, its wrapper",
    "earlyon_staged": "earlyon, staged",
    "earlyon_batched": "earlyon, its way for batches",
    "earlyon_staged_one_by_one": "earlyon, staged, image by image",
}
_WAYS = {
    "gated_nobody_leaves": "nobody leaves",
    "gated_nobody_leaves_by_method": "nobody leaves, method `gated`",
    "gated_few_leave": "one image leaves",
    "gated_half_leave_at_the_first_exit": "half leave at the first exit",
    "gated_all_leave_at_the_first_exit": "all leave at the first exit",
}


def gates(path: Path) -> str:
    """Each method's gated network beside the pruned ensemble, all exits, the baseline and the static networks."""
    found = read_gates(path.parent, path.name)
    assert found is not None  # ``made`` has looked
    tables = [markdown(SUMMARY_HEAD, gates_rows(found, family)[0], 2) for family in found["methods"]]
    lines = [policy_words(found), data_words(found)]
    for family, method in found["methods"].items():
        lines += _of_budget(found, family, method)
        lines.append(agreement_words(family, method))
        lines += [f"{method_name(family)}: {line}" for line in rivals_words(found, method)]
    lines += [f"Roles of the images: {'; '.join(found['data']['notices'])}."] if found["data"]["notices"] else []
    if found["data"]["shared"]:
        lines.append("Images that the gates were chosen on are also reported on: the figures are optimistic.")
    return "\n".join([*tables, *(f"- {line}" for line in lines)]) + "\n"


def _of_budget(found: dict[str, Any], family: str, method: dict[str, Any]) -> Iterator[str]:
    """Whether the test images bear the budget out."""
    allowed, drop, name = allowed_points(found), method["summary"]["drop_points"], method_name(family)
    apart = [seed["seed"] for seed in method["seeds"] if not seed.get("gated", True)]
    if apart:
        yield f"{name}: not gated, the pruned ensemble stays: seed {', '.join(map(str, apart))}."
    if allowed is None:
        return
    low, high = drop["interval"]
    kept, sure = drop["mean"] >= -allowed, (low >= -allowed if drop["mean"] >= -allowed else high < -allowed)
    yield (
        f"{name}: the mean difference on the test images, {drop['mean']:+.2f} points, "
        f"{'keeps' if kept else '**exceeds**'} the budget of {allowed:g}"
        f"{'' if sure else f'; its interval [{low:+.2f}, {high:+.2f}] leaves that open'}."
    )


def bench(path: Path) -> str:
    """Ungated and gated, batch by batch, and where that was measured."""
    found = read_bench(path.parent, path.name)
    assert found is not None
    threads, where = found["threads"], found.get("environment", {})
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "machine") if name in where)
    lines = [
        f"Engine: {found['engine']}, {threads} thread{'s' * (threads != 1)}; {found['samples']:,} test images"
        f"{f'; {versions}' if versions else ''}. The ratio is the pruned ensemble's time for all batches over the "
        "gated network's, with a 95 % interval; what is predicted comes from the stages' own times and the exits taken."
    ]
    beside = [
        f"{row['subset_ratio']:.3f} {_interval(row['subset_ratio_interval'], '.3f')} at batch {row['batch']}"
        for row in found["rows"]
        if row.get("subset_ratio") is not None
    ]
    if beside:
        lines.append(f"Ratio against the gated network's own exits without gates: {', '.join(beside)}.")
    lines += [f"{notice[:1].upper()}{notice[1:].rstrip('.')}." for notice in found.get("notices", [])]
    return "\n".join([markdown(BENCH_HEAD, bench_rows(found), 2), *(f"- {line}" for line in lines)]) + "\n"


def peer(path: Path) -> str:
    """Accuracy and cost of aep_ext's and earlyon's gates, and their times at every batch size."""
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != PEER_FORMAT:
        raise ResultError(f"{path} is no comparison with another library (its format must be {PEER_FORMAT!r})")
    check(found, _PEER, str(path))
    return "\n".join([_peer_figures(found), _peer_times(found), *(f"- {line}" for line in _peer_lines(found))]) + "\n"


def _peer_figures(found: dict[str, Any]) -> str:
    rows = []
    for name in ("aep_ext", "aep_calibrate", "earlyon"):
        figures = found["summary"].get(name)
        if figures:
            macs, ungated = figures["mean_macs"]["mean"], figures["ungated_macs"]["mean"]
            rows.append(
                [
                    _CONTESTANTS.get(name, name),
                    percent_spread(figures["top1"]),
                    percent_spread(figures["ungated_top1"]),
                    f"{100 * (figures['top1']['mean'] - figures['ungated_top1']['mean']):+.2f}",
                    amount(macs),
                    amount(ungated),
                    f"{100 * (1 - macs / ungated):.1f} %",
                ]
            )
    head = ["gates", "test top-1", "without gates", "points", "mean multiply-adds", "all without gates", "saving"]
    return markdown(head, rows, 1)


def _peer_times(found: dict[str, Any]) -> str:
    rows = []
    for row in found["timed"]["rows"]:
        for name, times in row["times"].items():
            against = row["ratios"].get(name)
            rows.append(
                [
                    str(row["batch"]),
                    _CONTESTANTS.get(name, name) + (" (its quickest)" if name == row["quickest_earlyon"] else ""),
                    *(f"{times[key]:.4g}" for key in ("p50_ms", "p95_ms", "images_per_s")),
                    "" if against is None else f"{against['ratio']:.2f} {_interval(against['interval'])}",
                ]
            )
    head = ["batch", "contestant", "p50, ms", "p95, ms", "images/s", "time over that of aep_ext, gated"]
    return markdown(head, rows, 2)


def _peer_lines(found: dict[str, Any]) -> Iterator[str]:
    timed, seeds, where = found["timed"], [seed["seed"] for seed in found["seeds"]], found["environment"]
    several = "s" * (len(seeds) > 1)
    yield (
        f"{found['peer']['name']} {found['peer']['version']}; {found['network']}, exits {exits(found['exits'])}, "
        f"{method_name(found['exit_weights'])}, seed{several} {', '.join(map(str, seeds))}. Each may lose "
        f"{found['drop_points']:g} points against its own answer without gates: aep_ext's is the ensemble of all "
        "exits, earlyon's the last exit."
    )
    engine = f"; the engine is {timed['engine']}" if timed.get("engine") else ""
    yield (
        f"Times of seed {timed['seed']}, {timed['samples']:,} test images in turn, torch {where['torch']}, "
        f"{where['threads']} thread{'s' * (where['threads'] != 1)}{engine}; above 1 aep_ext is faster, intervals are "
        "of 95 %."
    )
    for row in timed["rows"]:
        whole = row.get("earlyon_batched")
        if whole:
            yield (
                f"earlyon's way for batches answers otherwise than image by image: at batch {row['batch']}, seed "
                f"{timed['seed']}, {percent(whole['top1'])} with {amount(whole['mean_macs'])} multiply-adds."
            )


def _interval(ends: Sequence[float], form: str = ".2f") -> str:
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def overhead(path: Path) -> str:
    """What the gates cost where hardly anybody leaves, with the goals; and what leaving gains."""
    cases, notes = list(_gated_cases(load(path))), load_notes()
    costs, gains = [], []
    for way, case in cases:
        more = case["more"]
        about = [_WAYS[way], more["network"], str(more["pixels"]), more["engine"], str(more["batch"])]
        if "overhead_percent" in more:
            low, high = more["overhead_interval"]
            cost = f"{more['overhead_percent']:+.2f} [{low:+.2f}, {'?' if high is None else f'{high:+.2f}'}]"
            goal = f"<= {more['goal_percent']:g}" if "goal_percent" in more else ""
            met = {True: "met", False: "**missed**", None: ""}[more.get("goal_met")]
            note = notes.get(_key(way, case), "unexplained") if more.get("goal_met") is False else ""
            costs.append([*about, cost, goal, met, note])
        else:
            rivals = [_with_notch(case, name) for name in ("ungated", "stage_and_head", "mask", "naive")]
            gains.append([*about, *rivals])
    left = ["case", "network", "pixels", "engine", "batch"]
    tables = []
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


def _gated_cases(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases of benchmarks/test_gated.py by what happens in them, network and batch."""
    found = [(case["operator"], case) for case in result["cases"].values() if case.get("operator") in _WAYS]
    for way, case in found:
        missing = [name for name in ("network", "pixels", "engine", "batch") if name not in case["more"]]
        if missing:
            raise ResultError(
                f"overhead: a case of {way} does not say its {missing[0]}: not by benchmarks/test_gated.py"
            )
    order = list(_WAYS)
    yield from sorted(
        found, key=lambda entry: (order.index(entry[0]), *(entry[1]["more"][k] for k in ("network", "engine", "batch")))
    )


def _key(way: str, case: dict[str, Any]) -> str:
    return f"{way} {case['more']['network']} {case['more']['engine']} {case['more']['batch']}"


TABLES: dict[str, Callable[[Path], str]] = {"gates": gates, "bench": bench, "peer": peer, "overhead": overhead}


def made(table: str, path: Path) -> str:
    """The table of that name from a result file.

    Raises:
        ResultError: there is no such table, the file is not there, or it is not what the table is made of.
    """
    if table not in TABLES:
        raise ResultError(f"report: no such table of gates: {table}; there are {', '.join(TABLES)}")
    if not path.is_file():
        raise ResultError(f"{path}: no such file")
    try:
        return TABLES[table](path)
    except UserError as error:
        raise ResultError(str(error)) from error


def unexplained(table: str, path: Path) -> list[str]:
    """The keys of the goals that the table shows as missed without a note in notes.toml."""
    return list(_unexplained(path)) if table == "overhead" else []


def _unexplained(path: Path) -> Iterable[str]:
    notes = load_notes()
    for way, case in _gated_cases(load(path)):
        if case["more"].get("goal_met") is False and _key(way, case) not in notes:
            yield _key(way, case)
