"""Ensemble: how much each exit counts, in the training loss and in the answer."""

from __future__ import annotations

from aep_ext.ensemble.loss import JointCrossEntropy
from aep_ext.ensemble.output_weights import OutputWeightsFit, fit_output_weights
from aep_ext.surgery.exit_weights import ExitWeights

__all__ = ["ExitWeights", "JointCrossEntropy", "OutputWeightsFit", "fit_output_weights"]
