"""The figures of a run: accuracy against multiply-adds, curves of every exit, test accuracy of every seed."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aep_ext._utils import require
from aep_ext.report.numbers import exits, method_name
from aep_ext.report.tables import models

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, LIGHT = "#1f2937", "#6b7280", "#d1d5db"
BLUE, ORANGE, GREEN = "#2563eb", "#ea580c", "#059669"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LIGHT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#eceff3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "figure.facecolor": "white",
    "axes.axisbelow": True,
}


Drawn = tuple[bytes, str]
"""A figure as PNG, and as SVG that can stand inside a page."""


def new_figure(
    columns: int,
    rows: int = 1,
    *,
    width: float = 4.6,
    height: float = 3.6,
    least: float = 7.2,
    layout: str | None = "constrained",
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns): ``width`` and ``height`` of each in inches, ``least`` for all columns."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(max(width * columns, least), height * rows), layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def scale(values: Sequence[float]) -> tuple[float, str]:
    """The unit in which counts like these are best written: its size and its letter."""
    largest = max(values)
    return next(((size, unit) for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= size), (1.0, ""))


def _front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The subsets that no cheaper one equals, by mean accuracy; cheapest first."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["macs"], -row["top1"]["mean"])):
        if not front or row["top1"]["mean"] > front[-1]["top1"]["mean"]:
            front.append(row)
    return front


def tradeoff(results: dict[str, Any]) -> Figure:
    """Validation top-1 of every subset against its multiply-adds, with the Pareto front, the chosen ones and the
    baseline."""
    summary = results["summary"]
    methods = summary["methods"]
    figure, axes = new_figure(len(methods), height=4.2, sharey=True)
    size, unit = scale(
        [row["macs"] for method in methods.values() for row in method["subsets"]]
        + [summary["baseline"]["macs"]["mean"]]
    )
    baseline = 100 * summary["baseline"]["select_top1"]["mean"]
    values = sorted(
        [100 * row["top1"]["mean"] for method in methods.values() for row in method["subsets"]] + [baseline]
    )
    top, middle = values[-1], values[len(values) // 2]
    low = max(values[0], min(middle, baseline) - 3 * max(top - middle, 0.5))
    room = 0.08 * max(top - low, 0.2)
    for axis, (family, method) in zip(axes[0], methods.items(), strict=True):
        _tradeoff(axis, method, summary["baseline"], size, low)
        axis.set_title(method_name(family))
        axis.set_xlabel(f"multiply-adds ({unit})" if unit else "multiply-adds")
        axis.set_ylim(low - room, top + 2.4 * room)
        axis.set_xlim(left=0)
    axes[0][0].set_ylabel("validation top-1 (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _tradeoff(axis: Axes, method: dict[str, Any], baseline: dict[str, Any], size: float, low: float) -> None:
    rows = method["subsets"]
    shown = [row for row in rows if 100 * row["top1"]["mean"] >= low]
    hidden = [row for row in rows if 100 * row["top1"]["mean"] < low]
    axis.scatter(
        [row["macs"] / size for row in shown],
        [100 * row["top1"]["mean"] for row in shown],
        s=26,
        color=LIGHT,
        edgecolor=GREY,
        linewidth=0.6,
        label="a subset of the exits",
        zorder=2,
    )
    for row in hidden:
        axis.annotate(
            f"{exits(row['exits'])}: {100 * row['top1']['mean']:.1f}",
            (row["macs"] / size, low),
            (0, 3),
            textcoords="offset points",
            fontsize=7,
            color=GREY,
            ha="center",
        )
        axis.plot(row["macs"] / size, low, marker="v", color=GREY, markersize=5, clip_on=False)
    front = [row for row in _front(rows) if row in shown]
    axis.plot(
        [row["macs"] / size for row in front],
        [100 * row["top1"]["mean"] for row in front],
        color=BLUE,
        linewidth=1.6,
        marker="o",
        markersize=5,
        label="Pareto front",
        zorder=3,
    )
    for row in front:
        axis.annotate(
            exits(row["exits"]),
            (row["macs"] / size, 100 * row["top1"]["mean"]),
            (-3, 6),
            textcoords="offset points",
            fontsize=8,
            color=BLUE,
            ha="right",
        )
        if row["top1"]["std"] is not None:
            axis.vlines(
                row["macs"] / size,
                *(100 * bound(row["top1"]["values"]) for bound in (min, max)),
                color=BLUE,
                alpha=0.35,
                zorder=1,
            )
    by_exits = {tuple(row["exits"]): row for row in rows}
    chosen = sorted({tuple(subset) for subset in method["pruned"]["exits"]})
    axis.scatter(
        [by_exits[subset]["macs"] / size for subset in chosen],
        [max(low, 100 * by_exits[subset]["top1"]["mean"]) for subset in chosen],
        s=150,
        marker="*",
        color=ORANGE,
        edgecolor="white",
        linewidth=0.7,
        label="kept by pruning",
        zorder=5,
    )
    if method["compact"]:
        row = by_exits[tuple(method["compact"]["exits"])]
        axis.scatter(
            row["macs"] / size,
            max(low, 100 * row["top1"]["mean"]),
            s=130,
            marker="o",
            facecolor="none",
            edgecolor=GREEN,
            linewidth=1.8,
            label="smallest within the margin",
            zorder=4,
        )
    axis.axhline(100 * baseline["select_top1"]["mean"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.scatter(
        baseline["macs"]["mean"] / size,
        100 * baseline["select_top1"]["mean"],
        marker="X",
        s=70,
        color=INK,
        label="single-exit baseline",
        zorder=4,
    )


def _over_seeds(histories: Sequence[Sequence[dict[str, float]]], key: str) -> tuple[list[int], list[list[float]]]:
    """Epochs that every seed reached, from 1, and each one's values; epochs without a finite value are left out."""
    length = min(len(history) for history in histories)
    rows = [[history[epoch].get(key) for history in histories] for epoch in range(length)]
    kept = [(epoch + 1, row) for epoch, row in enumerate(rows) if all(value is not None for value in row)]
    return [epoch for epoch, _ in kept], [row for _, row in kept]


