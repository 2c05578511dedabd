"""A calibration as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

from aep_ext.report.numbers import amount, exits, method_name, percent, percent_spread

_HEAD = ("network", "exits", "test top-1", "mean multiply-adds", "against pruned, points")


def gates_table(gates: dict[str, Any]) -> str:
    """Gated, pruned, full and baseline, and the static networks, of every family; then what a user must know."""
    blocks = []
    for family, method in gates["methods"].items():
        rows = [_HEAD, *_rows(family, method)]
        rows += [
            (entry["name"], "", percent_spread(entry["top1"]), amount(entry["macs"]), "") for entry in gates["static"]
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        blocks.append("\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]]))
    return "\n\n".join([*blocks, *_notes(gates)])


def _rows(family: str, method: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    name, summary, seeds = method_name(family), method["summary"], method["seeds"]
    subsets = list(dict.fromkeys(exits(part["exits"]) for part in seeds))
    drop = summary["drop_points"]
    yield (
        f"{name}, gated",
        ", ".join(subsets),
        percent_spread(summary["gated_top1"]),
        f"{amount(summary['mean_macs']['mean'])} ({-100 * summary['saving']['mean'] + 0.0:+.1f} %)",
        f"{drop['mean']:+.2f} [{drop['interval'][0]:+.2f}, {drop['interval'][1]:+.2f}]",
    )
    for kind, title in (("pruned", f"{name}, pruned"), ("full", f"{name}, all exits"), ("baseline", "baseline")):
        figures = [part["report"][kind] for part in seeds]
        kept = ", ".join(dict.fromkeys(exits(part["pruned_exits"]) for part in seeds)) if kind == "pruned" else ""
        yield title, kept, percent(fmean(one["top1"] for one in figures)), amount(fmean(o["macs"] for o in figures)), ""


def _notes(gates: dict[str, Any]) -> Iterator[str]:
    for family, method in gates["methods"].items():
        for part in method["seeds"]:
            where = f"seed {part['seed']} / {family}"
            if not part["gated"]:
                yield f"{where}: {part['notice']}"
            if part["guarantee"]:
                yield f"{where}: {part['guarantee']['text']}"
            wrong = [one["differing_elsewhere"] for one in (part["agreement"], part["agreement"]["single"])]
            if any(wrong):
                yield (
                    f"{where}: WARNING: the live network and the simulator differ on {wrong[0]} images (one by one: "
                    f"{wrong[1]}) that are near no threshold"
                )
    if gates["static_notice"]:
        yield gates["static_notice"]
    if gates["data"]["judged"] > 1:
        yield gates["data"]["notices"][-1]
