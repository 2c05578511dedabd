"""The gate of a finished run: which exits are gated, at which thresholds, and what that does on the test images."""

from __future__ import annotations

from aep_ext.training.gating.job import FORMAT, calibrate_run
from aep_ext.training.gating.settings import CalibrationSettings
from aep_ext.training.gating.text import gates_table

__all__ = ["FORMAT", "CalibrationSettings", "calibrate_run", "gates_table"]
