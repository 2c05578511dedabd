"""The tables of a run: the same rows for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aep_ext.report.numbers import (
    amount,
    exits,
    exits_of_seeds,
    method_name,
    milliseconds,
    percent,
    percent_spread,
    points,
    relative,
)

HEAD = (
    "model",
    "exits",
    "test top-1",
    "top-5",
    "vs baseline, points",
    "parameters",
    "multiply-adds",
    "latency, ms (p95)",
)


def models(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kind of model of a run with its figures: the baseline first."""
    summary = results["summary"]
    yield "baseline (single exit)", summary["baseline"]
    for family, method in summary["methods"].items():
        yield f"{method_name(family)}, all exits", method["full"]
        yield f"{method_name(family)}, pruned", method["pruned"]
        if method["compact"]:
            yield f"{method_name(family)}, smallest within {results['config']['margin']:g} pt", method["compact"]


def model_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each model, as text, under :data:`HEAD`."""
    baseline = results["summary"]["baseline"]
    rows = []
    for name, model in models(results):
        kept = model["exits"] if isinstance(model["exits"][0], int) else None
        first = model is baseline
        rows.append(
            (
                name,
                exits(kept) if kept is not None else exits_of_seeds(model["exits"]),
                percent_spread(model["top1"]),
                percent_spread(model["top5"]),
                "" if first else points(model["verdict"]),
                *(
                    amount(model[cost]["mean"])
                    + ("" if first else f" ({relative(model[cost]['mean'], baseline[cost]['mean'])})")
                    for cost in ("parameters", "macs")
                ),
                milliseconds(model["latency"]),
            )
        )
    return rows


def subset_rows(results: dict[str, Any], family: str) -> tuple[list[tuple[str, ...]], list[int]]:
    """Every subset of a method, the cheapest first, and the indices of the rows that were chosen in some seed."""
    method = results["summary"]["methods"][family]
    chosen = {tuple(subset) for subset in method["pruned"]["exits"]}
    ordered = sorted(method["subsets"], key=lambda row: (row["macs"], row["parameters"]))
    rows = [
        (
            exits(row["exits"]),
            percent_spread(row["top1"]),
            percent_spread(row["top5"]),
            amount(row["parameters"]),
            amount(row["macs"]),
            "-" if row["latency_ms"] is None else f"{row['latency_ms']:.3g}",
        )
        for row in ordered
    ]
    return rows, [index for index, row in enumerate(ordered) if tuple(row["exits"]) in chosen]


SUBSET_HEAD = ("exits", "validation top-1", "top-5", "parameters", "multiply-adds", "latency, ms")


def seed_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row for each trained network of each seed."""
    rows = []
    for seed in results["seeds"]:
        units = [("baseline", seed["baseline"], seed["baseline"])]
        units += [(method_name(name), part, part["pruned"]) for name, part in seed["methods"].items()]
        for name, part, last in units:
            full = part.get("full", part)
            rows.append(
                (
                    str(seed["seed"]),
                    name,
                    f"{part['fit']['best_epoch'] + 1} of {part['fit']['epochs']}",
                    percent(full["select"]["top1"]),
                    percent(full["report"]["top1"]),
                    exits(last["exits"]),
                    percent(last["report"]["top1"]),
                    amount(last["macs"]),
                    f"{part['fit']['seconds']:.0f} s",
                )
            )
    return rows


SEED_HEAD = (
    "seed",
    "network",
    "epoch kept",
    "validation top-1",
    "test top-1",
    "exits kept",
    "pruned: test top-1",
    "multiply-adds",
    "training",
)


def text_table(results: dict[str, Any]) -> str:
    """The table of models for a terminal."""
    return as_text(HEAD, model_rows(results))


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> str:
    """A table for a terminal; the first ``left`` columns are aligned to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    written = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([written[0], "-" * max(map(len, written)), *written[1:]])
