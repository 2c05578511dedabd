"""The operators of early-exit ensembles (torch namespace ``aep``).

Every function runs natively where the extension has kernels for the device of its tensors, and on the pure-torch
reference (:mod:`aep_ext.ops.reference`) elsewhere, with the same results.
"""

from __future__ import annotations

from aep_ext.ops.ensemble import ensemble, ensemble_stats
from aep_ext.ops.gate import gate, gate_one_
from aep_ext.ops.head import global_avg_pool, multi_exit_linear_head
from aep_ext.ops.label_checks import check_labels, is_check_labels_enabled
from aep_ext.ops.losses import joint_cross_entropy, linear_joint_cross_entropy, multi_exit_loss
from aep_ext.ops.subsets import subset_correct
from aep_ext.ops.types import EnsembleStats, GateResult, JointLoss, MultiExitLoss

__all__ = [
    "EnsembleStats",
    "GateResult",
    "JointLoss",
    "MultiExitLoss",
    "check_labels",
    "ensemble",
    "ensemble_stats",
    "gate",
    "gate_one_",
    "global_avg_pool",
    "is_check_labels_enabled",
    "joint_cross_entropy",
    "linear_joint_cross_entropy",
    "multi_exit_linear_head",
    "multi_exit_loss",
    "subset_correct",
]
