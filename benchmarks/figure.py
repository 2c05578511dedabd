"""The figure of the kernels' goals: every ratio with its spread, and the goal beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import Verdict

_COLOURS = {"best eager": "tab:blue", "torch.compile": "tab:orange", "published loop": "tab:green"}


def draw(verdicts: Sequence[Verdict], path: Path) -> Path:
    """Writes the PNG, whole or not at all; one row for each case, in the order of the goals. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("the figure needs matplotlib: pip install 'aep_ext[train]'") from error
    from aep_ext._io import write_atomically

    shown = [v for v in verdicts if v.value and v.goal.against in _COLOURS]
    cases = list(dict.fromkeys((v.goal.operator, v.goal.case) for v in shown))
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen: set[str] = set()
    for verdict in shown:
        colour, against = _COLOURS[verdict.goal.against], verdict.goal.against
        y = cases.index((verdict.goal.operator, verdict.goal.case))
        y += 0.16 * (list(_COLOURS).index(against) - 1)
        half = (verdict.spread or 0.0) / 2
        bar = [[min(half, 0.9 * verdict.value)], [half]]
        label = None if against in seen else against
        axes.errorbar(verdict.value, y, xerr=bar, fmt="o", ms=4, color=colour, label=label, capsize=2)
        axes.plot(verdict.goal.at_least, y, "|", ms=9, mew=2, color=colour, alpha=0.55)
        seen.add(against)
    axes.axvline(1, color="grey", lw=0.8)
    axes.plot([], [], "|", ms=9, mew=2, color="grey", label="goal")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of the rival / time of the fused operator (paired median and quartile range)")
    axes.set_yticks(range(len(cases)), [f"{operator} {case}" for operator, case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="x", which="both", lw=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
