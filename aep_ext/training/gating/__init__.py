"""The gate of a finished run: which exits are gated, at which thresholds, and what that does on the test images."""

from __future__ import annotations

from .job import FORMAT, calibrate_run
from .settings import CalibrationSettings
from .text import gates_table

__all__ = ["FORMAT", "CalibrationSettings", "calibrate_run", "gates_table"]
