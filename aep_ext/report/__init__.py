"""Reports: tables and figures made from a run's ``results.json`` alone."""

from __future__ import annotations

from .files import UserError
from .page import page
from .tables import text_table
from .write import write_report

__all__ = ["UserError", "page", "text_table", "write_report"]
