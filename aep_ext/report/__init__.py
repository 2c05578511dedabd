"""Reports: tables, plots and a page, made from a run's ``results.json`` alone."""

from __future__ import annotations

from aep_ext.report.results import check_results, read_results
from aep_ext.report.tables import bench_markdown, gates_markdown, results_markdown, text_table
from aep_ext.report.write import write_report

__all__ = [
    "bench_markdown",
    "check_results",
    "gates_markdown",
    "read_results",
    "results_markdown",
    "text_table",
    "write_report",
]
