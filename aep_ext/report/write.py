"""Write a run's report into its folder."""

from __future__ import annotations

from pathlib import Path

from .figures import draw
from .files import UserError, read_json, write_bytes, write_text
from .page import page

RUN_FORMAT = "aep_ext.run"


def write_report(folder: str | Path) -> Path:
    """Make ``report.html`` and ``figures/*.png`` from ``results.json``, the only file that is read.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: there are no results, or they are not those of a run; or matplotlib is not installed.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no results: {path} is not there (an unfinished run goes on with --resume)")
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != RUN_FORMAT:
        raise UserError(f"{path} is not a run's result file")
    figures = draw(results)
    for name, (png, _) in figures.items():
        write_bytes(folder / "figures" / f"{name}.png", png)
    return write_text(folder / "report.html", page(results, {name: svg for name, (_, svg) in figures.items()}))