def _line(axis: Axes, histories: Sequence[Sequence[dict[str, float]]], key: str, factor: float, **style: Any) -> None:
    epochs, rows = _over_seeds(histories, key)
    if not epochs:
        return
    axis.plot(epochs, [factor * sum(row) / len(row) for row in rows], **style)
    if len(rows[0]) > 1:
        axis.fill_between(
            epochs,
            [factor * min(row) for row in rows],
            [factor * max(row) for row in rows],
            color=style["color"],
            alpha=0.12,
            linewidth=0,
        )


def curves(results: dict[str, Any]) -> Figure:
    """Validation accuracy and loss of every exit, of the ensemble and of the baseline over the epochs; bands span the
    seeds."""
    colormap = require("matplotlib", "train", "the report").colormaps["viridis_r"]
    count = results["network"]["exits"]
    families = list(results["summary"]["methods"])
    figure, axes = new_figure(len(families), 2, sharex=True, sharey="row", height=3.0)
    baseline = [seed["baseline"]["fit"]["history"] for seed in results["seeds"]]
    for column, family in enumerate(families):
        histories = [seed["methods"][family]["fit"]["history"] for seed in results["seeds"]]
        above, below = axes[0][column], axes[1][column]
        for number in range(count):
            color = colormap(0.15 + 0.8 * number / max(1, count - 1))
            _line(
                above, histories, f"val/exit{number}_top1", 100, color=color, linewidth=1.2, label=f"exit {number + 1}"
            )
            _line(below, histories, f"val/exit{number}_loss", 1, color=color, linewidth=1.2)
        _line(above, histories, "val/top1", 100, color=ORANGE, linewidth=2.2, label="ensemble of all exits")
        _line(below, histories, "val/loss", 1, color=ORANGE, linewidth=2.2)
        _line(
            above,
            baseline,
            "val/top1",
            100,
            color=INK,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            label="single-exit baseline",
        )
        _line(below, baseline, "val/loss", 1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        above.set_title(method_name(family))
        below.set_xlabel("epoch")
        below.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("validation top-1 (%)")
    axes[1][0].set_ylabel("validation loss (orange: joint)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    return figure


def accuracy(results: dict[str, Any]) -> Figure:
    """Test top-1 of every model: one dot a seed, a bar at the mean."""
    rows = list(models(results))
    figure, axes = new_figure(1, width=7.6, height=0.9 + 0.34 * len(rows))
    axis = axes[0][0]
    for index, (name, model) in enumerate(rows):
        color = INK if index == 0 else GREEN if "within" in name else ORANGE if "pruned" in name else BLUE
        values = [100 * value for value in model["top1"]["values"]]
        axis.scatter(values, [index] * len(values), color=color, s=34, alpha=0.75, zorder=3)
        axis.plot([100 * model["top1"]["mean"]] * 2, [index - 0.28, index + 0.28], color=color, linewidth=2.4, zorder=2)
    axis.axvline(100 * rows[0][1]["top1"]["mean"], color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.invert_yaxis()
    axis.set_xlabel("test top-1 (%)")
    axis.margins(y=0.12 if len(rows) < 5 else 0.06)
    return figure


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tradeoff": (tradeoff, "Validation top-1 of every subset of the exits against its multiply-adds"),
    "curves": (curves, "Validation accuracy and loss of every exit, the ensemble and the baseline over the epochs"),
    "accuracy": (accuracy, "Test top-1 of every model, one dot a seed"),
}


def draw(results: dict[str, Any]) -> dict[str, Drawn]:
    """Every figure of a run by name."""
    return {name: render(name, lambda make=make: make(results), label) for name, (make, label) in FIGURES.items()}


def render(name: str, make: Callable[[], Any], label: str) -> Drawn:
    """One figure in the report's style.

    Args:
        name: of the figure; ids inside the SVG begin with it.
        make: makes the matplotlib figure.
        label: what it shows, for those who cannot see it.
    """
    matplotlib = require("matplotlib", "train", "the report")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = make()
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), inline_svg(svg.getvalue(), name, label)


def inline_svg(text: str, name: str, label: str = "") -> str:
    """A stand-alone SVG file as an element of a page: no prologue, no metadata, no outside address, ids of its own, and
    a label for those who cannot see it."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    told = f' aria-label="{html.escape(label, quote=True)}"' if label else ""
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        lambda found: f'<svg class="figure" role="img"{told} viewBox="{found[1]}">',
        text,
        count=1,
    )
