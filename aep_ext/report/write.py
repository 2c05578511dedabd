"""Write a run's report into its folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from aep_ext._io import read_arrays, write_bytes, write_text
from aep_ext._utils import UserError, require
from aep_ext.report import numbers, summary, tables
from aep_ext.report.plots import Plot, plots
from aep_ext.report.results import delivered_model, delivered_part, read_results


def write_report(folder: str | Path) -> Path:
    """Make ``report.html`` and ``figures/*.png`` from ``results.json`` and, where it is there, ``examples.npz``.

    Returns:
        The path of ``report.html``.

    Raises:
        UserError: there are no results, one of the files is damaged, or a package of the extra [train] is missing.
            Nothing is written then.
    """
    folder = Path(folder)
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no results: {path} is not there (an unfinished run goes on with --resume)")
    results = read_results(path)
    drawn = plots(results, _example_images(folder, results))
    html = page(results, drawn)
    for plot in drawn.values():
        write_bytes(folder / "figures" / f"{plot.name}.png", plot.png)
    return write_text(folder / "report.html", html)


def page(results: dict[str, Any], drawn: dict[str, Plot]) -> str:
    """The report as one HTML file that loads nothing.

    Args:
        results: the content of ``results.json``.
        drawn: plots by name, see :func:`aep_ext.report.plots.plots`.
    """
    jinja2 = require("jinja2", "train", "the report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("aep_ext.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= vars(numbers)
    provenance = {key: results[key] for key in ("config", "recipe", "environment", "data", "calibration")}
    gated = [name for name, kinds in results["summary"]["methods"].items() if kinds["gated"]]
    return environment.get_template("report.html.j2").render(
        results=results,
        baseline=results["summary"]["baseline"],
        model=delivered_model(results),
        plots=drawn,
        gated=gated,
        tables=tables,
        summary=summary,
        provenance=json.dumps(provenance, indent=1, ensure_ascii=False),
    )


def _example_images(folder: Path, results: dict[str, Any]) -> np.ndarray | None:
    """The example images, uint8 (n, H, W, C) with C 1 or 3; None where there are none."""
    path, gated = folder / "examples.npz", delivered_part(results)["gated"]
    said = gated and gated.get("examples")
    if not path.exists() or not said:
        return None
    try:
        images = read_arrays(path)["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an archive with an array 'images': {error}") from error
    count = len(said["early"]) + len(said["late"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) != count:
        raise UserError(
            f"{path}: images must be uint8 of shape ({count}, H, W, 1 or 3), as many as results.json names, "
            f"got {images.dtype} of shape {images.shape}"
        )
    return images
