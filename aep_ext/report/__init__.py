"""Reports: tables and figures made from a run's result files alone."""

from __future__ import annotations

from .files import UserError
from .gates_words import gates_text
from .page import page
from .tables import text_table
from .write import write_report

__all__ = ["UserError", "gates_text", "page", "text_table", "write_report"]
