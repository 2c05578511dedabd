"""Ensemble: how much each exit counts, in the training loss and in the answer."""

from __future__ import annotations

from aep_ext.ensemble.loss import EnsembleDistillation, JointCrossEntropy, LearnedLossWeights, PrefixCrossEntropy
from aep_ext.ensemble.output_weights import OutputWeightsFit, fit_output_weights
from aep_ext.surgery.exit_weights import ExitWeights
from aep_ext.surgery.gradient_equilibrium import GradientEquilibrium

__all__ = [
    "EnsembleDistillation",
    "ExitWeights",
    "GradientEquilibrium",
    "JointCrossEntropy",
    "LearnedLossWeights",
    "OutputWeightsFit",
    "PrefixCrossEntropy",
    "fit_output_weights",
]
