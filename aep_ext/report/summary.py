"""A run in sentences: what was delivered, how it was calibrated, and what limits the figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aep_ext.report.numbers import exits, method_name, percent_spread, points, relative
from aep_ext.report.results import delivered_model, delivered_part

_REFERENCES = {
    "baseline": "the single-exit network",
    "pruned": "the pruned network",
    "ensemble": "the full ensemble",
    "best": "the better of the single-exit network and the full ensemble",
}


def headline(results: dict[str, Any]) -> str:
    """The delivered kind of network against the single-exit one, over all seeds, in a sentence."""
    delivered, base, model = results["delivered"], results["summary"]["baseline"], delivered_model(results)
    text = (
        f"Delivered: {method_name(delivered['method'])}, {delivered['kind']} (seed {delivered['seed']}, exits "
        f"{exits(delivered['exits'])}): {percent_spread(model['top1'])} top-1 on the test images, the single-exit "
        f"network {percent_spread(base['top1'])}"
    )
    if model.get("non_inferiority"):
        text += f" ({points(model['non_inferiority'])} points)"
    text += f"; multiply-adds {relative(model['macs']['mean'], base['macs']['mean'])}"
    return text + (f", latency {relative(model['latency']['ratio'], 1)}." if model.get("latency") else ".")


def budget_words(budget: dict[str, Any], reference: str) -> str:
    """A budget in words; one of an unknown kind by its name and numbers."""
    below = _REFERENCES.get(reference, reference)
    if budget["kind"] == "accuracy" and budget.get("points") is not None:
        return f"at most {budget['points']:g} points of top-1 below {below}"
    if budget["kind"] == "risk" and budget.get("epsilon") is not None:
        sure = f" with probability {1 - budget['delta']:g}" if budget.get("delta") is not None else ""
        return f"at most {100 * budget['epsilon']:g} points of top-1 below {below}{sure}"
    numbers = [f"{key} {value}" for key, value in budget.items() if key != "kind" and value is not None]
    return ", ".join([budget["kind"], *numbers])


def policy_words(results: dict[str, Any]) -> str:
    """Criterion, budget and calibration images in a sentence."""
    said = results["calibration"]
    if said is None:
        return "No gates were calibrated."
    on = {"ensemble": "the ensemble of the exits so far", "exit": "each exit alone"}.get(said["criterion_on"], "")
    images = {"val": "validation", "calibration": "held-out calibration"}.get(said.get("images", ""), "calibration")
    count = f" Calibrated on {said['samples']:,} {images} images." if said.get("samples") else ""
    errors = f" with {said['num_std_errors']:g} standard errors to spare" if said.get("num_std_errors") else ""
    return (
        f"Criterion: {said['criterion']} of {on or said['criterion_on']}. "
        f"Budget: {budget_words(said['budget'], said['reference'])}{errors}.{count}"
    )


def expected_words(results: dict[str, Any]) -> Iterator[str]:
    """What the calibration expected of the delivered gates."""
    gated, asked = delivered_part(results)["gated"], results["calibration"]
    said = (gated or {}).get("calibration") or {}
    if (
        not asked
        or results["delivered"]["kind"] != "gated"
        or said.get("drop_points") is None
        or not said.get("interval")
    ):
        return
    high, low = (-bound + 0.0 for bound in said["interval"])
    yield (
        f"Cross-validation on {said['n']:,} images expected {-said['drop_points'] + 0.0:+.2f} points against "
        f"{_REFERENCES.get(asked['reference'], asked['reference'])} (95 % interval {low:+.2f} to {high:+.2f})."
    )


def agreement_words(results: dict[str, Any], method: str) -> Iterator[str]:
    """Simulator against live network, all seeds together; nothing where that was not compared."""
    found = [seed["methods"][method]["gated"] for seed in results["seeds"]]
    found = [gated["agreement"] for gated in found if gated and gated["agreement"]]
    if not found:
        return
    total = {name: sum(part[name] for part in found) for name in ("n", "differing", "near_threshold")}
    text = (
        f"{method_name(method)}: live network and simulator differ on {total['differing']:,} of {total['n']:,} "
        f"answers; {total['near_threshold']:,} lie at a threshold"
    )
    single = [part["single"] for part in found if part.get("single")]
    if single:
        differing, n = (sum(part[name] for part in single) for name in ("differing", "n"))
        text += f"; one image at a time {differing:,} of {n:,} differ"
    yield text + "."


def caveats(results: dict[str, Any]) -> list[str]:
    """What a reader must not overlook, each once."""
    noted = "\n".join(results["notices"])
    lines = [results["delivered"]["notice"]] if results["delivered"].get("notice") else []
    if len(results["seeds"]) == 1:
        lines.append("One seed only: the spread over trainings is not known.")
    if (looks := results["test_looks"]) > 1 and "have looked at the test images" not in noted:
        lines.append(
            f"The test images were looked at {looks} times: choices made after a look make figures optimistic."
        )
    lines += _of_margin(results)
    for method in results["summary"]["methods"]:
        for seed in results["seeds"]:
            where = f"{method_name(method)}, seed {seed['seed']}"
            lines += [f"{where}: {line}" for line in _of_seed(seed, method) if line not in noted]
    return [line[:1].upper() + line[1:] for line in [*lines, *results["notices"]]]


def _of_margin(results: dict[str, Any]) -> Iterator[str]:
    found = delivered_model(results).get("non_inferiority")
    if not found or found.get("margin") is None or found.get("non_inferior"):
        return
    verb = "is worse than" if found["high"] < -found["margin"] else "is not shown to be inside"
    yield (
        f"On the test images the delivered network {verb} the margin of {100 * found['margin']:g} points: "
        f"{points(found)}."
    )


def _of_seed(seed: dict[str, Any], method: str) -> Iterator[str]:
    gated = seed["methods"][method]["gated"]
    if not gated:
        return
    if not gated["feasible"]:
        yield gated.get("notice") or "nothing is gated."
    guarantee = (gated.get("calibration") or {}).get("guarantee")
    if guarantee:
        yield guarantee["text"] if isinstance(guarantee, dict) and "text" in guarantee else str(guarantee)
    agreement = gated["agreement"]
    apart = sum(part["differing_elsewhere"] for part in (agreement, (agreement or {}).get("single")) if part)
    if apart:
        yield f"live network and simulator differ on {apart} images that are near no threshold."
