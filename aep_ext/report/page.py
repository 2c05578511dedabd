"""``report.html``: one self-contained page, nothing loaded from anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from aep_ext.report.html import Markup, table, tag
from aep_ext.report.numbers import amount, fewer, kept, method_name, percent, percent_spread, points, relative
from aep_ext.report.tables import HEAD, SEED_HEAD, SUBSET_HEAD, model_rows, seed_rows, subset_rows

STYLE = """
:root { color-scheme: light; --ink: #1f2937; --grey: #6b7280; --line: #e5e7eb; --accent: #2563eb; }
* { box-sizing: border-box; }
body {
  margin: 0; background: #f6f7f9; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 22px 0 2px; }
p { margin: 6px 0; }
.sub { color: var(--grey); }
.lead { font-size: 17px; max-width: 75ch; }
section, .card { background: #ffffff; border: 1px solid var(--line); border-radius: 10px; }
section { padding: 22px 24px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 20px; }
.card { padding: 16px 18px; }
.card b { display: block; font-size: 25px; letter-spacing: -0.01em; }
.card span { color: var(--grey); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--grey); font-weight: 600; font-size: 12.5px; }
th, td { padding: 7px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.number, td.number { text-align: right; }
tr.marked td { background: #fff7ed; font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
svg.figure { width: 100%; height: auto; display: block; margin: 10px auto 0; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--accent); }
pre { background: #f6f7f9; border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
ul { margin: 6px 0; padding-left: 20px; }
.weaker { background: #fff7ed; border-left: 3px solid #ea580c; border-radius: 4px; padding: 8px 16px; margin: 12px 0; }
.weaker h3 { margin: 0; }
""".strip()


def page(results: dict[str, Any], figures: dict[str, str], more: Sequence[Markup] = ()) -> str:
    """The report.

    Args:
        results: the content of ``results.json``.
        figures: SVG elements by name, as :func:`aep_ext.report.figures.inline_svg` makes them.
        more: sections about what was done with the run later.
    """
    title = f"{results['network']['name']} on {results['data']['title']}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"aep run: {title}"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "main",
            _top(results, title),
            _cards(results),
            _models(results, figures),
            _tradeoff(results, figures),
            list(more),
            _curves(figures),
            _seeds(results),
            _how(results),
        ),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _top(results: dict[str, Any], title: str) -> Markup:
    roles = results["data"]["roles"]
    count, threads = len(results["seeds"]), results["environment"]["threads"]
    facts = (
        f"{roles['fit']['samples']:,} images to learn from, {roles['select']['samples']:,} to select on, "
        f"{roles['report']['samples']:,} to report on; {results['data']['image_size']} pixels; "
        f"{count} seed{'s' if count > 1 else ''}; recipe "
        f"{results['config']['recipe']}; torch {results['environment']['torch']} "
        f"on {results['environment']['device']}, "
        f"{threads} thread{'s' if threads != 1 else ''}"
    )
    return tag(
        "header",
        tag("h1", title),
        tag("p", facts, class_="sub"),
        [tag("p", line, class_="lead") for line in headlines(results)],
    )


def headlines(results: dict[str, Any]) -> Iterator[str]:
    """The outcome in sentences, one or two for each family of exit weights."""
    baseline = results["summary"]["baseline"]
    for family, method in results["summary"]["methods"].items():
        pruned, compact = method["pruned"], method["compact"]
        yield (
            f"{method_name(family)}: the pruned ensemble ({kept(pruned['exits'])}) reaches "
            f"{percent_spread(pruned['top1'])} top-1 on the test images, the single-exit network "
            f"{percent_spread(baseline['top1'])}, with "
            f"{fewer(pruned['macs']['mean'], baseline['macs']['mean'], 'multiply-adds')} and "
            f"{fewer(pruned['parameters']['mean'], baseline['parameters']['mean'], 'parameters')}."
        )
        margin = f"{results['config']['margin']:g} point{'' if results['config']['margin'] == 1 else 's'}"
        if compact is None:
            yield f"{method_name(family)}: no subset is inside the margin of {margin} on the validation images."
            continue
        judged = "holds" if compact["verdict"]["non_inferior"] else "could not be confirmed"
        yield (
            f"{method_name(family)}: the smallest subset chosen as not worse than the baseline by {margin} is "
            f"{kept([compact['exits']])}, with {amount(compact['macs']['mean'])} multiply-adds "
            f"({relative(compact['macs']['mean'], baseline['macs']['mean'])}); on the test images this {judged}: "
            f"{points(compact['verdict'])} points, {percent(compact['verdict']['confidence'], 0)} paired interval."
        )


def _cards(results: dict[str, Any]) -> Markup:
    chosen = results["delivered"]
    baseline = results["summary"]["baseline"]
    pruned = results["summary"]["methods"][chosen["exit_weights"]]["pruned"]
    name = f"{method_name(chosen['exit_weights'])}, pruned"
    cards = [
        (f"{100 * pruned['verdict']['difference']:+.2f} pt", f"test top-1, {name} against the baseline"),
        (relative(pruned["macs"]["mean"], baseline["macs"]["mean"]), "multiply-adds"),
        (relative(pruned["parameters"]["mean"], baseline["parameters"]["mean"]), "parameters"),
        (f"{100 * (pruned['latency']['ratio'] - 1):+.0f} %", "latency at batch 1"),
    ]
    return tag(
        "div",
        [tag("div", tag("b", figure), tag("span", text), class_="card") for figure, text in cards],
        class_="cards",
    )


def _models(results: dict[str, Any], figures: dict[str, str]) -> Markup:
    several = len(results["seeds"]) > 1
    note = (
        "Accuracy is measured once on the test images"
        + (", as mean ± standard deviation over the seeds" if several else "")
        + "; differences come with a 95 % paired interval over the same images. "
        "Multiply-adds and latency are at batch 1; "
        "latencies are medians, the networks taking turns."
    )
    rows = model_rows(results)
    marked = [index for index, row in enumerate(rows) if row[0].endswith("pruned")]
    return tag(
        "section",
        tag("h2", "Baseline, full ensemble, pruned ensemble"),
        tag("p", note, class_="sub"),
        table(HEAD, rows, numeric_from=2, marked=marked),
        Markup(figures["accuracy"]),
    )


def _tradeoff(results: dict[str, Any], figures: dict[str, str]) -> Markup:
    details = []
    for family in results["summary"]["methods"]:
        rows, marked = subset_rows(results, family)
        details.append(
            tag(
                "details",
                tag("summary", f"All {len(rows)} subsets of {method_name(family)}"),
                table(SUBSET_HEAD, rows, marked=marked),
            )
        )
    note = (
        "Every subset of the exits, scored on the validation images. Numbers name the exits kept, counted from 1. "
        "Everything behind the last exit kept is removed, so subsets without the last exits are cheaper."
    )
    return tag(
        "section",
        tag("h2", "Accuracy against multiply-adds"),
        tag("p", note, class_="sub"),
        Markup(figures["tradeoff"]),
        details,
    )


def _curves(figures: dict[str, str]) -> Markup:
    return tag(
        "section",
        tag("h2", "Training"),
        tag(
            "p",
            "Each exit on its own, all of them together, and the single-exit network. Bands span the seeds.",
            class_="sub",
        ),
        Markup(figures["curves"]),
    )


def _seeds(results: dict[str, Any]) -> Markup:
    return tag("section", tag("h2", "Every trained network"), table(SEED_HEAD, seed_rows(results), numeric_from=2))


def _how(results: dict[str, Any]) -> Markup:
    delivered = results["delivered"]
    margin = results["config"]["margin"]
    notes = [
        "Three data roles: weights are learned on the first, epoch and subset are selected on the second, "
        "and the third "
        "is used once for every model.",
        training(results["recipe"]),
        "Pruning keeps the subset with the highest validation top-1, then top-5, then the fewest "
        "multiply-adds, then the "
        "fewest parameters.",
        f"Smallest within the margin: the cheapest subset whose 95 % paired interval on the validation images "
        f"lies above "
        f"-{margin:g} points; the test images then judge it by the same interval. "
        f"Its ends are the wider ones of Newcombe's "
        "interval over all pairs and a normal interval over the images' means, "
        "because the seeds share their images. The "
        "split of the data is the same for all seeds.",
        f"The models in this folder are those of seed {delivered['seed']}, {method_name(delivered['exit_weights'])} "
        f"({kept([delivered['exits']])}): the pruned network; in full/ the one with all exits, in baseline/ the "
        "single-exit one, in compact/ the smallest within the margin, if there is one.",
    ]
    shown = {key: results[key] for key in ("config", "environment", "data")}
    return tag(
        "section",
        tag("h2", "How this was made"),
        tag("ul", [tag("li", text) for text in notes]),
        tag(
            "details",
            tag("summary", "Configuration, environment, data"),
            tag("pre", json.dumps(shown, indent=1, ensure_ascii=False)),
        ),
    )


def training(recipe: dict[str, Any]) -> str:
    """How the networks were trained, in a sentence."""
    stop = f", stopped after {recipe['patience']} without a better joint validation loss" if recipe["patience"] else ""
    decay = f", weight decay {recipe['weight_decay']:g}" if recipe["weight_decay"] else ""
    return (
        f"Training (recipe {recipe['name']}): {recipe['optimizer']} at {recipe['lr']:g}{decay}, {recipe['schedule']} "
        f"schedule, batches of {recipe['batch_size']}, up to {recipe['epochs']} epochs{stop}; the epoch with the best "
        "validation top-1 of all exits together is kept; no augmentation."
    )
