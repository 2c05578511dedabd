"""Capture of a pass, stage by stage, that leaves torch as it was even where it fails. Has not run on a GPU."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aep_ext import _load
from aep_ext.inference.cuda_graph_backend import Walk


@dataclass(frozen=True)
class Captured:
    """The stages with their heads as graphs, and the logits that each writes, (N, K), dense.

    ``kept`` is what the graphs' memory needs: hold it for as long as they may run.
    """

    graphs: list[torch.cuda.CUDAGraph]
    logits: list[Tensor]
    kept: object


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[tuple[torch.cuda.Stream, object]]:
    """A stream that nobody else has, as the current one, and the object that it lives with.

    The stream that was current is so again afterwards, also after a capture that failed: ``torch.cuda.graph`` alone
    leaves its own behind.
    """
    owner = _load.extension.CaptureStream(device.index)
    stream = torch.cuda.ExternalStream(owner.address, device=device)
    with torch.cuda.stream(stream):
        yield stream, owner


def capture(walk: Walk) -> Captured:
    """A graph for every stage with its head.

    They share a pool: what one has finished with, the next may use, since they always run in this order.

    Raises:
        RuntimeError: a stage cannot be captured; the message names it.
    """
    device, pool = walk.input.device, torch.cuda.graph_pool_handle()
    graphs, found, features = [], [], walk.input
    with own_stream(device) as (stream, owner), _undisturbed():
        for e, _ in walk.plan:
            graph, cause = torch.cuda.CUDAGraph(keep_graph=True), None
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        features, logits = walk.run(e, features)
                        logits = logits.contiguous()
                    except Exception as error:  # ending the capture may raise another, which says less
                        cause = error
                        raise
            except Exception as error:
                cause = cause or error
                _recover(graph, pool, stream)
                first = (str(cause).strip().splitlines() or [""])[0]
                raise RuntimeError(
                    f"GraphedGatedNet: stage {e} cannot be captured: {type(cause).__name__}: {first}"
                ) from cause
            graphs.append(graph)
            found.append(logits)
    return Captured(graphs, found, (graphs, found, owner))


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Garbage is collected later: graphs and streams of others must not be destroyed in the middle of a capture. A
    stage of no kernel is nothing to warn of."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
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
