"""Inference: when an answer is good enough to stop, and running networks that do."""

from __future__ import annotations

from aep_ext.inference.batching import ContinuousBatcher
from aep_ext.inference.collect import collect_logits
from aep_ext.inference.compile import compile
from aep_ext.inference.compiled_net import CompiledNet, Verification
from aep_ext.inference.criteria import CRITERIA, ExitState
from aep_ext.inference.executor import GatedOutput
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.gated_net import GatedNet
from aep_ext.inference.simulate import Simulation, near_threshold, simulate
from aep_ext.inference.stage_profile import StageProfile

__all__ = [
    "CRITERIA",
    "CompiledNet",
    "ContinuousBatcher",
    "ExitPolicy",
    "ExitState",
    "GatedNet",
    "GatedOutput",
    "Simulation",
    "StageProfile",
    "Verification",
    "collect_logits",
    "compile",
    "near_threshold",
    "simulate",
]
