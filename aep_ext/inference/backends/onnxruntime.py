"""ONNX Runtime on the CPU: one session for each unit, reading and writing memory that is bound beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.backends.chain import Chain, Engine, Settings
from aep_ext.inference.exporting import export, quiet
from aep_ext.inference.segments import Segment

__all__ = ["ONNXRuntimeEngine"]


def _shared(tensor: Tensor) -> Any:
    """An OrtValue on the memory of a contiguous torch tensor; the caller keeps the latter alive."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _model(segment: Segment, example: Tensor) -> bytes:
    """The unit as ONNX, in memory: no file is ever written."""
    program = export(segment, example)
    with quiet():
        return torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()


class ONNXRuntimeEngine(Engine):
    """CPU, float32 (always computed in float32, whatever ``precision`` says)."""

    name = "onnxruntime"

    def __init__(self, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> None:
        import onnxruntime

        self.notices: list[str] = []
        models = [_model(segment, x) for segment, x in zip(segments, inputs, strict=True)]

        def sessions(batch: int | None) -> list[Any]:
            made = []
            for model in models:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = settings.threads
                options.inter_op_num_threads = 1
                options.log_severity_level = 3
                # Every session has threads of its own. They may wait actively inside a run, where it helps, but not
                # after it: there they would take the cores from the next unit's.
                options.add_session_config_entry("session.force_spinning_stop", "1")
                if batch is not None:
                    options.add_free_dimension_override_by_name(free_name, batch)
                made.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
            return made

        free_name = ""
        free = sessions(None)
        free_name = free[0].get_inputs()[0].shape[0]
        self._free = _FreeChain(free)
        self._bound: dict[int, Chain] = {n: _BoundChain(sessions(n)) for n in settings.batches}

    def chain(self, n: int) -> Chain:
        return self._bound.get(n, self._free)


class _BoundChain(Chain):
    """Fixed batch: all memory is bound once, and a run is nothing but the units' calls one after another."""

    def __init__(self, sessions: Sequence[Any]) -> None:
        bindings = [session.io_binding() for session in sessions]
        self._calls = [(s.run_with_iobinding, binding) for s, binding in zip(sessions, bindings, strict=True)]
        self._input_names = [session.get_inputs()[0].name for session in sessions]
        self._inputs: list[Tensor] = [torch.empty(sessions[0].get_inputs()[0].shape)]
        outputs = [session.get_outputs() for session in sessions]
        rows, classes = outputs[-1][0].shape
        self._logits = torch.zeros(len(sessions), rows, classes)
        for position, (binding, entries) in enumerate(zip(bindings, outputs, strict=True)):
            if position + 1 < len(sessions):
                features = torch.empty(entries[0].shape)
                self._inputs.append(features)
                shared = _shared(features)
                binding.bind_ortvalue_output(entries[0].name, shared)
                bindings[position + 1].bind_ortvalue_input(self._input_names[position + 1], shared)
            if position + 1 == len(sessions) or len(entries) > 1:
                binding.bind_ortvalue_output(entries[-1].name, _shared(self._logits[position]))
        self._bindings = bindings
        self._rows = list(self._logits)
        self._held: Tensor | None = None

    def load(self, unit: int, x: Tensor) -> None:
        if unit:
            self._inputs[unit].copy_(x)
        else:
            self._bindings[0].bind_ortvalue_input(self._input_names[0], _shared(x))
            self._held = x

    def gather(self, unit: int, source: Tensor, rows: Tensor) -> None:
        if unit:
            torch.index_select(source, 0, rows, out=self._inputs[unit])
        else:
            super().gather(unit, source, rows)

    def run(self, unit: int) -> Tensor:
        call, binding = self._calls[unit]
        call(binding)
        return self._rows[unit]

    def features(self, unit: int) -> Tensor:
        return self._inputs[unit + 1]

    def run_all(self) -> Tensor:
        for call, binding in self._calls:
            call(binding)
        return self._logits


class _FreeChain(Chain):
    """Any batch: outputs are allocated by ONNX Runtime and handed on as they are."""

    def __init__(self, sessions: Sequence[Any]) -> None:
        self._sessions = sessions
        self._bindings = [session.io_binding() for session in sessions]
        self._inputs = [session.get_inputs()[0].name for session in sessions]
        self._outputs = [[entry.name for entry in session.get_outputs()] for session in sessions]
        self._held: dict[int, Any] = {}
        self._results: list[Any] = [None] * len(sessions)

    def load(self, unit: int, x: Tensor) -> None:
        self._bindings[unit].bind_ortvalue_input(self._inputs[unit], _shared(x))
        self._held[unit] = x

    def run(self, unit: int) -> Tensor:
        binding = self._bindings[unit]
        for name in self._outputs[unit]:
            binding.bind_output(name, "cpu")  # anew each time: else it would write where it wrote the last batch
        self._sessions[unit].run_with_iobinding(binding)
        results = self._results[unit] = binding.get_outputs()
        if unit + 1 < len(self._sessions):
            self._bindings[unit + 1].bind_ortvalue_input(self._inputs[unit + 1], results[0])
        return torch.from_numpy(results[-1].numpy())

    def features(self, unit: int) -> Tensor:
        return torch.from_dlpack(self._results[unit][0])

    def run_all(self) -> Tensor:
        return torch.stack([self.run(unit) for unit in range(len(self._sessions))])
