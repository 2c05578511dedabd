"""CUDA graphs of a gated pass: stages captured by torch, composed by ``_C.GatedGraph``. Has not run on a GPU.

Torch's own conditional capture (``CUDAGraph.begin_capture_to_if_node``, from 2.13) is not used: raw graphs do from
torch 2.11 on. A capture leaves torch as it was even where it fails.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aep_ext import _load
from aep_ext.inference.stages import StageRun


@dataclass(frozen=True)
class StaticPass:
    """The pass to be built, on static tensors.

    Attributes:
        run: gives the logits of exit e.
        input: (N, ...).
        num_exits: E.
        tensors: what the exits read and write, by the names of ``_C.GatedGraph``.
        criterion, criterion_on: of the gated net.
    """

    run: StageRun
    input: Tensor
    num_exits: int
    tensors: dict[str, Tensor]
    criterion: str
    criterion_on: str


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[tuple[torch.cuda.Stream, object]]:
    """A stream that nobody else has, as the current one, and the object that it lives with.

    The stream that was current is so again afterwards, also after a capture that failed: ``torch.cuda.graph`` alone
    leaves its own behind.
    """
    assert _load.extension is not None  # see CudaBackend.check
    owner = _load.extension.CaptureStream(device.index)
    stream = torch.cuda.ExternalStream(owner.address, device=device)
    with torch.cuda.stream(stream):
        yield stream, owner


def capture(static: StaticPass) -> tuple[list[torch.cuda.CUDAGraph], list[Tensor], object]:
    """A graph for every stage with its head.

    They share a pool: what one has finished with, the next may use, since they always run in this order.

    Returns:
        The graphs, the logits that each writes, (N, K), dense, and what the graphs' memory needs beside them: all three
        must be held for as long as the graphs may run.

    Raises:
        RuntimeError: a stage cannot be captured; the message names it.
    """
    device, pool = static.input.device, torch.cuda.graph_pool_handle()
    graphs, found, features = [], [], static.input
    with own_stream(device) as (stream, owner), _garbage_kept():
        for e in range(static.num_exits):
            graph, cause = torch.cuda.CUDAGraph(keep_graph=True), None
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        features, logits = static.run(e, features)
                        logits = logits.contiguous()
                    except Exception as error:  # ending the capture may raise another, which says less
                        cause = error
                        raise
            except Exception as error:
                cause = cause or error
                _recover(graph, pool, stream)
                first = (str(cause).strip().splitlines() or [""])[0]
                raise RuntimeError(
                    f"CudaGraphGatedNet: stage {e} cannot be captured: {type(cause).__name__}: {first}"
                ) from cause
            graphs.append(graph)
            found.append(logits)
    return graphs, found, owner


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Graphs and streams of others must not be destroyed in the middle of a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _recover(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> None:
    """Ends what torch (2.11) leaves open where a capture was broken off: the pool, and the generator, from which nobody
    could draw any more."""
    with contextlib.suppress(RuntimeError):
        graph.raw_cuda_graph()
        return  # the capture ended in order: the stage itself failed, in Python
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        torch._C._cuda_releasePool(stream.device.index, pool)  # the graph will not: it never came to be
    with contextlib.suppress(RuntimeError):
        # Any capture that ends in order sets the generator free.
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            torch.zeros(1, device=stream.device)


class CudaBackend:
    """What a :class:`CudaGraphGatedNet` asks of the device: warm up, build, launch. CUDA, by the native module."""

    device_type = "cuda"

    def check(self) -> None:
        """RuntimeError where this build or this torch cannot do it."""
        if _load.extension is None or not hasattr(_load.extension, "GatedGraph"):
            raise RuntimeError(
                "CudaGraphGatedNet: needs the native module built with CUDA; `aep info` tells what there is"
            )
        if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
            raise RuntimeError(
                f"CudaGraphGatedNet: needs torch 2.11 or later (CUDAGraph.raw_cuda_graph), got {torch.__version__}"
            )

    def on(self, device: torch.device) -> AbstractContextManager[object]:
        """Makes ``device`` current."""
        return torch.cuda.device(device)

    def warm_up(self, once: Callable[[], list[Tensor]], times: int, x: Tensor) -> list[Tensor]:
        """Calls ``once`` several times on a stream of its own: libraries make handles and choose algorithms here.

        Raises:
            ValueError: it draws random numbers.
        """
        current, before = torch.cuda.current_stream(x.device), torch.cuda.get_rng_state(x.device)
        with own_stream(x.device) as (stream, _):
            stream.wait_stream(current)
            for _ in range(times):
                found = once()
            stream.synchronize()  # the stream ends here; its memory may be handed on
        if not torch.equal(before, torch.cuda.get_rng_state(x.device)):
            raise ValueError(
                "CudaGraphGatedNet: the network must not draw random numbers in eval mode: a graph would repeat them"
            )
        return found

    def build(self, static: StaticPass) -> Callable[[], None]:
        """Captures and composes; the result enqueues the whole pass.

        Raises:
            RuntimeError: a stage cannot be captured, or holds what the body of an IF node cannot hold.
        """
        graphs, logits, owner = capture(static)
        assert _load.extension is not None  # see check
        for e, graph in enumerate(graphs):
            name = _load.extension.refused_node(graph.raw_cuda_graph())
            if name:
                raise RuntimeError(
                    f"CudaGraphGatedNet: stage {e} holds a node of kind '{name}', which the body of an IF node cannot "
                    "hold"
                )
        handle = _load.extension.GatedGraph(static.tensors, static.criterion, static.criterion_on)
        for e, (graph, own) in enumerate(zip(graphs, logits, strict=True)):
            may_leave = e < static.num_exits - 1  # behind such an exit stands an IF node that holds the rest
            handle.add(graph.raw_cuda_graph(), e, own, may_leave, may_leave)
        handle.instantiate()
        return partial(_launch, handle, (graphs, logits, owner))


def _launch(handle: Any, kept: object) -> None:
    """The whole pass; ``kept`` is what it runs on."""
    handle.launch()
