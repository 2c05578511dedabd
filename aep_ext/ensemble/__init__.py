"""Ensemble: how much each exit counts, in the training loss and in the answer."""

from __future__ import annotations

from .exit_weights import ExitWeights
from .loss import JointCrossEntropy
from .output_weights import OutputWeightsFit, fit_output_weights

__all__ = ["ExitWeights", "JointCrossEntropy", "OutputWeightsFit", "fit_output_weights"]
