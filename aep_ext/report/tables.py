"""The tables of a run: the same rows for the terminal, for Markdown and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aep_ext._utils import aligned
from aep_ext.report.numbers import (
    amount,
    decimal,
    exits,
    exits_of_seeds,
    method_name,
    percent,
    percent_spread,
    points,
    relative,
)
from aep_ext.report.summary import agreement_words, caveats, expected_words, headline, policy_words


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``left`` columns are aligned to the left, rows with an index in ``marked`` stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    marked: frozenset[int] = frozenset()

    def text(self) -> str:
        """For a terminal."""
        written = aligned([self.head, *self.rows], self.left)
        return "\n".join([written[0], "-" * max(map(len, written)), *written[1:]])

    def markdown(self) -> str:
        """For a document."""
        rule = ["---" if column < self.left else "---:" for column in range(len(self.head))]
        lines = [self.head, rule, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"

    def without_empty_columns(self) -> Table:
        """The same without the columns in which no row says anything."""
        kept = [column for column in range(len(self.head)) if any(row[column] for row in self.rows)]
        left = sum(column < self.left for column in kept)
        rows = [[row[column] for column in kept] for row in self.rows]
        return Table([self.head[column] for column in kept], rows, left, self.marked)


def models(results: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Every kind of model with its summary over the seeds: (its name in words, method, kind, summary); the baseline
    first, smaller static networks last. A method's kinds are full, pruned, smallest, selected and gated, as far as they
    exist."""
    margin, objective = results["config"].get("margin"), results["config"].get("objective")
    titles = {
        "full": "all exits",
        "pruned": "pruned",
        "smallest": "smallest" if margin is None else f"smallest within {margin:g} pt",
        "selected": f"chosen for {objective}",
        "gated": "gated",
    }
    yield "baseline (single exit)", "", "baseline", results["summary"]["baseline"]
    for method, kinds in results["summary"]["methods"].items():
        for kind, title in titles.items():
            if kinds.get(kind):
                yield f"{method_name(method)}, {title}", method, kind, kinds[kind]
    for network in results["static"]:
        cost = {"mean": network["macs"]}
        size = {"mean": network["parameters"]} if network.get("parameters") else None
        yield network["name"], "", "static", {"top1": network["top1"], "macs": cost, "parameters": size}


def outcome_table(results: dict[str, Any]) -> Table:
    """One row for each kind of model; the delivered one is marked."""
    base, delivered, marked = results["summary"]["baseline"], results["delivered"], set()
    rows: list[tuple[str, ...]] = []
    for name, method, kind, model in models(results):
        if (method, kind) == (delivered["method"], delivered["kind"]):
            marked.add(len(rows))
        subsets = list(dict.fromkeys(map(tuple, model.get("exits", ()))))
        rows.append(
            (
                name,
                exits_of_seeds(subsets) if subsets else "",
                percent_spread(model["top1"]),
                percent_spread(model["top5"]) if model.get("top5") else "",
                points(model["non_inferiority"]) if model.get("non_inferiority") else "",
                points(model["against_pruned"]) if model.get("against_pruned") else "",
                _against(model["macs"], base["macs"] if model is not base else None),
                _against(model["parameters"], base["parameters"] if model is not base else None),
                _latency(model.get("latency")),
            )
        )
    head = ("model", "exits", "test top-1", "top-5", "vs baseline, points", "vs pruned, points", "multiply-adds")
    return Table((*head, "parameters", "latency, ms (ratio)"), rows, 2, frozenset(marked)).without_empty_columns()


