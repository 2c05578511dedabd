"""Termination: when a sample's answer is good enough to stop, and what stopping does, simulated on cached logits."""
from __future__ import annotations

from .policies import POLICIES, Confidence, Custom, Entropy, Judged, Margin, Patience, Policy, Vote, as_policy
from .simulate import Simulation, simulate

__all__ = [
    "POLICIES", "Confidence", "Custom", "Entropy", "Judged", "Margin", "Patience", "Policy", "Simulation", "Vote",
    "as_policy", "simulate",
]
