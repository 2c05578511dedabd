"""A gated pass as CUDA graphs: stages captured by torch, composed by ``_C.GatedGraph``. Has not run on a GPU.

Torch's own conditional capture (``CUDAGraph.begin_capture_to_if_node``, from 2.13) is not used: raw graphs do from
torch 2.11 on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .. import _load
from .graphed_backend import GRAPH_PER_STAGE, ONE_GRAPH, Built, Walk


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
        """On a side stream, as captures want it: libraries make their handles and choose their algorithms here."""
        stream, current = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        before = torch.cuda.get_rng_state(x.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(times):
                found = once()
        current.wait_stream(stream)
        if not torch.equal(before, torch.cuda.get_rng_state(x.device)):
            raise ValueError(
                "GraphedGatedNet: the network must not draw random numbers in eval mode: a graph would repeat them"
            )
        return found

    def build(self, walk: Walk, path: str) -> Built:
        graphs, logits = _captured(walk)
        reason = "asked for" if path == GRAPH_PER_STAGE else _refusal(graphs)
        if not reason:
            handle = _handle(walk)
            try:
                for graph, own, (e, may_leave) in zip(graphs, logits, walk.plan, strict=True):
                    handle.add(graph.raw_cuda_graph(), e, own, may_leave, may_leave)
                handle.instantiate()
                return _OneGraph(handle, graphs, logits)
            except RuntimeError as error:
                reason = str(error)
        if path == ONE_GRAPH:
            raise RuntimeError(f"GraphedGatedNet: one graph cannot be made: {reason}")
        return _GraphPerStage(_handle(walk), graphs, logits, walk, reason)


def _handle(walk: Walk):  # noqa: ANN202  (a class of the native module)
    return _load.extension.GatedGraph(walk.tensors, walk.policy, walk.on)


def _captured(walk: Walk) -> tuple[list[torch.cuda.CUDAGraph], list[Tensor]]:
    """A graph for every stage with its head, and the logits it writes.

    They share a pool: what one has finished with, the next may use, since they always run in this order.
    """
    device = walk.input.device
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    graphs, found, features = [], [], walk.input
    for e, _ in walk.plan:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                features, logits = walk.run(e, features)
                logits = logits.contiguous()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise RuntimeError(
                f"GraphedGatedNet: stage {e} cannot be captured: {type(error).__name__}: {first}"
            ) from error
        graphs.append(graph)
        found.append(logits)
    return graphs, found


def _refusal(graphs: list[torch.cuda.CUDAGraph]) -> str:
    """Why they cannot stand in IF nodes, or nothing."""
    for e, graph in enumerate(graphs):
        name = _load.extension.refused_node(graph.raw_cuda_graph())
        if name:
            return f"stage {e} holds a node of kind '{name}', which the body of an IF node cannot hold"
    return ""


class _OneGraph:
    path, reason = ONE_GRAPH, ""

    def __init__(self, handle: object, graphs: list[torch.cuda.CUDAGraph], logits: list[Tensor]) -> None:
        self._kept = graphs, logits  # the pool lives as long as the captured graphs
        self._handle, self.launch = handle, handle.launch


class _GraphPerStage:
    path = GRAPH_PER_STAGE

    def __init__(
        self, handle: object, graphs: list[torch.cuda.CUDAGraph], logits: list[Tensor], walk: Walk, reason: str
    ) -> None:
        self._handle, self._graphs, self._logits, self._walk, self.reason = handle, graphs, logits, walk, reason

    def launch(self) -> None:
        """Waits for the device after every exit where rows may leave."""
        remaining = self._walk.tensors["remaining"]
        for graph, logits, (e, may_leave) in zip(self._graphs, self._logits, self._walk.plan, strict=True):
            graph.replay()
            self._handle.run_exit(e, logits, may_leave)
            if may_leave and not remaining[e].item():
                return
