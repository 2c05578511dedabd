"""The tables of a gate: the same rows for the terminal and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from aep_ext.report.numbers import amount, exits, method_name, percent_spread

SUMMARY_HEAD = ("network", "exits", "test top-1", "mean multiply-adds", "saving", "vs pruned, points")
CALIBRATION_HEAD = (
    "seed",
    "up to exit",
    "temperature",
    *(f"{name} {when}" for name in ("ECE", "NLL", "Brier", "AUROC") for when in ("before", "after")),
)
GATE_HEAD = ("seed", "exit", "threshold", "multiply-adds", "images that left", "right among them")
BENCH_HEAD = ("batch", "network", "p50, ms", "p95, ms", "p99, ms", "images/s", "ratio", "predicted", "share of saving")


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one value), as ``results.json`` writes them."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def figure_of(method: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    """One figure of ``pruned``, ``full`` or ``baseline`` on the test images, over the seeds."""
    return over_seeds([seed["report"][kind][name] for seed in method["seeds"]])


def matched_static(gates: dict[str, Any], method: dict[str, Any]) -> dict[str, Any] | None:
    """The cheapest static network that is not worse than the method's gated one; None where none is."""
    index = method["matched"] if "matched" in method else gates.get("matched")
    return None if index is None else gates["static"][index]


def _saving(macs: float, pruned: float) -> str:
    return f"{round(100 * (1 - macs / pruned), 1) + 0.0:.1f} %"  # + 0.0: no minus before a zero


def _distinct(subsets: Sequence[Sequence[int]]) -> str:
    return ", ".join(dict.fromkeys(exits(subset) for subset in subsets))


def gates_rows(gates: dict[str, Any], family: str) -> tuple[list[tuple[str, ...]], list[int]]:
    """One row for each network that a method's gate is compared with, under :data:`SUMMARY_HEAD`, and the rows that
    stand out.

    Savings are against the method's pruned ensemble; a difference is gated minus pruned, with its paired interval.
    """
    method = gates["methods"][family]
    summary, name = method["summary"], method_name(family)
    pruned = figure_of(method, "pruned", "macs")["mean"]
    saving, drop = summary["saving"], summary["drop_points"]
    spread = "" if saving["std"] is None else f" ± {100 * saving['std']:.1f}"
    rows = [
        (
            f"{name}, gated",
            _distinct([seed["exits"] for seed in method["seeds"]]),
            percent_spread(summary["gated_top1"]),
            amount(summary["mean_macs"]["mean"]),
            f"{100 * saving['mean']:.1f}{spread} %",
            f"{drop['mean']:+.2f} [{drop['interval'][0]:+.2f}, {drop['interval'][1]:+.2f}]",
        ),
        (
            f"{name}, pruned",
            _distinct([seed["pruned_exits"] for seed in method["seeds"]]),
            percent_spread(summary["pruned_top1"]),
            amount(pruned),
            "",
            "",
        ),
    ]
    for kind, title in (("full", f"{name}, all exits"), ("baseline", "baseline (single exit)")):
        macs = figure_of(method, kind, "macs")["mean"]
        rows.append(
            (title, "", percent_spread(figure_of(method, kind, "top1")), amount(macs), _saving(macs, pruned), "")
        )
    matched = matched_static(gates, method)
    for entry in gates["static"]:
        title = f"{entry['name']} (matches)" if entry is matched else entry["name"]
        macs = entry["macs"]
        rows.append((title, "", percent_spread(entry["top1"]), amount(macs), _saving(macs, pruned), ""))
    return rows, [0]


def _decimal(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def calibration_rows(method: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each prefix ensemble of each seed, under :data:`CALIBRATION_HEAD`."""
    return [
        (
            str(seed["seed"]),
            str(row["exit"] + 1),
            f"{row['temperature']:.3f}{'' if row.get('converged', True) else ' (not converged)'}",
            *(
                _decimal(row[when].get(name))
                for name in ("ece", "nll", "brier", "auroc")
                for when in ("before", "after")
            ),
        )
        for seed in method["seeds"]
        for row in seed["calibration"]
    ]


def gate_rows(method: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each gated exit of each seed, under :data:`GATE_HEAD`: threshold, cost, and who left there."""
    rows = []
    for seed in method["seeds"]:
        limits = [
            ("off" if not on or value is None else f"{value:.4g}")
            for value, on in zip(seed["thresholds"], seed["enabled"], strict=True)
        ] + ["all the others"]
        for number, limit, macs, (count, right) in zip(
            seed["exits"], limits, seed["costs"], seed["right_by_exit"], strict=True
        ):
            share = f"{count:,} ({100 * count / seed['report']['n']:.1f} %)" if seed["report"]["n"] else "0"
            accuracy = f"{100 * right / count:.2f} %" if count else "-"
            rows.append((str(seed["seed"]), str(number + 1), limit, amount(macs), share, accuracy))
    return rows


def bench_rows(bench: dict[str, Any]) -> list[tuple[str, ...]]:
    """Two rows, ungated and gated, for each batch size, under :data:`BENCH_HEAD`."""
    rows = []
    for row in bench["rows"]:
        for kind in ("ungated", "gated"):
            times = row[kind]
            figures = [f"{times[name]:.4g}" for name in ("p50_ms", "p95_ms", "p99_ms", "images_per_s")]
            ratio = ("", "", "")
            if kind == "gated":
                low, high = row["ratio_interval"]
                share, predicted = row.get("share_of_predicted_saving"), row.get("predicted_ratio")
                if row.get("gates") is False:  # they stay shut at this size: nothing was to be saved
                    share, predicted = None, None
                ratio = (
                    f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
                    "gates shut" if row.get("gates") is False else _decimal(predicted),
                    "-" if share is None else f"{100 * share:.0f} %",
                )
            rows.append((str(row["batch"]) if kind == "ungated" else "", kind, *figures, *ratio))
    return rows
