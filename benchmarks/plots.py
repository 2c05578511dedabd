"""The plot of the kernels' goals: every ratio with its spread, and the goal beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.goals import Finding

_COLOURS = {"best eager": "tab:blue", "torch.compile": "tab:orange", "published loop": "tab:green"}


def plot_goals(findings: Sequence[Finding], path: Path) -> Path:
    """Writes the PNG, whole or not at all; one row for each case, in the order of the goals. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'aep_ext[train]'") from error
    from aep_ext._io import write_atomically

    shown = [finding for finding in findings if finding.value and finding.goal.text in _COLOURS]
    cases = list(dict.fromkeys((finding.goal.subject, finding.case) for finding in shown))
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    seen: set[str] = set()
    for finding in shown:
        text = finding.goal.text
        y = cases.index((finding.goal.subject, finding.case)) + 0.16 * (list(_COLOURS).index(text) - 1)
        half = (finding.spread or 0.0) / 2
        bar = [[min(half, 0.9 * finding.value)], [half]]
        label = None if text in seen else text
        axes.errorbar(finding.value, y, xerr=bar, fmt="o", ms=4, color=_COLOURS[text], label=label, capsize=2)
        axes.plot(finding.goal.at_least, y, "|", ms=9, mew=2, color=_COLOURS[text], alpha=0.55)
        seen.add(text)
    axes.axvline(1, color="grey", lw=0.8)
    axes.plot([], [], "|", ms=9, mew=2, color="grey", label="goal")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("time of the baseline / time of the fused operator (paired median and quartile range)")
    axes.set_yticks(range(len(cases)), [f"{operator} {case}" for operator, case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="x", which="both", lw=0.3)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=130))
