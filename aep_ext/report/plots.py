"""The plots of a run, by matplotlib: accuracy against cost, training curves, exits taken, example images."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from aep_ext._utils import require
from aep_ext.report.numbers import exits, method_name, relative
from aep_ext.report.results import delivered_part
from aep_ext.report.tables import models

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LIGHT = "#1f2937", "#6b7280", "#d1d5db"
BLUE, ORANGE, GREEN, VIOLET = "#2563eb", "#ea580c", "#059669", "#7c3aed"
STYLE = {
    "font.size": 10,
    "axes.edgecolor": LIGHT,
    "axes.grid": True,
    "grid.color": "#eceff3",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "aep_ext",  # the same file from the same run
}
MOST_CLASSES = 20
"""Up to so many classes have a bar each; of more, the cheapest and the dearest half as many."""


@dataclass(frozen=True)
class Plot:
    """One plot: its name (of the file), what it shows in words, and as PNG and SVG files."""

    name: str
    label: str
    png: bytes
    svg: bytes

    @property
    def uri(self) -> str:
        """The SVG as an address that stands inside a page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


def plots(results: dict[str, Any], images: np.ndarray | None = None) -> dict[str, Plot]:
    """Every plot of a run by name: ``tradeoff``, ``examples``, and of each method ``subsets-``, ``curves-`` and
    ``exits-METHOD``, as far as the run has what they show.

    Args:
        results: the content of ``results.json``.
        images: uint8 (n, H, W, C) of the delivered model's examples, the early ones first; None: no such plot.

    Raises:
        UserError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "train", "the report")
    made = {}
    with matplotlib.rc_context(STYLE):
        for name, label, figure in _figures(results, images):
            png, svg = io.BytesIO(), io.BytesIO()
            figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
            made[name] = Plot(name, label, png.getvalue(), svg.getvalue())
    return made


def _figures(results: dict[str, Any], images: np.ndarray | None) -> Iterator[tuple[str, str, Figure]]:
    yield "tradeoff", "Test top-1 against multiply-adds of every kind of network", tradeoff(results)
    for method, kinds in results["summary"]["methods"].items():
        name = method_name(method)
        if kinds["subsets"]:
            yield (
                f"subsets-{method}",
                f"{name}: validation top-1 of every subset of the exits",
                subsets(results, method),
            )
        if all(seed["methods"][method]["training"] for seed in results["seeds"]):
            yield f"curves-{method}", f"{name}: validation accuracy over the epochs", curves(results, method)
        if any(seed["methods"][method]["gated"] for seed in results["seeds"]):
            yield f"exits-{method}", f"{name}: share of each class that left at each exit", exits_taken(results, method)
    if images is not None and len(images):
        yield "examples", "Test images that left early and late, with label and answer", examples(results, images)


def _axes(height: float = 4.2, width: float = 5.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _scale(values: Sequence[float]) -> tuple[float, str]:
    """The unit in which counts like these are best written: its size, and the label of the axis."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if max(values) >= size:
            return size, f"multiply-adds ({name})"
    return 1.0, "multiply-adds"


_LOOK: dict[str, dict[str, Any]] = {
    "baseline": {"marker": "X", "s": 90, "color": INK, "label": "single exit", "zorder": 6},
    "full": {"marker": "s", "s": 55, "color": VIOLET, "label": "all exits", "zorder": 4},
    "pruned": {"marker": "D", "s": 50, "color": BLUE, "label": "pruned", "zorder": 4},
    "smallest": {"marker": "o", "s": 45, "color": GREEN, "label": "smallest in margin", "zorder": 4},
    "selected": {"marker": "*", "s": 90, "color": ORANGE, "label": "chosen subset", "zorder": 5},
    "gated": {"marker": "P", "s": 80, "color": ORANGE, "label": "gated", "zorder": 5},
    "static": {"marker": "^", "s": 50, "color": GREY, "label": "static network", "zorder": 3},
}


