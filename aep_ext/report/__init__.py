"""Reports: tables and figures made from a run's result files alone."""

from __future__ import annotations

from aep_ext._utils import UserError
from aep_ext.report.gates_words import gates_text
from aep_ext.report.page import page
from aep_ext.report.tables import text_table
from aep_ext.report.write import write_report

__all__ = ["UserError", "gates_text", "page", "text_table", "write_report"]
