"""What a gate does, in sentences; and, as plainly, what is weaker than one would wish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from aep_ext.report.gates_tables import SUMMARY_HEAD, figure_of, gates_rows, matched_static, over_seeds
from aep_ext.report.numbers import amount, method_name, percent, percent_spread
from aep_ext.report.tables import as_text

NOTHING = 0.005
"""Less than half a percent of the multiply-adds counts as nothing saved."""
PROMISED = 0.9
"""The least share of the predicted saving that should be there at batch 1."""


def gates_headlines(gates: dict[str, Any]) -> Iterator[str]:
    """The outcome in one sentence for each method."""
    for family, method in gates["methods"].items():
        summary, drop = method["summary"], method["summary"]["drop_points"]
        if not any(seed.get("gated", True) for seed in method["seeds"]):
            yield f"{method_name(family)}: nothing is gated, the pruned ensemble stays as it is."
            continue
        on = sum(seed.get("gated", True) for seed in method["seeds"])
        some = "" if on == len(method["seeds"]) else f" (in {on} of {len(method['seeds'])} seeds)"
        saving = summary["saving"]["mean"]
        change = f"{abs(100 * saving):.1f} % {'fewer' if saving >= 0 else 'more'} multiply-adds"
        yield (
            f"{method_name(family)}, stopping early{some}, reaches {percent_spread(summary['gated_top1'])} top-1 on "
            f"the test images with {change} on average than its pruned ensemble: {drop['mean']:+.2f} "
            f"[{drop['interval'][0]:+.2f}, {drop['interval'][1]:+.2f}] points of accuracy against it."
        )


def policy_words(gates: dict[str, Any]) -> str:
    """The policy and the budget in a sentence."""
    settings = gates["settings"]
    first = next(iter(gates["methods"].values()))["seeds"][0]["policy"]
    judged = {"ensemble": "the ensemble of the exits so far", "exit": "each exit alone"}.get(first.get("on", ""), "")
    return (
        f"Policy: {settings['policy']}{f' of {judged}' if judged else ''}. Budget: {budget_words(settings['budget'])}."
    )


def budget_words(budget: dict[str, Any]) -> str:
    """A budget in words; one of an unknown kind by its name and numbers."""
    numbers = {key: value for key, value in budget.items() if key != "kind" and value is not None}
    if budget["kind"] == "accuracy" and "points" in numbers:
        return f"at most {budget['points']:g} points of top-1 below the pruned ensemble"
    if budget["kind"] == "risk" and "epsilon" in numbers:
        certain = f" with probability {1 - budget['delta']:g}" if "delta" in numbers else ""
        return f"a loss of top-1 of at most {100 * budget['epsilon']:g} points against the pruned ensemble{certain}"
    if budget["kind"] == "cost" and "mean" in numbers:
        return f"at most {amount(budget['mean'])} multiply-adds on average"
    if budget["kind"] == "cost" and "fraction" in numbers:
        return f"at most {percent(budget['fraction'], 1)} of the multiply-adds on average"
    return ", ".join([budget["kind"], *(f"{key} {value}" for key, value in numbers.items())])


def allowed_points(gates: dict[str, Any]) -> float | None:
    """Points that may be lost, where the budget says so."""
    budget = gates["settings"]["budget"]
    if budget["kind"] == "accuracy":
        return budget.get("points")
    return None if budget.get("epsilon") is None else 100 * budget["epsilon"]


def data_words(gates: dict[str, Any]) -> str:
    """Which images served for what."""
    data = gates["data"]
    count = {role: f"{data[role]['samples']:,}" for role in ("temperatures", "thresholds", "report")}
    judged = data["judged"]
    times = "once" if judged == 1 else f"{judged} times"
    return (
        f"Images: {count['temperatures']} for the temperatures, {count['thresholds']} for the exits and thresholds, "
        f"{count['report']} to report on, judged {times}."
    )


def agreement_words(family: str, method: dict[str, Any]) -> str:
    """Simulator against live network, all seeds together."""
    found = [seed["agreement"] for seed in method["seeds"]]
    total = {name: sum(part[name] for part in found) for name in ("n", "differing", "near_threshold")}
    seeds = f" of {len(found)} seeds" if len(found) > 1 else ""
    text = (
        f"{method_name(family)}: the live network and the simulator differ on {total['differing']:,} of {total['n']:,} "
        f"answers to test images{seeds}; {total['near_threshold']:,} are within {found[0]['tolerance']:g} of a "
        "threshold"
    )
    apart = [part.get("max_confidence_difference") for part in found]
    apart = [value for value in apart if value is not None]
    if apart:
        text += f"; confidences differ by at most {max(apart):.2g}"
    single = [part["single"] for part in found if part.get("single")]
    if single:
        differing, n = (sum(part[name] for part in single) for name in ("differing", "n"))
        text += f"; one image at a time {differing:,} of {n:,} differ"
    return text + "."


def weaknesses(gates: dict[str, Any], bench: dict[str, Any] | None = None) -> list[str]:
    """What a reader must not overlook, worst first within each method."""
    data, lines = gates["data"], []
    if data["shared"]:
        lines.append(
            "Roles are shared: images that the gate was chosen on are also reported on, so its figures are optimistic."
        )
    if data["judged"] > 1:
        lines.append(
            f"The test images were judged {data['judged']} times by calibrations of this run: settings chosen after a "
            "look at earlier outcomes make the figures optimistic."
        )
    for family, method in gates["methods"].items():
        lines += [f"{method_name(family)}: {line}" for line in _of_method(gates, method)]
    if not gates["static"]:
        lines.append(
            gates.get("static_notice")
            or "No smaller static network was trained, so nothing is shown of how one of the same accuracy compares."
        )
    return lines + list(_of_bench(bench))


def _of_method(gates: dict[str, Any], method: dict[str, Any]) -> Iterator[str]:
    summary, seeds = method["summary"], method["seeds"]
    off = [seed for seed in seeds if not seed.get("gated", True)]
    for seed in off:
        yield f"seed {seed['seed']} is not gated{': ' + seed['notice'] if seed.get('notice') else ''}."
    if len(off) == len(seeds):
        yield "nothing is saved: the pruned ensemble stays."
        return
    if summary["saving"]["mean"] < NOTHING:
        saving = summary["saving"]["mean"]
        amount_of = "nothing is saved" if saving > -NOTHING else "stopping early costs more than the pruned ensemble"
        yield f"{amount_of}: {100 * saving:.1f} % of its multiply-adds."
    yield from _of_budget(gates, summary)
    baseline = figure_of(method, "baseline", "top1")["mean"]
    if summary["gated_top1"]["mean"] < baseline:
        short = 100 * (baseline - summary["gated_top1"]["mean"])
        yield f"the gated network is {short:.2f} points below the single-exit baseline ({percent(baseline)})."
    yield from rivals_words(gates, method)
    for seed in seeds:
        where = f"seed {seed['seed']}" if len(seeds) > 1 else "the gate"
        yield from (f"{where}: {line}" for line in _of_seed(seed))
    if len(seeds) == 1:
        yield "one seed only: no spread over trainings is known."


def _of_budget(gates: dict[str, Any], summary: dict[str, Any]) -> Iterator[str]:
    allowed, drop = allowed_points(gates), summary["drop_points"]
    if allowed is None:
        return
    low = drop["interval"][0]
    if drop["mean"] < -allowed:
        yield f"the budget of {allowed:g} points is exceeded on the test images: {drop['mean']:+.2f} points."
    elif low < -allowed:
        yield (
            f"the budget of {allowed:g} points is kept on average ({drop['mean']:+.2f}) but not confirmed: the "
            f"interval of the difference reaches {low:+.2f} points."
        )


def rivals_words(gates: dict[str, Any], method: dict[str, Any]) -> Iterator[str]:
    """What is as accurate as the method's gated network and no dearer; or that no static network matches it."""
    summary = method["summary"]
    top1, macs = summary["gated_top1"]["mean"], summary["mean_macs"]["mean"]
    for row in single_exits(method):
        if row["top1"]["mean"] >= top1 and row["macs"]["mean"] <= macs:
            yield (
                f"exit {row['exit'] + 1} alone is as accurate ({percent(row['top1']['mean'])}) and needs "
                f"{amount(row['macs']['mean'])} multiply-adds, the gated network {amount(macs)}."
            )
            break
    if not gates["static"]:
        return
    matched = matched_static(gates, method)
    if matched is None:
        yield "no static network that was trained is as accurate as the gated one, so none matches it."
    elif matched["macs"] <= macs:
        yield (
            f"a static network of at least the same accuracy is no dearer: {matched['name']}, "
            f"{percent(matched['top1']['mean'])} with {amount(matched['macs'])} multiply-adds, the gated network "
            f"{percent(top1)} with {amount(macs)}."
        )