def tradeoff(results: dict[str, Any]) -> Figure:
    """Mean test top-1 against mean multiply-adds; lines are the thresholds of the delivered method, one a seed; bars
    span the seeds. A ring marks what was delivered."""
    rows, delivered = list(models(results)), results["delivered"]
    size, label = _scale([row[3]["macs"]["mean"] for row in rows])
    figure, axis = _axes()
    for _, method, kind, model in rows:
        x, y, values = model["macs"]["mean"] / size, 100 * model["top1"]["mean"], model["top1"]["values"]
        axis.scatter(x, y, edgecolor="white", linewidth=0.6, **_LOOK[kind])
        axis.vlines(x, 100 * min(values), 100 * max(values), color=_LOOK[kind]["color"], alpha=0.35, zorder=1)
        if (method, kind) == (delivered["method"], delivered["kind"]):
            axis.scatter(x, y, s=260, facecolor="none", edgecolor=ORANGE, linewidth=1.8, label="delivered", zorder=7)
            change = f"{relative(model['macs']['mean'], rows[0][3]['macs']['mean'])} multiply-adds"
            axis.annotate(change, (x, y), xytext=(-14, 8), textcoords="offset points", ha="right", color=ORANGE)
    axis.axhline(100 * rows[0][3]["top1"]["mean"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5, zorder=1)
    low = axis.get_ylim()[0]  # points and lines far below what matters are cut off
    for number, seed in enumerate(results["seeds"]):
        gated = seed["methods"][delivered["method"]]["gated"]
        if gated and gated["curve"]:
            curve = np.array(sorted((row["mean_macs"] / size, 100 * row["test_top1"]) for row in gated["curve"]))
            name = "_" if number else "gated, by threshold"
            axis.plot(*curve.T, color=ORANGE, linewidth=1.1, alpha=0.5, label=name, zorder=2)
    right = 1.06 * max(row[3]["macs"]["mean"] for row in rows) / size
    top = min(axis.get_ylim()[1], 100.2)
    axis.set(xlabel=f"mean {label}", ylabel="test top-1 (%)", xlim=(0, right), ylim=(low, top))
    _legend(figure, axis)
    return figure


def _legend(figure: Figure, axis: Axes, columns: int = 3) -> None:
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=columns, markerscale=0.8)


def subsets(results: dict[str, Any], method: str) -> Figure:
    """Validation top-1 of every subset of the exits against its multiply-adds, the Pareto front, and, where the run
    chose for an objective, the chosen subset and the constraints."""
    kinds, baseline = results["summary"]["methods"][method], results["summary"]["baseline"]
    rows = sorted(kinds["subsets"], key=lambda row: (row["macs"], -row["top1"]["mean"]))
    front = [row for row in rows if row.get("front")]
    size, label = _scale([row["macs"] for row in rows])
    mean_top1 = {tuple(row["exits"]): row["top1"]["mean"] for row in rows}
    chosen = {tuple(subset) for subset in kinds["pruned"]["exits"]}
    figure, axis = _axes()
    for row in rows:
        kept = tuple(row["exits"]) in chosen
        color, area, name = (BLUE, 60, "kept by pruning") if kept else (GREY, 20, "other")
        axis.scatter(row["macs"] / size, 100 * row["top1"]["mean"], zorder=4, color=color, s=area, label=name)
    x, y = [row["macs"] / size for row in front], [100 * row["top1"]["mean"] for row in front]
    if front:
        axis.plot(x, y, color=BLUE, linewidth=1.2, label="Pareto front", zorder=3)
    choices = [part["selected"]["selection"] for part in _selected(results, method)]
    for choice in choices:
        ring: dict[str, Any] = {"s": 190, "facecolor": "none", "edgecolor": ORANGE, "linewidth": 1.8, "zorder": 5}
        name = f"chosen: {choice['objective']}"
        axis.scatter(choice["macs"] / size, 100 * mean_top1[tuple(choice["exits"])], label=name, **ring)
        line: dict[str, Any] = {
            "color": ORANGE,
            "linewidth": 1.0,
            "linestyle": (0, (2, 2)),
            "label": "constraint",
            "zorder": 2,
        }
        if "top1" in choice["limits"]:
            axis.axhline(100 * choice["limits"]["top1"], **line)
        if "macs" in choice["limits"]:
            axis.axvline(choice["limits"]["macs"] / size, **line)
    shown = None
    for row, across, up in reversed(list(zip(front, x, y, strict=True))):
        if shown is None or shown - across > 0.04 * max(x):  # names of neighbours would lie on each other
            offset: dict[str, Any] = {"xytext": (-4, 6), "textcoords": "offset points", "ha": "right"}
            axis.annotate(exits(row["exits"]), (across, up), fontsize=8, color=BLUE, **offset)
            shown = across
    if baseline.get("val_top1"):
        level = 100 * baseline["val_top1"]["mean"]
        axis.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), label="single exit")
    right = 1.06 * max(row["macs"] for row in rows) / size
    axis.set(xlabel=label, ylabel="validation top-1 (%)", xlim=(0, right), title=method_name(method))
    _legend(figure, axis, 2)
    return figure


def _selected(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's trained models that have a chosen subset."""
    return [part for seed in results["seeds"] if (part := seed["methods"][method]).get("selected")]


def curves(results: dict[str, Any], method: str) -> Figure:
    """Validation top-1 of every exit, of their ensemble and of the single-exit network; bands span the seeds."""
    colors = require("matplotlib", "train", "the report").colormaps["viridis_r"]
    count = results["network"]["exits"]
    figure, axis = _axes()
    histories = [seed["methods"][method]["training"]["history"] for seed in results["seeds"]]
    for e in range(count):
        color = colors(0.15 + 0.8 * e / max(1, count - 1))
        _curve(axis, histories, f"val/exit{e}_top1", color=color, linewidth=1.2, label=f"exit {e + 1}")
    _curve(axis, histories, "val/top1", color=ORANGE, linewidth=2.0, label="all exits together")
    alone = [seed["baseline"]["training"] for seed in results["seeds"]]
    if all(alone):
        style = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3)), "label": "single exit"}
        _curve(axis, [training["history"] for training in alone], "val/top1", **style)
    axis.locator_params("x", integer=True)
    axis.set(xlabel="epoch", ylabel="validation top-1 (%)", title=method_name(method))
    _legend(figure, axis)
    return figure


