"""Deploy: what is delivered. Networks, full, pruned or gated, as ``model.safetensors`` + ``model.json``."""
from __future__ import annotations

from .save_load import describe, load, save

__all__ = ["describe", "load", "save"]
