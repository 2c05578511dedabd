"""ONNX Runtime on the CPU: one session for each segment, reading and writing memory that is bound beforehand.

Float32, and always computed in float32, whatever ``precision`` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.backends.engine import BoundChain, Chain, Engine, Settings
from aep_ext.inference.segments import Segment, exported, quiet


def build(segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> Engine:
    """See :func:`aep_ext.inference.backends.build`."""
    models = [_model(segment, x) for segment, x in zip(segments, inputs, strict=True)]
    free = [_session(model, settings.threads) for model in models]
    name = free[0].get_inputs()[0].shape[0]
    bound = {n: _bound([_session(model, settings.threads, (name, n)) for model in models]) for n in settings.batches}
    return Engine(_FreeChain(free), bound)


def _model(segment: Segment, example: Tensor) -> bytes:
    """The segment as ONNX, in memory: no file is ever written."""
    program = exported(segment, example)
    with quiet():
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None  # with dynamo=True
    return made.model_proto.SerializeToString()


def _session(model: bytes, threads: int, dimension: tuple[str, int] | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Every session has threads of its own. They may wait actively inside a run, where it helps, but not after it: there
    # they would take the cores from the next segment's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if dimension is not None:
        options.add_free_dimension_override_by_name(*dimension)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _shared(tensor: Tensor) -> Any:
    """An OrtValue on the memory of a contiguous torch tensor; the caller keeps the latter alive."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _bound(sessions: Sequence[Any]) -> BoundChain:
    bindings = [session.io_binding() for session in sessions]
    names = [session.get_inputs()[0].name for session in sessions]
    rows, classes = sessions[-1].get_outputs()[-1].shape
    inputs, logits = [], torch.zeros(len(sessions), rows, classes)
    for e, (session, binding) in enumerate(zip(sessions, bindings, strict=True)):
        outputs = session.get_outputs()
        if e + 1 < len(sessions):
            inputs.append(torch.empty(outputs[0].shape))
            shared = _shared(inputs[-1])
            binding.bind_ortvalue_output(outputs[0].name, shared)
            bindings[e + 1].bind_ortvalue_input(names[e + 1], shared)
        binding.bind_ortvalue_output(outputs[-1].name, _shared(logits[e]))
    calls = [partial(session.run_with_iobinding, own) for session, own in zip(sessions, bindings, strict=True)]
    return BoundChain(calls, lambda x: bindings[0].bind_ortvalue_input(names[0], _shared(x)), inputs, logits)


class _FreeChain(Chain):
    """Any batch: outputs are allocated by ONNX Runtime and handed on as they are."""

    def __init__(self, sessions: Sequence[Any]) -> None:
        self._sessions = sessions
        self._bindings = [session.io_binding() for session in sessions]
        self._inputs = [session.get_inputs()[0].name for session in sessions]
        self._outputs = [[entry.name for entry in session.get_outputs()] for session in sessions]
        self._held: dict[int, Any] = {}
        self._results: list[Any] = [None] * len(sessions)

    def load(self, e: int, x: Tensor) -> None:
        self._bindings[e].bind_ortvalue_input(self._inputs[e], _shared(x))
        self._held[e] = x

    def run(self, e: int) -> Tensor:
        binding = self._bindings[e]
        for name in self._outputs[e]:
            binding.bind_output(name, "cpu")  # anew each time: else it would write where it wrote the last batch
        self._sessions[e].run_with_iobinding(binding)
        results = self._results[e] = binding.get_outputs()
        if e + 1 < len(self._sessions):
            self._bindings[e + 1].bind_ortvalue_input(self._inputs[e + 1], results[0])
        return torch.from_numpy(results[-1].numpy())

    def features(self, e: int) -> Tensor:
        return torch.from_dlpack(self._results[e][0])