def _curve(axis: Axes, histories: Sequence[Sequence[dict[str, Any]]], key: str, **style: Any) -> None:
    """The mean over the seeds, as far as every seed has a value."""
    length = min(len(history) for history in histories)
    found = ([history[epoch].get(key) for history in histories] for epoch in range(length))
    rows = {n: [100 * value for value in row if value is not None] for n, row in enumerate(found, 1) if None not in row}
    if not rows:
        return
    axis.plot(list(rows), [sum(row) / len(row) for row in rows.values()], **style)
    if len(histories) > 1:
        low, high = ([bound(row) for row in rows.values()] for bound in (min, max))
        axis.fill_between(list(rows), low, high, color=style["color"], alpha=0.12, linewidth=0)


def exits_by_class(results: dict[str, Any], method: str) -> list[tuple[str, dict[int, float]]]:
    """For all classes together and then for each class, the cheapest first: its name and the share of its test images
    that left at each exit, over all seeds. Of more than 20 classes those in the middle are left out."""
    found = [seed["methods"][method]["gated"] for seed in results["seeds"]]
    found = [gated for gated in found if gated]
    used = sorted({number for gated in found for number in gated["policy"]["exits"]})
    rows = []
    for number in range(max(len(gated["per_class"]) for gated in found)):
        counts, cost = dict.fromkeys(used, 0), 0.0
        for gated in found:
            numbers = gated["policy"]["exits"]
            for e, macs, count in zip(numbers, gated["costs"], gated["per_class"][number], strict=True):
                counts[e] += count
                cost += macs * count
        if total := sum(counts.values()):
            names = results["data"]["classes"]
            rows.append((cost / total, names[number] if number < len(names) else f"class {number}", counts))
    rows.sort(key=lambda row: row[0])
    everything = {e: sum(counts[e] for _, _, counts in rows) for e in used}
    if len(rows) > MOST_CLASSES:
        rows = rows[: MOST_CLASSES // 2] + rows[-MOST_CLASSES // 2 :]
    named = [("all classes", everything), *((name, counts) for _, name, counts in rows)]
    return [(name, {e: count / sum(counts.values()) for e, count in counts.items()}) for name, counts in named]


def exits_taken(results: dict[str, Any], method: str) -> Figure:
    """Stacked bars: the share of each class's test images that left at each exit."""
    colors = require("matplotlib", "train", "the report").colormaps["viridis_r"]
    rows = exits_by_class(results, method)
    figure, axis = _axes(height=1.3 + 0.26 * len(rows))
    places = [index + 0.5 * (index > 0) for index in range(len(rows))]
    left = np.zeros(len(rows))
    for e in rows[0][1]:
        width = np.array([100 * shares[e] for _, shares in rows])
        color = colors(0.15 + 0.8 * e / max(1, results["network"]["exits"] - 1))
        axis.barh(places, width, left=left, height=0.8, color=color, edgecolor="white", label=f"exit {e + 1}")
        left += width
    axis.set_yticks(places, [_short(name) for name, _ in rows])
    axis.grid(False, axis="y")
    ends = {"xlim": (0, 100), "ylim": (places[-1] + 0.6, -0.6)}
    axis.set(xlabel="share of the test images (%)", title=method_name(method), **ends)
    _legend(figure, axis, 4)
    return figure


def _short(text: str, longest: int = 20) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def examples(results: dict[str, Any], images: np.ndarray) -> Figure:
    """Images that left early and images that went to the end, with label, wrong answer (orange), exit, confidence."""
    said, classes = delivered_part(results)["gated"]["examples"], results["data"]["classes"]
    columns = max(len(said["early"]), len(said["late"]), 4)
    figure, _ = _axes(4.4, width=1.3 * columns)
    figure.clear()
    grid = figure.subplots(2, columns)
    for axis in grid.flat:
        axis.set_axis_off()
    grid[0, 0].set_title("left early")
    grid[1, 0].set_title("went to the end")
    places = [*grid[0, : len(said["early"])], *grid[1, : len(said["late"])]]
    for axis, image, one in zip(places, images, [*said["early"], *said["late"]], strict=True):
        axis.imshow(image.squeeze(2) if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
        right = one["label"] == one["predicted"]
        answer = "" if right else f"said {_short(classes[one['predicted']], 12)}\n"
        sure = "" if one["confidence"] is None else f", {one['confidence']:.3f}"
        text = f"{_short(classes[one['label']], 12)}\n{answer}exit {one['exit'] + 1}{sure}"
        style = {"ha": "center", "va": "top", "fontsize": 8, "color": INK if right else ORANGE}
        axis.text(0.5, -0.06, text, transform=axis.transAxes, **style)
    return figure
