"""OpenVINO on the CPU: one compiled model for each segment, whose output memory is the next one's input.

Float32. A model of fixed batch is usually faster than one of free batch, so the batch sizes that matter (one, and the
example's) get models of their own, each with its own packed weights. All models share OpenVINO's one pool of threads.
OpenVINO's ReLU maps NaN to 0: an input that is NaN may give finite logits.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.backends.engine import BoundChain, Chain, Engine, Settings
from aep_ext.inference.segments import Segment, exported, quiet

_TELEMETRY = "openvino_telemetry"
_LOCK = threading.Lock()


def import_openvino() -> ModuleType:
    """The module ``openvino``, imported without the report that its import sends to its makers over the network.

    It sends it from a process that it forks (which is also unsafe beside torch's threads). While it is imported here,
    its telemetry package cannot be found, so that it takes the stub that it keeps for this case, for good. Where a user
    has imported ``openvino`` before, the report is out already.
    """
    if "openvino" not in sys.modules:
        with _LOCK:
            sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]  # imports of it fail; no stub has None
            try:
                importlib.import_module("openvino")
            finally:
                if sys.modules.get(_TELEMETRY) is None:
                    sys.modules.pop(_TELEMETRY, None)
    return importlib.import_module("openvino")  # waits where another thread is still importing it


def build(segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> Engine:
    """See :func:`aep_ext.inference.backends.build`."""
    openvino = import_openvino()
    core = openvino.Core()
    options: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": settings.threads,
    }
    if settings.precision == "float32":
        # On CPUs that have it, OpenVINO computes in bfloat16 unless told otherwise.
        options["INFERENCE_PRECISION_HINT"] = "f32"
    models = [_converted(segment, x) for segment, x in zip(segments, inputs, strict=True)]
    bound: dict[int, Chain] = {}
    for n in settings.batches:
        compiled = []
        for model, x in zip(models, inputs, strict=True):
            fixed = model.clone()
            fixed.reshape(openvino.PartialShape([n, *x.shape[1:]]))
            compiled.append(core.compile_model(fixed, "CPU", options))
        bound[n] = _bound(compiled)
    return Engine(_FreeChain([core.compile_model(model, "CPU", options) for model in models]), bound)


def _converted(segment: Segment, example: Tensor) -> Any:
    """The segment as an OpenVINO model for any batch, straight from torch.

    By the frontend and not by ``openvino.convert_model``, which does the same but also reports its use over the
    network, from processes that it forks.
    """
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    with quiet():
        decoder = TorchFXPythonDecoder.from_exported_program(exported(segment, example))
        model = frontend.convert(frontend.load(decoder))
    model.reshape(openvino.PartialShape([-1, *example.shape[1:]]))
    return model


def _shared(tensor: Tensor) -> Any:
    """An OpenVINO tensor on the memory of a contiguous torch tensor; the caller keeps the latter alive."""
    return import_openvino().Tensor(tensor.numpy(), shared_memory=True)


def _bound(models: Sequence[Any]) -> BoundChain:
    requests = [model.create_infer_request() for model in models]
    rows, classes = models[-1].output(0).shape
    inputs, logits = [], torch.zeros(len(models), rows, classes)
    for e, (model, request) in enumerate(zip(models, requests, strict=True)):
        if e + 1 < len(models):
            inputs.append(torch.empty(list(model.output(0).shape)))
            shared = _shared(inputs[-1])
            request.set_output_tensor(0, shared)
            requests[e + 1].set_input_tensor(0, shared)
        request.set_output_tensor(len(model.outputs) - 1, _shared(logits[e]))
    calls = [request.infer for request in requests]
    return BoundChain(calls, lambda x: requests[0].set_input_tensor(0, _shared(x)), inputs, logits)


class _FreeChain(Chain):
    """Any batch: each segment's output tensor, allocated by OpenVINO, is handed on as the next one's input."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._requests = [model.create_infer_request() for model in models]
        self._outputs = [len(model.outputs) for model in models]
        self._held: dict[int, Tensor] = {}

    def load(self, e: int, x: Tensor) -> None:
        self._requests[e].set_input_tensor(0, _shared(x))
        self._held[e] = x

    def run(self, e: int) -> Tensor:
        request = self._requests[e]
        request.infer()
        if e + 1 < len(self._requests):
            self._requests[e + 1].set_input_tensor(0, request.get_output_tensor(0))
        return torch.from_numpy(request.get_output_tensor(self._outputs[e] - 1).data)

    def features(self, e: int) -> Tensor:
        return torch.from_numpy(self._requests[e].get_output_tensor(0).data)
