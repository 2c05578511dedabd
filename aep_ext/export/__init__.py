"""Export: networks as files, full, pruned or gated, and what they say of images."""

from __future__ import annotations

from aep_ext.export.onnx_file import onnx, set_policy
from aep_ext.export.predict import Prediction, predict
from aep_ext.export.preprocessing import Preprocessing
from aep_ext.export.save_load import describe, load, save

__all__ = ["Prediction", "Preprocessing", "describe", "load", "onnx", "predict", "save", "set_policy"]
