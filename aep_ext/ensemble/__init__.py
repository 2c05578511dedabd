"""Ensemble: how much each exit counts, in the training loss and in the answer."""
from __future__ import annotations

from .exit_weights import ExitWeights
from .loss import JointCrossEntropy

__all__ = ["ExitWeights", "JointCrossEntropy"]
