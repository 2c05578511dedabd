"""The one place where OpenVINO is imported: without the report that its import sends."""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType

__all__ = ["import_openvino"]

_TELEMETRY = "openvino_telemetry"
_LOCK = threading.Lock()


def import_openvino() -> ModuleType:
    """The module ``openvino``.

    Its import sends a report to OpenVINO's makers over the network, from a process that it forks (which is also unsafe
    beside torch's threads). While it is imported here, its telemetry package cannot be found, so that it takes the stub
    that it keeps for this case, for good. Where a user has imported ``openvino`` before, the report is out already.
    """
    if "openvino" not in sys.modules:
        with _LOCK:
            _import_without_telemetry()
    return importlib.import_module("openvino")  # waits where another thread is still importing it


def _import_without_telemetry() -> None:
    if "openvino" in sys.modules:
        return
    absent = object()
    before = sys.modules.get(_TELEMETRY, absent)
    sys.modules[_TELEMETRY] = None
    try:
        importlib.import_module("openvino")
    finally:
        if before is absent:
            sys.modules.pop(_TELEMETRY, None)
        else:
            sys.modules[_TELEMETRY] = before
