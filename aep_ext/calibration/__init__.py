"""Calibration: which exits stay and when a network stops early, from cached logits. Only ``terminate`` runs a
network."""

from __future__ import annotations

from aep_ext.calibration.budgets import AccuracyBudget, Budget, CostBudget, RiskBudget
from aep_ext.calibration.cached_logits import CachedLogits
from aep_ext.calibration.calibrate import Calibration, calibrate
from aep_ext.calibration.metrics import ExitMetrics, exit_metrics, expected_calibration_error, failure_auroc
from aep_ext.calibration.selection import Candidate
from aep_ext.calibration.temperature import fit_temperature, fit_temperatures
from aep_ext.calibration.terminate import terminate

__all__ = [
    "AccuracyBudget",
    "Budget",
    "CachedLogits",
    "Calibration",
    "Candidate",
    "CostBudget",
    "ExitMetrics",
    "RiskBudget",
    "calibrate",
    "exit_metrics",
    "expected_calibration_error",
    "failure_auroc",
    "fit_temperature",
    "fit_temperatures",
    "terminate",
]
