"""Deploy: what is delivered. Networks, full, pruned or gated, as ``model.safetensors`` + ``model.json``, or prepared
for an engine."""

from __future__ import annotations

from .gates import Gated, Gates
from .prepare import prepare
from .prepared import PreparedNet
from .save_load import describe, load, save
from .verify import Verification

__all__ = ["Gated", "Gates", "PreparedNet", "Verification", "describe", "load", "prepare", "save"]
