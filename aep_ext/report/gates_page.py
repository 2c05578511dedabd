"""The section "Stopping early" of a run's page."""

from __future__ import annotations

from typing import Any

from aep_ext.report.gates_figures import MOST_CLASSES
from aep_ext.report.gates_tables import (
    BENCH_HEAD,
    CALIBRATION_HEAD,
    GATE_HEAD,
    SUMMARY_HEAD,
    bench_rows,
    calibration_rows,
    gate_rows,
    gates_rows,
)
from aep_ext.report.gates_words import agreement_words, data_words, gates_headlines, policy_words, weaknesses
from aep_ext.report.html import Markup, table, tag
from aep_ext.report.numbers import method_name


def gates_section(gates: dict[str, Any], bench: dict[str, Any] | None, figures: dict[str, str]) -> Markup:
    """The section.

    Args:
        gates: the content of ``gates.json``.
        bench: the content of ``bench.json``, or None.
        figures: SVG elements by name, as :func:`aep_ext.report.gates_figures.draw_gates` makes them.
    """
    weak = weaknesses(gates, bench)
    return tag(
        "section",
        tag("h2", "Stopping early"),
        [tag("p", line, class_="lead") for line in gates_headlines(gates)],
        _tables(gates),
        tag("div", tag("h3", "What is weaker"), tag("ul", [tag("li", line) for line in weak]), class_="weaker")
        if weak
        else None,
        _facts(gates),
        _cost(figures),
        _classes(gates, figures),
        _examples(figures),
        _calibration(gates),
        _bench(bench),
        id="stopping-early",
    )


def _tables(gates: dict[str, Any]) -> list[Markup]:
    several = any(len(method["seeds"]) > 1 for method in gates["methods"].values())
    first = next(iter(gates["methods"].values()))["summary"]["drop_points"]
    level = f"{100 * first['confidence']:g} % paired" if first.get("confidence") else "paired"
    note = (
        "Test images"
        + (", mean ± sample standard deviation over the seeds" if several else "")
        + ". A gated network's multiply-adds are the mean over the images, each counted up to the exit it left at. "
        f"Saving: against the method's pruned ensemble. Points: gated minus pruned on the same images, with a {level} "
        "interval."
    )
    if gates["static"]:
        note += " Matches: the cheapest static network whose mean test top-1 is not below the gated network's."
    made = [tag("p", note, class_="sub")]
    for family in gates["methods"]:
        rows, marked = gates_rows(gates, family)
        made.append(table(SUMMARY_HEAD, rows, numeric_from=2, marked=marked))
    return made


def _facts(gates: dict[str, Any]) -> Markup:
    facts = [policy_words(gates), data_words(gates), *gates["data"]["notices"]]
    for family, method in gates["methods"].items():
        facts.append(agreement_words(family, method))
        for seed in method["seeds"]:
            if seed.get("guarantee"):
                facts.append(f"{method_name(family)}, seed {seed['seed']}: {seed['guarantee']['text']}")
    delivered = gates.get("delivered")
    if delivered:
        facts.append(
            f"The gated network in {delivered.get('folder', 'gated')}/ is that of seed {delivered['seed']}, "
            f"{method_name(delivered['exit_weights'])}."
        )
    return tag("ul", [tag("li", fact) for fact in facts])


def _cost(figures: dict[str, str]) -> list[Markup]:
    note = (
        "The thresholds of every point of a curve were found on the images to select on and applied to the test "
        "images; stars are points chosen there, the large one the mean over the seeds. Vertical lines span the seeds. "
        "A triangle at the lower edge stands for an accuracy below it."
    )
    return [tag("h3", "Accuracy against cost"), tag("p", note, class_="sub"), Markup(figures["gates-cost"])]


def _classes(gates: dict[str, Any], figures: dict[str, str]) -> list[Markup]:
    count = max(len(seed["per_class"]) for method in gates["methods"].values() for seed in method["seeds"])
    note = "Share of each class's test images that left at each exit, the classes that cost least first"
    if count > MOST_CLASSES:
        half = MOST_CLASSES // 2
        note += f"; of {count} classes the {half} cheapest and, below the gap, the {half} dearest are shown"
    details = [
        tag(
            "details",
            tag("summary", f"Thresholds and exits of {method_name(family)}"),
            table(GATE_HEAD, gate_rows(method), numeric_from=2),
        )
        for family, method in gates["methods"].items()
    ]
    heading = tag("h3", "Where images left")
    return [heading, tag("p", f"{note}.", class_="sub"), Markup(figures["gates-classes"]), *details]


def _examples(figures: dict[str, str]) -> list[Markup]:
    if "gates-examples" not in figures:
        return []
    note = "Label, wrong answer if there was one (orange), exit and confidence."
    return [tag("h3", "Examples"), tag("p", note, class_="sub"), Markup(figures["gates-examples"])]


def _calibration(gates: dict[str, Any]) -> list[Markup]:
    note = (
        "Probabilities of the exits so far together, on the test images, before and after the temperature. ECE: "
        "expected calibration error; NLL in nats; AUROC: of telling right answers from wrong ones by confidence, "
        "which is what a gate needs and a temperature hardly changes."
    )
    tables = [
        tag(
            "details",
            tag("summary", f"Calibration of {method_name(family)}"),
            table(CALIBRATION_HEAD, calibration_rows(method), numeric_from=2),
            open=True,
        )
        for family, method in gates["methods"].items()
    ]
    return [tag("h3", "Calibration"), tag("p", note, class_="sub"), *tables]


def _bench(bench: dict[str, Any] | None) -> list[Markup]:
    if bench is None:
        return []
    threads = bench["threads"]
    note = (
        f"Measured on {bench['samples']:,} identical images, heads and gates included ({bench['engine']}, {threads} "
        f"thread{'' if threads == 1 else 's'}). Ratio: how many times as long the ungated network takes, paired, with "
        "its interval; predicted: the same from measured stage times and the exits taken; share: how much of the "
        "predicted saving is there."
    )
    return [
        tag("h3", "Latency and throughput"),
        tag("p", note, class_="sub"),
        table(BENCH_HEAD, bench_rows(bench), numeric_from=2),
    ]
