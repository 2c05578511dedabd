"""Termination: when an answer is good enough to stop, doing so, and thresholds that can be trusted."""

from __future__ import annotations

from .agreement import near_threshold
from .budget import AccuracyBudget, Budget, CostBudget, RiskBudget, budget_from_dict, budget_to_dict
from .cache import ExitCache
from .calibrate import calibrate, control_risk, from_thresholds
from .calibration import Calibration, GateReport
from .choice import StageCosts
from .curve import ThresholdCurve, Thresholds
from .executor import GatedOutput
from .exit_costs import exit_costs
from .gated import GatedNet
from .graphed import GraphedGatedNet
from .identity import DataIdentity
from .metrics import ExitMetrics, exit_metrics, expected_calibration_error, failure_auroc, probability_metrics
from .path import ThresholdPath, path_losses
from .policies import POLICIES, Confidence, Custom, Entropy, Judged, Margin, Patience, Policy, Vote, as_policy
from .refill import Refill
from .risk import RiskTest, conformal_risk_control, learn_then_test
from .simulate import Simulation, simulate
from .temperature import TemperatureFit, fit_temperature, fit_temperatures
from .terminate import terminate
from .thresholds import ThresholdSearch

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
