"""The engines that can run the segments of a network, by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from torch import Tensor

from aep_ext.inference.backends.engine import Engine, Settings
from aep_ext.inference.segments import Segment

BACKENDS = ("openvino", "onnxruntime", "inductor", "eager")

_PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def missing(backend: str) -> str | None:
    """Why the packages of ``backend`` cannot be had, in one line; None if they are all installed."""
    absent = [name for name in _PACKAGES.get(backend, ()) if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"backend '{backend}' needs {', '.join(absent)}: pip install 'aep_ext[{backend}]'"


def build(backend: str, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> Engine:
    """Compiles ``segments`` on ``backend``; raises whatever the engine raises when it cannot.

    Args:
        backend: one of :data:`BACKENDS`.
        segments: in eval mode.
        inputs: each one's input at the example's batch.
        settings: see :class:`Settings`.
    """
    return importlib.import_module(f"aep_ext.inference.backends.{backend}").build(segments, inputs, settings)
