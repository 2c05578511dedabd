"""Termination: when a sample's answer is good enough to stop, what stopping does (simulated), and doing it."""
from __future__ import annotations

from .agreement import near_threshold
from .choice import StageCosts
from .executor import GatedOutput
from .gated import GatedNet
from .policies import POLICIES, Confidence, Custom, Entropy, Judged, Margin, Patience, Policy, Vote, as_policy
from .refill import Refill
from .simulate import Simulation, simulate

__all__ = [
    "POLICIES", "Confidence", "Custom", "Entropy", "GatedNet", "GatedOutput", "Judged", "Margin", "Patience", "Policy",
    "Refill", "Simulation", "StageCosts", "Vote", "as_policy", "near_threshold", "simulate",
]
