"""Deploy: what is delivered. Networks, full, pruned or gated, as ``model.safetensors`` + ``model.json``, or prepared
for an engine."""

from __future__ import annotations

from aep_ext.export.save_load import describe, load, save
from aep_ext.inference.compile import prepare
from aep_ext.inference.compiled_net import PreparedNet
from aep_ext.inference.gates import Gated, Gates
from aep_ext.inference.verify import Verification

__all__ = ["Gated", "Gates", "PreparedNet", "Verification", "describe", "load", "prepare", "save"]
