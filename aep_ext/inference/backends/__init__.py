"""The engines that can run the units of a network, by name."""

from __future__ import annotations

import importlib
import importlib.util

from aep_ext.inference.backends.chain import Chain, Engine, Settings

__all__ = ["BACKENDS", "Chain", "Engine", "Settings", "engine_class", "missing"]

BACKENDS = ("openvino", "onnxruntime", "inductor", "eager")
"""In the order in which ``auto`` tries them."""

_CLASSES = {
    "openvino": ("openvino", "OpenVINOEngine"),
    "onnxruntime": ("onnxruntime", "ONNXRuntimeEngine"),
    "inductor": ("inductor", "InductorEngine"),
    "eager": ("eager", "EagerEngine"),
}
_PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}


def missing(backend: str) -> str | None:
    """Why the packages of ``backend`` cannot be had, in one line; None if they are all installed."""
    absent = [name for name in _PACKAGES.get(backend, ()) if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"backend '{backend}' needs {', '.join(absent)}: pip install 'aep_ext[{backend}]'"


def engine_class(backend: str) -> type[Engine]:
    """The class that builds the units on ``backend``."""
    module, name = _CLASSES[backend]
    return getattr(importlib.import_module(f"aep_ext.inference.backends.{module}"), name)
