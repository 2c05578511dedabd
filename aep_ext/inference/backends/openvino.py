"""OpenVINO on the CPU: one compiled model for each unit, whose output memory is the next one's input.

A model of fixed batch is usually faster than one of free batch, so the batch sizes that matter (one, and the
example's) get models of their own. In memory each kind of model has its own packed weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.backends._import import import_openvino
from aep_ext.inference.backends.chain import Chain, Engine, Settings
from aep_ext.inference.exporting import export, quiet
from aep_ext.inference.segments import Segment

__all__ = ["OpenVINOEngine"]


def _shared(tensor: Tensor) -> Any:
    """An OpenVINO tensor on the memory of a contiguous torch tensor; the caller keeps the latter alive."""
    return import_openvino().Tensor(tensor.numpy(), shared_memory=True)


def _converted(segment: Segment, example: Tensor) -> Any:
    """The unit as an OpenVINO model for any batch, straight from torch.

    By the frontend and not by ``openvino.convert_model``, which does the same but also reports its use to OpenVINO's
    makers over the network, from processes that it forks. (So does the import of ``openvino`` itself, unless it is
    :func:`import_openvino`'s. Where a user has imported it before, that report is out already.)
    """
    openvino = import_openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    with quiet():
        decoder = TorchFXPythonDecoder.from_exported_program(export(segment, example))
        model = frontend.convert(frontend.load(decoder))
    model.reshape(openvino.PartialShape([-1, *example.shape[1:]]))
    return model


class OpenVINOEngine(Engine):
    """CPU, float32. All models share OpenVINO's one pool of threads.

    OpenVINO's ReLU maps NaN to 0: an input that is NaN may give finite logits.
    """

    name = "openvino"

    def __init__(self, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> None:
        openvino = import_openvino()
        self.notices: list[str] = []
        core = openvino.Core()
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": settings.threads,
        }
        if settings.precision == "float32":
            # On CPUs that have it, OpenVINO computes in bfloat16 unless told otherwise.
            options["INFERENCE_PRECISION_HINT"] = "f32"
        free = [_converted(segment, x) for segment, x in zip(segments, inputs, strict=True)]
        self._free = _FreeChain([core.compile_model(model, "CPU", options) for model in free])
        self._bound: dict[int, Chain] = {}
        for n in settings.batches:
            compiled = []
            for model, x in zip(free, inputs, strict=True):
                fixed = model.clone()
                fixed.reshape(openvino.PartialShape([n, *x.shape[1:]]))
                compiled.append(core.compile_model(fixed, "CPU", options))
            self._bound[n] = _BoundChain(compiled)

    def chain(self, n: int) -> Chain:
        return self._bound.get(n, self._free)


class _BoundChain(Chain):
    """Fixed batch: all memory is bound once, and a run is nothing but the units' calls one after another."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._requests = [model.create_infer_request() for model in models]
        self._infer = [request.infer for request in self._requests]
        self._inputs: list[Tensor] = [torch.empty(list(models[0].input(0).shape))]
        # A model without logits (a trunk alone) has its features as only output.
        rows, classes = models[-1].output(0).shape
        self._logits = torch.zeros(len(models), rows, classes)
        for position, (model, request) in enumerate(zip(models, self._requests, strict=True)):
            if position + 1 < len(models):
                features = torch.empty(list(model.output(0).shape))
                self._inputs.append(features)
                shared = _shared(features)
                request.set_output_tensor(0, shared)
                self._requests[position + 1].set_input_tensor(0, shared)
            if position + 1 == len(models) or len(model.outputs) > 1:
                request.set_output_tensor(len(model.outputs) - 1, _shared(self._logits[position]))
        self._own_input = _shared(self._inputs[0])
        self._rows = list(self._logits)
        self._held: Tensor | None = None

    def load(self, unit: int, x: Tensor) -> None:
        if unit:
            self._inputs[unit].copy_(x)
        else:
            self._requests[0].set_input_tensor(0, _shared(x))
            self._held = x

    def gather(self, unit: int, source: Tensor, rows: Tensor) -> None:
        if unit:
            torch.index_select(source, 0, rows, out=self._inputs[unit])
        else:
            super().gather(unit, source, rows)

    def run(self, unit: int) -> Tensor:
        self._infer[unit]()
        return self._rows[unit]

    def features(self, unit: int) -> Tensor:
        return self._inputs[unit + 1]

    def run_all(self) -> Tensor:
        for infer in self._infer:
            infer()
        return self._logits


class _FreeChain(Chain):
    """Any batch: each unit's output tensor, allocated by OpenVINO, is handed on as the next one's input."""

    def __init__(self, models: Sequence[Any]) -> None:
        self._requests = [model.create_infer_request() for model in models]
        self._outputs = [len(model.outputs) for model in models]
        self._held: dict[int, Tensor] = {}

    def load(self, unit: int, x: Tensor) -> None:
        self._requests[unit].set_input_tensor(0, _shared(x))
        self._held[unit] = x

    def run(self, unit: int) -> Tensor:
        request = self._requests[unit]
        request.infer()
        if unit + 1 < len(self._requests):
            self._requests[unit + 1].set_input_tensor(0, request.get_output_tensor(0))
        return torch.from_numpy(request.get_output_tensor(self._outputs[unit] - 1).data)

    def features(self, unit: int) -> Tensor:
        return torch.from_numpy(self._requests[unit].get_output_tensor(0).data)

    def run_all(self) -> Tensor:
        return torch.stack([self.run(unit) for unit in range(len(self._requests))])
