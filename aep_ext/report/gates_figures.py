"""The figures of a gate: accuracy against cost, where each class left, and images that left first and last."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aep_ext._utils import require
from aep_ext.report.figures import BLUE, GREEN, GREY, INK, ORANGE, Drawn, new_figure, render, scale
from aep_ext.report.gates_tables import figure_of, matched_static
from aep_ext.report.gates_words import single_exits
from aep_ext.report.labels import Label, place
from aep_ext.report.numbers import method_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_CLASSES = 20
"""Up to so many classes have a bar each; of more, the earliest and the latest half as many."""
_LONGEST = 20


def short(text: str, longest: int = _LONGEST) -> str:
    """A name that fits beside a bar."""
    line = " ".join(str(text).split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def cost_curve(gates: dict[str, Any]) -> Figure:
    """Test top-1 against mean multiply-adds: the curve of every seed, the point that was chosen, and all rivals."""
    methods = gates["methods"]
    figure, axes = new_figure(len(methods), width=5.2, height=4.9, least=9.2, sharey=True)
    size, unit = scale([*_every_cost(gates)])
    found = {family: _points(gates, method) for family, method in methods.items()}
    low, high = _range(found)
    for axis, (family, method) in zip(axes[0], methods.items(), strict=True):
        axis.set_title(method_name(family))
        axis.set_xlabel(f"mean multiply-adds ({unit})" if unit else "mean multiply-adds")
        room = 0.05 * (high - low)
        axis.set_ylim(low - 1.6 * room, high + 1.6 * room)
        axis.set_xlim(0, 1.1 * max(_every_cost(gates)) / size)
        _curve(axis, method, size)
        _marks(axis, found[family], size, low)
    axes[0][0].set_ylabel("test top-1 (%)")
    named: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=3)
    figure.draw_without_rendering()
    for axis, points in zip(axes[0], found.values(), strict=True):
        _labels(axis, points, size, low)
    return figure


def _every_cost(gates: dict[str, Any]) -> list[float]:
    costs = [entry["macs"] for entry in gates["static"]]
    for method in gates["methods"].values():
        for seed in method["seeds"]:
            report = seed["report"]
            costs += [report[kind]["macs"] for kind in ("pruned", "full", "baseline")]
            costs += [row["macs"] for row in report["each_exit"]] + [row["mean_macs"] for row in seed["curve"]]
    return costs


_LOOK: dict[str, dict[str, Any]] = {
    "gated": {"marker": "*", "s": 230, "color": ORANGE, "label": "gated: the point that was chosen", "zorder": 5},
    "pruned": {"marker": "D", "s": 130, "color": BLUE, "label": "pruned ensemble", "zorder": 4, "hollow": True},
    "full": {
        "marker": "s",
        "s": 110,
        "color": "#7c3aed",
        "label": "ensemble of all exits",
        "zorder": 4,
        "hollow": True,
    },
    "baseline": {"marker": "X", "s": 80, "color": INK, "label": "single-exit baseline", "zorder": 4},
    "exit": {"marker": "o", "s": 30, "color": GREY, "label": "an exit alone", "zorder": 3},
    "static": {"marker": "^", "s": 60, "color": GREEN, "label": "static network, same recipe", "zorder": 3},
}


def _points(gates: dict[str, Any], method: dict[str, Any]) -> list[dict[str, Any]]:
    """What is marked in a method's panel: kind, name, mean multiply-adds, mean top-1 and its range in per cent."""

    def point(kind: str, name: str, macs: float, top1: dict[str, Any], **more: Any) -> dict[str, Any]:
        values = [100 * value for value in top1["values"]]
        return {
            "kind": kind,
            "name": name,
            "macs": macs,
            "top1": 100 * top1["mean"],
            "low": min(values),
            "high": max(values),
            **more,
        }

    summary = method["summary"]
    points = [point("gated", "", summary["mean_macs"]["mean"], summary["gated_top1"])]
    for kind in ("pruned", "full", "baseline"):
        points.append(point(kind, "", figure_of(method, kind, "macs")["mean"], figure_of(method, kind, "top1")))
    for row in single_exits(method):
        points.append(point("exit", f"exit {row['exit'] + 1}", row["macs"]["mean"], row["top1"]))
    matched = matched_static(gates, method)
    for entry in gates["static"]:
        points.append(
            point(
                "static",
                textwrap.fill(short(entry["name"], 36), 18),
                entry["macs"],
                entry["top1"],
                matched=entry is matched,
            )
        )
    return points


def _range(found: dict[str, list[dict[str, Any]]]) -> tuple[float, float]:
    """The accuracies that are shown: those of ensembles and baseline, and rivals only as far as they do not crush
    these."""
    points = [point for part in found.values() for point in part]
    main = min(point["low"] for point in points if point["kind"] not in ("exit", "static"))
    static = min((point["low"] for point in points if point["kind"] == "static"), default=main)
    top = max(point["high"] for point in points)
    span = max(top - main, 1.0)
    low = max(min(point["low"] for point in points), min(main - 2.5 * span, max(static - 0.5 * span, main - 6 * span)))
    return low, max(top, low + 0.5)