def single_exits(method: dict[str, Any]) -> list[dict[str, Any]]:
    """Every exit alone, on the test images: ``exit``, and ``top1`` and ``macs`` over the seeds that have it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for seed in method["seeds"]:
        for row in seed["report"]["each_exit"]:
            found.setdefault(row["exit"], []).append(row)
    return [
        {"exit": number, **{name: over_seeds([row[name] for row in rows]) for name in ("top1", "macs")}}
        for number, rows in sorted(found.items())
    ]


def _of_seed(seed: dict[str, Any]) -> Iterator[str]:
    found = [part for part in (seed["agreement"], seed["agreement"].get("single")) if part]
    elsewhere = sum(part["differing_elsewhere"] for part in found)
    if elsewhere:
        yield f"live network and simulator differ on {elsewhere} images that are near no threshold."
    loose = [str(row["exit"] + 1) for row in seed["calibration"] if row.get("converged") is False]
    if loose:
        yield f"the temperature fit did not converge at exit {_listed(loose)}."
    for name, title, better in (("ece", "ECE", -1), ("nll", "NLL", -1), ("auroc", "failure AUROC", 1)):
        worse = [
            str(row["exit"] + 1)
            for row in seed["calibration"]
            if None not in (row["before"].get(name), row["after"].get(name))
            and better * (row["after"][name] - row["before"][name]) < -0.0005
        ]
        if worse:
            yield f"the temperature made the {title} worse up to exit {_listed(worse)}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _of_bench(bench: dict[str, Any] | None) -> Iterator[str]:
    for row in (bench or {"rows": []})["rows"]:
        (low, high), batch = row["ratio_interval"], f"Measured at batch {row['batch']}"
        if high < 1:
            yield f"{batch}, the gated network is slower than the ungated one: ratio {row['ratio']:.3f}."
        elif low <= 1:
            yield f"{batch}, no gain is shown: the interval of the ratio, [{low:.3f}, {high:.3f}], holds 1."
        share = row.get("share_of_predicted_saving")
        if share is not None and row["batch"] == 1 and share < PROMISED:
            yield f"{batch}, {100 * share:.0f} % of the predicted saving is there, less than {100 * PROMISED:.0f} %."


def gates_text(gates: dict[str, Any]) -> str:
    """The gate for a terminal: a table for each method, then policy and roles, then what is weaker."""
    tables = [as_text(SUMMARY_HEAD, gates_rows(gates, family)[0]) for family in gates["methods"]]
    agreed = [agreement_words(family, method) for family, method in gates["methods"].items()]
    promises = [
        f"{method_name(family)}, seed {seed['seed']}: {seed['guarantee']['text']}."
        for family, method in gates["methods"].items()
        for seed in method["seeds"]
        if seed.get("guarantee")
    ]
    weak = [f"- {line}" for line in weaknesses(gates)]
    facts = "\n".join([policy_words(gates), data_words(gates), *promises, *agreed])
    return "\n\n".join([*tables, facts, *(["\n".join(["What is weaker:", *weak])] if weak else [])])
