"""A gated pass as CUDA graphs: stages captured by torch, composed by ``_C.GatedGraph``. Has not run on a GPU.

Torch's own conditional capture (``CUDAGraph.begin_capture_to_if_node``, from 2.13) is not used: raw graphs do from
torch 2.11 on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from aep_ext import _load
from aep_ext.inference.cuda_graph_backend import GRAPH_PER_STAGE, ONE_GRAPH, Built, Walk
from aep_ext.inference.cuda_graph_capture import Captured, capture, own_stream


class CudaBackend:
    """CUDA, by the native module."""

    device_type = "cuda"

    def check(self) -> None:
        if _load.extension is None or not hasattr(_load.extension, "GatedGraph"):
            raise RuntimeError(
                "GraphedGatedNet: needs the native module built with CUDA; `aep info` tells what there is"
            )
        if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
            raise RuntimeError(
                f"GraphedGatedNet: needs torch 2.11 or later (CUDAGraph.raw_cuda_graph), got {torch.__version__}"
            )

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        return torch.cuda.device(device)

    def warm_up(self, once: Callable[[], list[Tensor]], times: int, x: Tensor) -> list[Tensor]:
        """On a stream of its own, as captures want it: libraries make handles and choose algorithms here."""
        current, before = torch.cuda.current_stream(x.device), torch.cuda.get_rng_state(x.device)
        with own_stream(x.device) as (stream, _):
            stream.wait_stream(current)
            for _ in range(times):
                found = once()
            stream.synchronize()  # the stream ends here; its memory may be handed on
        if not torch.equal(before, torch.cuda.get_rng_state(x.device)):
            raise ValueError(
                "GraphedGatedNet: the network must not draw random numbers in eval mode: a graph would repeat them"
            )
        return found

    def build(self, walk: Walk, path: str) -> Built:
        captured = capture(walk)
        reason = "asked for" if path == GRAPH_PER_STAGE else _refusal(captured.graphs)
        if not reason:
            handle = _handle(walk)
            try:
                for graph, own, (e, may_leave) in zip(captured.graphs, captured.logits, walk.plan, strict=True):
                    handle.add(graph.raw_cuda_graph(), e, own, may_leave, may_leave)
                handle.instantiate()
                return _OneGraph(handle, captured)
            except RuntimeError as error:
                reason = str(error)
        if path == ONE_GRAPH:
            raise RuntimeError(f"GraphedGatedNet: one graph cannot be made: {reason}")
        for graph in captured.graphs:
            graph.instantiate()
        return _GraphPerStage(_handle(walk), captured, walk, reason)


def _handle(walk: Walk):  # noqa: ANN202  (a class of the native module)
    return _load.extension.GatedGraph(walk.tensors, walk.policy, walk.on)


def _refusal(graphs: list[torch.cuda.CUDAGraph]) -> str:
    """Why they cannot stand in IF nodes, or nothing."""
    for e, graph in enumerate(graphs):
        name = _load.extension.refused_node(graph.raw_cuda_graph())
        if name:
            return f"stage {e} holds a node of kind '{name}', which the body of an IF node cannot hold"
    return ""


class _OneGraph:
    path, reason = ONE_GRAPH, ""

    def __init__(self, handle: object, captured: Captured) -> None:
        self._kept = captured.kept
        self._handle, self.launch = handle, handle.launch


class _GraphPerStage:
    path = GRAPH_PER_STAGE

    def __init__(self, handle: object, captured: Captured, walk: Walk, reason: str) -> None:
        self._handle, self._captured, self._walk, self.reason = handle, captured, walk, reason

    def launch(self) -> None:
        """Waits for the device after every exit where rows may leave."""
        remaining, captured = self._walk.tensors["remaining"], self._captured
        for graph, logits, (e, may_leave) in zip(captured.graphs, captured.logits, self._walk.plan, strict=True):
            graph.replay()
            self._handle.run_exit(e, logits, may_leave)
            if may_leave and not remaining[e].item():
                return
