"""Export: networks as files, full, pruned or gated."""

from __future__ import annotations

from aep_ext.export.preprocessing import Preprocessing
from aep_ext.export.save_load import describe, load, save

__all__ = ["Preprocessing", "describe", "load", "save"]
