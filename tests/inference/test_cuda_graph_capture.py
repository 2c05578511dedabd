"""Capturing and composing a pass on a stand-in for CUDA's graphs: what goes wrong is told, and nothing stays open."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace

import pytest
import torch

from aep_ext.inference import cuda_graph_capture
from aep_ext.inference.cuda_graph_capture import CudaBackend, StaticPass, capture

EXITS, ROWS, CLASSES = 3, 4, 5


class Runtime:
    """What is current, what is open, what was called."""

    def __init__(self) -> None:
        self.stream, self.log, self.owners = "the caller's", [], 0
        self.broken = False  # the capture under way cannot be ended in order

    def graph_class(runtime):  # noqa: N805
        class Graph:
            def __init__(self, keep_graph: bool = False) -> None:
                self.kept, self.whole, self.instantiated = keep_graph, False, 0

            def raw_cuda_graph(self) -> int:
                if not self.whole:
                    raise RuntimeError("no graph")
                return id(self)

            def instantiate(self) -> None:
                self.instantiated += 1

            def replay(self) -> None:
                runtime.log.append(("replay", self))

        return Graph

    @contextlib.contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def capturing(self, graph, pool=None, stream=None, capture_error_mode="global"):
        """Like torch's: where the end fails, its own stream stays current."""
        self.log.append(("capture", pool, stream, capture_error_mode, gc.isenabled()))
        self.stream = f"{stream}, captured"
        try:
            yield
        finally:
            if self.broken:
                self.broken = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            graph.whole = True
            self.stream = stream


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    runtime = Runtime()

    class Owner:
        def __init__(self, device: int) -> None:
            runtime.owners += 1
            self.address = 64

        def __del__(self) -> None:
            runtime.owners -= 1

    class Handle:
        def __init__(self, tensors, policy, on) -> None:
            assert (policy, on) == ("confidence", "ensemble") and "running" in tensors

        def add(self, captured, e, logits, may_leave, opens) -> None:
            runtime.log.append(("add", e, may_leave, opens))

        def instantiate(self) -> None:
            if runtime.refusal:
                raise RuntimeError(runtime.refusal)

        def launch(self) -> None:
            runtime.log.append(("launch",))

    runtime.refusal = ""
    extension = SimpleNamespace(CaptureStream=Owner, GatedGraph=Handle, refused_node=lambda captured: "")
    load = SimpleNamespace(extension=extension)
    monkeypatch.setattr(cuda_graph_capture, "_load", load)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", runtime.graph_class())
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address, device: Stream(address, device))
    monkeypatch.setattr(torch.cuda, "stream", runtime.on_stream)
    monkeypatch.setattr(torch.cuda, "graph", runtime.capturing)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: runtime.log.append((name, *given)), raising=False)
    return runtime


class Stream:
    def __init__(self, address: int, device: torch.device) -> None:
        self.device = torch.device("cpu", 0)

    def __str__(self) -> str:
        return "its own"


def static_pass(run=None) -> StaticPass:
    logits = torch.zeros(EXITS, ROWS, CLASSES)
    tensors = {"running": torch.zeros(ROWS, CLASSES)}
    return StaticPass(
        run or (lambda e, x: (x, logits[e])), torch.zeros(ROWS, 1), EXITS, tensors, "confidence", "ensemble"
    )


def test_all_stages_share_a_pool_and_a_stream_that_lives_as_long(runtime):
    graphs, logits, owner = capture(static_pass())
    assert len(graphs) == len(logits) == EXITS and all(graph.kept for graph in graphs)
    assert [(call[0], call[1], str(call[2]), *call[3:]) for call in runtime.log] == [
        ("capture", (0, 7), "its own", "thread_local", False)
    ] * EXITS
    assert runtime.stream == "the caller's" and gc.isenabled() and runtime.owners == 1
    del owner
    assert runtime.owners == 0


def test_a_stage_that_raises_is_named_and_nothing_is_left_to_mend(runtime):
    def run(e, x):
        if e == 1:
            raise KeyError("no such thing")
        return x, torch.zeros(ROWS, CLASSES)

    with pytest.raises(RuntimeError, match="stage 1 cannot be captured: KeyError: 'no such thing'") as raised:
        capture(static_pass(run))
    assert isinstance(raised.value.__cause__, KeyError)
    assert runtime.stream == "the caller's" and gc.isenabled()
    assert [call[0] for call in runtime.log] == ["capture", "capture"]


@pytest.mark.parametrize("raises", [True, False])
def test_a_capture_that_cannot_be_ended_is_mended(runtime, raises):
    def run(e, x):
        runtime.broken = e == 1
        if raises and e == 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return x, torch.zeros(ROWS, CLASSES)

    what = "operation not permitted when stream is capturing$" if raises else "CUDA error: operation failed due"
    with pytest.raises(RuntimeError, match=f"stage 1 cannot be captured: RuntimeError: {what}"):
        capture(static_pass(run))
    assert runtime.stream == "the caller's" and gc.isenabled()
    calls = [call[0] for call in runtime.log]
    assert calls == ["capture", "capture", "_cuda_endAllocateToPool", "_cuda_releasePool", "capture"]
    assert runtime.log[2][1:] == runtime.log[3][1:] == (0, (0, 7)) and runtime.log[4][1] is None


def test_a_version_that_ends_the_pool_itself_is_not_asked_to_release_it(runtime, monkeypatch):
    def ended(*given):
        raise RuntimeError("not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)

    def run(e, x):
        runtime.broken = True
        return x, torch.zeros(ROWS, CLASSES)

    with pytest.raises(RuntimeError, match="stage 0 cannot be captured"):
        capture(static_pass(run))
    assert [call[0] for call in runtime.log] == ["capture", "capture"]


def test_every_exit_but_the_last_opens_a_node_for_the_rest(runtime):
    launch = CudaBackend().build(static_pass())
    assert [call for call in runtime.log if call[0] == "add"] == [
        ("add", 0, True, True), ("add", 1, True, True), ("add", 2, False, False)
    ]  # fmt: skip
    launch()
    assert runtime.log[-1] == ("launch",) and runtime.owners == 1
    del launch
    assert runtime.owners == 0


def test_a_graph_that_the_runtime_refuses_is_an_error(runtime):
    runtime.refusal = "aep::GatedGraph: the graph cannot be instantiated: invalid argument"
    with pytest.raises(RuntimeError, match="cannot be instantiated: invalid argument"):
        CudaBackend().build(static_pass())


def test_a_node_that_cannot_stand_in_an_if_is_named(runtime, monkeypatch):
    names = iter(["", "host function"])
    monkeypatch.setattr(cuda_graph_capture._load.extension, "refused_node", lambda captured: next(names, ""))
    with pytest.raises(RuntimeError, match="stage 1 holds a node of kind 'host function', which the body of an IF"):
        CudaBackend().build(static_pass())
