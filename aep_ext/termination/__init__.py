"""Termination: when an answer is good enough to stop, doing so, and thresholds that can be trusted."""

from __future__ import annotations

from aep_ext.calibration.budgets import AccuracyBudget, Budget, CostBudget, RiskBudget, budget_from_dict, budget_to_dict
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.calibrate import calibrate, control_risk, from_thresholds
from aep_ext.calibration.calibration import Calibration, GateReport
from aep_ext.calibration.curve import ThresholdCurve, Thresholds
from aep_ext.calibration.exit_costs import exit_costs
from aep_ext.calibration.identity import DataIdentity
from aep_ext.calibration.metrics import (
    ExitMetrics,
    exit_metrics,
    expected_calibration_error,
    failure_auroc,
    probability_metrics,
)
from aep_ext.calibration.path import ThresholdPath, path_losses
from aep_ext.calibration.risk_control import RiskTest, conformal_risk_control, learn_then_test
from aep_ext.calibration.temperature import TemperatureFit, fit_temperature, fit_temperatures
from aep_ext.calibration.terminate import terminate
from aep_ext.calibration.thresholds import ThresholdSearch
from aep_ext.inference._old_criteria import (
    POLICIES,
    Confidence,
    Custom,
    Entropy,
    Judged,
    Margin,
    Patience,
    Policy,
    Vote,
    as_policy,
)
from aep_ext.inference.agreement import near_threshold
from aep_ext.inference.batching import Refill
from aep_ext.inference.cuda_graph import GraphedGatedNet
from aep_ext.inference.executor import GatedOutput
from aep_ext.inference.gated_net import GatedNet
from aep_ext.inference.simulate import Simulation, simulate
from aep_ext.inference.stage_profile import StageCosts

__all__ = [
    "AccuracyBudget",
    "Budget",
    "Calibration",
    "Confidence",
    "CostBudget",
    "Custom",
    "DataIdentity",
    "Entropy",
    "ExitCache",
    "ExitMetrics",
    "GateReport",
    "GatedNet",
    "GatedOutput",
    "GraphedGatedNet",
    "Judged",
    "Margin",
    "POLICIES",
    "Patience",
    "Policy",
    "Refill",
    "RiskBudget",
    "RiskTest",
    "Simulation",
    "StageCosts",
    "TemperatureFit",
    "ThresholdCurve",
    "ThresholdPath",
    "ThresholdSearch",
    "Thresholds",
    "Vote",
    "as_policy",
    "budget_from_dict",
    "budget_to_dict",
    "calibrate",
    "conformal_risk_control",
    "control_risk",
    "exit_costs",
    "exit_metrics",
    "expected_calibration_error",
    "failure_auroc",
    "fit_temperature",
    "fit_temperatures",
    "from_thresholds",
    "learn_then_test",
    "near_threshold",
    "path_losses",
    "probability_metrics",
    "simulate",
    "terminate",
]