def _against(cost: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if cost is None:
        return ""
    return amount(cost["mean"]) + (f" ({relative(cost['mean'], base['mean'])})" if base else "")


def _latency(latency: dict[str, Any] | None) -> str:
    if latency is None:
        return ""
    value = latency.get("mean") or latency.get("median")
    return "" if value is None else f"{value:.3g} ({latency['ratio']:.2f})"


def gates_table(results: dict[str, Any], method: str) -> Table:
    """One row for each seed: the exits kept, who left where, what it cost, and what calibration expected."""
    rows = []
    for seed in results["seeds"]:
        gated = seed["methods"][method]["gated"]
        if gated is None:
            continue
        test, said = gated["test"], gated.get("calibration") or {}
        shares = " / ".join(f"{100 * count / test['n']:.0f}" for count in test["exit_counts"])
        bounds = [f"{-bound + 0.0:+.2f}" for bound in reversed(said.get("interval") or ()) if bound is not None]
        drop, expected = said.get("drop_points"), ""
        if drop is not None:
            expected = f"{-drop + 0.0:+.2f}" + (f" [{', '.join(bounds)}]" if bounds[1:] else "")
        rows.append(
            (
                str(seed["seed"]),
                exits(gated["policy"]["exits"]) + ("" if gated["feasible"] else " (not gated)"),
                shares,
                percent(test["top1"]),
                amount(test["mean_macs"]),
                relative(test["mean_macs"], seed["baseline"]["full"]["macs"]),
                expected,
            )
        )
    head = ("seed", "exits", "left at each exit, %", "test top-1", "mean multiply-adds", "vs baseline")
    return Table((*head, "expected by calibration, points"), rows, 3).without_empty_columns()


def policy_table(results: dict[str, Any], method: str) -> Table:
    """One row for each gated exit of each seed: its rule, its cost, and who left there."""
    rows = []
    for seed in results["seeds"]:
        gated = seed["methods"][method]["gated"]
        if gated is None:
            continue
        policy, n = gated["policy"], gated["test"]["n"]
        for e, number in enumerate(policy["exits"]):
            rule = "answers the rest"
            if e < len(policy["exits"]) - 1:
                rule = decimal(policy["thresholds"][e], 4) if policy["enabled"][e] else "off"
            count, right = gated["right_by_exit"][e]
            rows.append(
                (
                    str(seed["seed"]),
                    str(number + 1),
                    rule,
                    f"{policy['temperatures'][e]:.3g}",
                    f"{policy['output_weights'][e]:.3g}",
                    amount(gated["costs"][e]),
                    f"{count:,} ({100 * count / n:.1f} %)",
                    percent(right / count) if count else "",
                )
            )
    head = ("seed", "exit", "threshold", "temperature", "output weight", "multiply-adds", "images that left")
    return Table((*head, "right among them"), rows, 2)


def bench_table(results: dict[str, Any]) -> Table:
    """Two rows, ungated and gated, for each batch size of ``aep bench``."""
    rows = []
    for row in results["bench"]["rows"]:
        for kind in ("ungated", "gated"):
            times = row[kind]
            numbers = [f"{times[name]:.4g}" for name in ("p50_ms", "p95_ms", "p99_ms")]
            numbers.append(f"{times['images_per_s']:,.0f}")
            compared = ("", "", "", "")
            if kind == "gated":
                low, high = row["ratio_interval"]
                share = row.get("share_of_predicted_saving")
                shut = row.get("gates") is False  # at this size they stay shut: nothing was to be saved
                compared = (
                    f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
                    decimal(row.get("subset_ratio")),
                    "gates shut" if shut else decimal(row.get("predicted_ratio")),
                    "" if share is None or shut else f"{100 * share:.0f} %",
                )
            rows.append((str(row["batch"]) if kind == "ungated" else "", kind, *numbers, *compared))
    head = ("batch", "network", "p50, ms", "p95, ms", "p99, ms", "images/s", "ratio", "to own exits")
    return Table((*head, "predicted", "share of saving"), rows, 2).without_empty_columns()


def bench_words(results: dict[str, Any]) -> list[str]:
    """How ``aep bench`` measured."""
    bench = results["bench"]
    where, threads = bench.get("environment") or {}, bench["threads"]
    machine = "".join(f"; {name} {where[name]}" for name in ("torch", "machine") if name in where)
    text = (
        f"{bench['backend']}, {threads} thread{'s' * (threads != 1)}; {bench['samples']:,} test images{machine}. "
        "Ratio: the pruned network's time for all batches over the gated network's, with a 95 % interval; to own "
        "exits: the same against its own exits without gates; predicted: from stage times and the exits taken."
    )
    return [text, *bench.get("notices", [])]


def text_table(results: dict[str, Any]) -> str:
    """The outcome of a run for a terminal: the table of models, what was delivered, and what limits it."""
    lines = [headline(results), *expected_words(results), *(f"- {line}" for line in caveats(results))]
    return f"{outcome_table(results).text()}\n\n" + "\n".join(lines)


def results_markdown(results: dict[str, Any]) -> str:
    """The table of models for a document, and the outcome in a sentence."""
    return f"{outcome_table(results).markdown()}\n{headline(results)}\n"


def gates_markdown(results: dict[str, Any]) -> str:
    """The gates of every seed for a document: policy, what was calibrated on, and how the live network agrees."""
    methods = [name for name, kinds in results["summary"]["methods"].items() if kinds["gated"]]
    lines = [policy_words(results)] if methods else ["This run has no gates."]
    for name in methods:
        lines += agreement_words(results, name)
    lines += results["notices"]
    if results["test_looks"] > 1:
        lines.append(f"The test images were looked at {results['test_looks']} times.")
    tables = [gates_table(results, name).markdown() for name in methods]
    return "\n".join([*tables, *(f"- {line}" for line in lines)]) + "\n"


def bench_markdown(results: dict[str, Any]) -> str:
    """Latency and throughput, gated and not, for a document."""
    if results["bench"] is None:
        return "- This run was not timed: `aep bench` does that.\n"
    return "\n".join([bench_table(results).markdown(), *(f"- {line}" for line in bench_words(results))]) + "\n"