def _curve(axis: Axes, method: dict[str, Any], size: float) -> None:
    label = "gated: the curve of thresholds" + (", one line a seed" if len(method["seeds"]) > 1 else "")
    for seed in method["seeds"]:
        if not seed["curve"]:
            continue
        rows = sorted((row["mean_macs"] / size, 100 * row["report_top1"]) for row in seed["curve"])
        axis.plot(
            [x for x, _ in rows],
            [y for _, y in rows],
            color=ORANGE,
            linewidth=1.2,
            alpha=0.45 if len(method["seeds"]) > 1 else 0.9,
            label=label,
            zorder=2,
        )
        label = "_"
    if len(method["seeds"]) > 1:
        gated = [seed["report"]["gated"] for seed in method["seeds"]]
        axis.scatter(
            [row["mean_macs"] / size for row in gated],
            [100 * row["top1"] for row in gated],
            marker="*",
            s=60,
            color=ORANGE,
            edgecolor="white",
            linewidth=0.5,
            zorder=4,
        )


def _marks(axis: Axes, points: Sequence[dict[str, Any]], size: float, low: float) -> None:
    seen: set[str] = set()
    for point in points:
        kind, x, look = point["kind"], point["macs"] / size, dict(_LOOK[point["kind"]])
        if point["top1"] < low:
            axis.plot(x, low, marker="v", color=look["color"], markersize=5, clip_on=False, zorder=3)
            continue
        look["label"] = "_" if kind in seen else look["label"]
        seen.add(kind)
        color = look.pop("color")
        inside, edge = ("none", color) if look.pop("hollow", False) else (color, "white")
        axis.scatter(
            x, point["top1"], facecolor=inside, edgecolor=edge, linewidth=1.8 if edge == color else 0.7, **look
        )
        look["color"] = color
        if point["high"] > point["low"]:
            axis.vlines(x, max(low, point["low"]), point["high"], color=look["color"], alpha=0.4, zorder=1)
        if point.get("matched"):
            axis.scatter(
                x,
                point["top1"],
                s=190,
                facecolor="none",
                edgecolor=GREEN,
                linewidth=1.6,
                label="cheapest static one not below the gated",
                zorder=3,
            )
        if kind == "baseline":
            axis.axhline(point["top1"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5, zorder=1)


def _labels(axis: Axes, points: Sequence[dict[str, Any]], size: float, low: float) -> None:
    labels, plain = [], []
    for point in points:
        where = point["macs"] / size, max(low, point["top1"])
        if not point["name"]:
            plain.append(where)
            continue
        text = point["name"] if point["top1"] >= low else f"{point['name']}: {point['top1']:.1f}"
        labels.append(Label(*where, text, _LOOK[point["kind"]]["color"], 8.0 if point.get("matched") else 4.0))
    obstacles = [(x, y, 7.0) for x, y in plain]
    for line in axis.get_lines():
        if line.get_color() == ORANGE:
            x, y = np.asarray(line.get_xydata()).T
            steps = np.arange(0, len(x) - 1 + 1e-9, 0.2)  # a line is an obstacle between its points too
            obstacles += [
                (*pair, 1.5) for pair in zip(*(np.interp(steps, np.arange(len(x)), v) for v in (x, y)), strict=True)
            ]
    level = next(point["top1"] for point in points if point["kind"] == "baseline")
    obstacles += [(float(x), level, 1.5) for x in np.linspace(*axis.get_xlim(), 80)]
    place(axis, labels, obstacles)


def histograms(gates: dict[str, Any], classes: Sequence[str]) -> Figure:
    """The share of each class's test images that left at each exit, over all seeds; the earliest classes first."""
    colormap = require("matplotlib", "train", "the report").colormaps["viridis_r"]
    methods = gates["methods"]
    counted = {family: exits_by_class(method, classes) for family, method in methods.items()}
    numbers = sorted({number for _, used in counted.values() for number in used})
    most = max(number for seed in _seeds(gates) for number in [*seed["exits"], *_all_exits(seed)])
    color = {number: colormap(0.15 + 0.8 * number / max(1, most)) for number in numbers}
    bars = max(len(rows) for rows, _ in counted.values())
    figure, axes = new_figure(len(methods), width=5.2, height=1.5 + 0.27 * bars, least=9.2)
    for axis, (family, (rows, used)) in zip(axes[0], counted.items(), strict=True):
        places = [row["place"] for row in rows]
        left = np.zeros(len(rows))
        for number in used:
            width = np.array([100 * row["shares"].get(number, 0.0) for row in rows])
            axis.barh(
                places,
                width,
                left=left,
                height=0.78,
                color=color[number],
                edgecolor="white",
                linewidth=0.6,
                label=f"left at exit {number + 1}",
            )
            left += width
        axis.set_yticks(places, [short(row["name"]) for row in rows])
        axis.set_ylim(max(places) + 0.6, min(places) - 0.6)
        axis.set_xlim(0, 100)
        axis.grid(False, axis="y")
        axis.set_title(method_name(family))
        axis.set_xlabel("share of the test images (%)")
    named: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    ordered = sorted(named, key=lambda label: int(label.rsplit(" ", 1)[1]))
    figure.legend([named[label] for label in ordered], ordered, loc="outside lower center", ncols=min(4, len(ordered)))
    return figure


def _seeds(gates: dict[str, Any]) -> list[dict[str, Any]]:
    return [seed for method in gates["methods"].values() for seed in method["seeds"]]


def _all_exits(seed: dict[str, Any]) -> list[int]:
    return [row["exit"] for row in seed["report"]["each_exit"]]


def exits_by_class(method: dict[str, Any], classes: Sequence[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The bars of a method: ``name``, ``place`` on the axis and ``shares`` of a class's images by exit, of all seeds
    together; and the exits that occur.

    The first bar is all classes; then the classes in order of the mean multiply-adds of their images, the cheapest
    first. Of more than 20 classes those in the middle are left out.
    """
    used = sorted({number for seed in method["seeds"] for number in seed["exits"]})
    rows = []
    for number in range(max(len(seed["per_class"]) for seed in method["seeds"])):
        counts, cost = dict.fromkeys(used, 0), 0.0
        for seed in method["seeds"]:
            for exit_id, macs, count in zip(seed["exits"], seed["costs"], seed["per_class"][number], strict=True):
                counts[exit_id] += count
                cost += macs * count
        total = sum(counts.values())
        if total:
            name = classes[number] if number < len(classes) else f"class {number}"
            rows.append({"name": name, "counts": counts, "total": total, "cost": cost / total})
    rows.sort(key=lambda row: row["cost"])
    everything = {
        "name": "all classes",
        "counts": {number: sum(row["counts"][number] for row in rows) for number in used},
        "total": sum(row["total"] for row in rows),
        "place": 0.0,
    }
    half = MOST_CLASSES // 2
    kept = rows if len(rows) <= MOST_CLASSES else rows[:half] + rows[-half:]
    for index, row in enumerate(kept):
        row["place"] = index + 1.5 + (1.0 if kept is not rows and index >= half else 0.0)
    for row in [everything, *kept]:
        row["shares"] = {number: count / row["total"] for number, count in row["counts"].items() if row["total"]}
    return [everything, *kept], used


def example_images(examples: dict[str, Any], images: np.ndarray, classes: Sequence[str]) -> Figure:
    """The images that left first, and those that went to the end, with label, answer, exit and confidence."""
    parts = [(name, examples[name]) for name in ("first", "last") if examples[name]]
    columns = max(len(part) for _, part in parts)
    figure, axes = new_figure(columns, len(parts), width=1.3, height=2.15, least=10.4, layout=None)
    # By hand: an automatic layout widens the first column to hold the title, which stands over all of them.
    height = figure.get_figheight()
    figure.subplots_adjust(0.005, 0.62 / height, 0.995, 1 - 0.28 / height, wspace=0.08, hspace=0.78)
    titles = {"first": "left first, the surest before the others", "last": "went to the end, the least sure first"}
    start = 0
    for row, (name, part) in enumerate(parts):
        for column in range(columns):
            axis = axes[row][column]
            axis.set_axis_off()
            if column >= len(part):
                continue
            image, found = images[start + column], part[column]
            grey = image.shape[2] == 1
            axis.imshow(
                image[:, :, 0] if grey else image,
                cmap="gray" if grey else None,
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
            right = found["label"] == found["predicted"]
            said = "" if right else f"said {_class(classes, found['predicted'])}\n"
            sure = "-" if found["confidence"] is None else f"{found['confidence']:.3f}"
            axis.text(
                0.5,
                -0.06,
                f"{_class(classes, found['label'])}\n{said}exit {found['exit'] + 1}, {sure}",
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                linespacing=1.35,
                color=INK if right else ORANGE,
            )
        axes[row][0].set_title(titles[name])
        start += len(part)
    return figure


def _class(classes: Sequence[str], number: int) -> str:
    return short(classes[number] if number < len(classes) else f"class {number}", 14)


def draw_gates(
    gates: dict[str, Any], classes: Sequence[str], examples: dict[str, Any], images: np.ndarray | None
) -> dict[str, Drawn]:
    """Every figure of a gate by name, as PNG and as SVG that can stand inside a page.

    Args:
        gates: the content of ``gates.json``.
        classes: names of the classes.
        examples: the entry ``examples`` of the network whose images these are.
        images: uint8 (n, H, W, C), those that left first, then those that left last; None: no such figure.
    """
    methods = ", ".join(method_name(family) for family in gates["methods"])
    figures = {
        "gates-cost": (
            lambda: cost_curve(gates),
            f"Test top-1 against mean multiply-adds for {methods}: gated network, pruned and full ensemble, "
            "single-exit baseline, every exit alone, static networks",
        ),
        "gates-classes": (
            lambda: histograms(gates, classes),
            f"Stacked bars for {methods}: share of each class's test images that left at each exit",
        ),
    }
    if images is not None and len(images):
        figures["gates-examples"] = (
            lambda: example_images(examples, images, classes),
            "Test images that left first and test images that went to the end, with label, answer, exit and confidence",
        )
    return {name: render(name, make, label) for name, (make, label) in figures.items()}
