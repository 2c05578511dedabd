"""Write a run's report into its folder."""

from __future__ import annotations

from pathlib import Path

from aep_ext._io import read_json, write_bytes, write_text
from aep_ext._utils import UserError
from aep_ext.report.figures import draw
from aep_ext.report.gates_figures import draw_gates
from aep_ext.report.gates_file import find_seed, read_bench, read_examples, read_gates
from aep_ext.report.gates_page import gates_section
from aep_ext.report.page import page

RUN_FORMAT = "aep_ext.run"


def write_report(folder: str | Path) -> Path:
    """Make ``report.html`` and ``figures/*.png`` from ``results.json`` and, where they are there, from ``gates.json``
    with ``gates_examples.npz``, and ``bench.json``. No other file is read.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: there are no results, or they are not those of a run; one of the other files is there but not whole;
            or matplotlib is not installed. Nothing is written then.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no results: {path} is not there (an unfinished run goes on with --resume)")
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != RUN_FORMAT:
        raise UserError(f"{path} is not a run's result file")
    gates, bench = read_gates(folder), read_bench(folder)
    shown = find_seed(gates, gates.get("delivered") or results["delivered"]) if gates else None
    examples = shown["examples"] if shown else {"first": [], "last": []}
    images = read_examples(folder, examples) if shown else None
    sections = []
    figures = draw(results)
    if gates is not None:
        drawn = draw_gates(gates, results["data"]["classes"], examples, images)
        sections.append(gates_section(gates, bench, {name: svg for name, (_, svg) in drawn.items()}))
        figures |= drawn
    for name, (png, _) in figures.items():
        write_bytes(folder / "figures" / f"{name}.png", png)
    return write_text(
        folder / "report.html", page(results, {name: svg for name, (_, svg) in figures.items()}, sections)
    )
