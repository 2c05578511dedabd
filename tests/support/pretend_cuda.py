"""Lets "cuda" stand for the CPU, so that code written for a GPU can be rehearsed without one.

    PYTHONPATH=.:tests/support python -m pretend_cuda -m pytest tests -m gpu
    PYTHONPATH=.:tests/support python -m pretend_cuda -m benchmarks.gpu.driver operators

Every tensor says that it lies on cuda:0, every "cuda" asked for is the CPU, torch.cuda answers as on a machine with one
GPU, and torch.compile gives the function back. What it shows: names, arguments, shapes, control flow, and what a
capture forbids: a graph records torch's operators and runs them again, and refuses those that wait for the device,
after which the process is as unfit for another capture as torch leaves it. What it cannot show: anything that kernels,
the caching allocator or streams do; opcheck, which needs devices that differ. It is loaded on purpose only.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CLOCK = 2e9  # cycles a second
L2_BYTES = 1 << 12
_WAITS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_real_device = torch.device  # before torch.device is replaced


class _State:
    """Of the one device."""

    busy_until = 0.0
    capture: _Recorder | None = None
    broken = False  # by a capture that failed
    sync_mode, no_waiting = 0, None
    stream: Stream | None = None


def _wait() -> None:
    """The host waits for the device: an error while capturing, or where it was asked to be one."""
    if _State.capture is not None:
        _State.capture.failed = True
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    time.sleep(max(0.0, _State.busy_until - time.monotonic()))


def _mapped(value: Any) -> Any:
    if isinstance(value, _real_device):
        return CPU if value.type == "cuda" else value
    if isinstance(value, str):
        return "cpu" if value == "cuda" or value.startswith("cuda:") else value
    return value


class PretendCuda(TorchFunctionMode):
    """Maps devices on the way in, and says "cuda" on the way out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _mapped(value) for name, value in (kwargs or {}).items()}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            value = func(*args, **kwargs)
            attribute = getattr(func.__self__, "__name__", "")
            if attribute == "device" and value.type == "cpu":
                return CUDA
            if attribute in ("is_cuda", "is_cpu"):
                on_cpu = Tensor.device.__get__(*args).type == "cpu"
                return (attribute == "is_cuda") == on_cpu
            return value
        args = [_mapped(value) for value in args]
        if name in _WAITS:
            _wait()
        if name == "cuda":
            return args[0].clone()
        value = func(*args, **kwargs)
        return value.clone() if name == "cpu" else value


def _reads_back(func: Any, args: tuple) -> bool:
    name = func.overloadpacket.__name__
    masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
    return masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")


class _NoWaiting(TorchDispatchMode):
    """torch's debug mode "error"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _reads_back(func, args):
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Keeps every operator that runs, and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _reads_back(func, args):
            _wait()
        value = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, value))
        return value

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, before in self.calls:
                _again(before, func(*args, **kwargs))


def _again(before: Any, after: Any) -> None:
    """Puts what an operator gave this time where it lay the first time."""
    if isinstance(before, Tensor):
        if before.data_ptr() != after.data_ptr():
            before.detach().copy_(after.reshape(before.shape))  # it may have lost a dimension since, in place
    elif isinstance(before, (list, tuple)):
        for one, other in zip(before, after, strict=True):
            _again(one, other)


class CUDAGraph:
    """A record of operators."""

    known: dict[int, CUDAGraph] = {}

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph, self.recorder = keep_graph, None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed") and not _State.broken
        assert _State.capture is None
        self.recorder = _State.capture = _Recorder()
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)
        _State.capture = None
        if self.recorder.failed:
            _State.broken = True  # torch's allocator believes that the capture is still under way
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def instantiate(self) -> None:
        assert self.recorder

    def replay(self) -> None:
        self.recorder.replay()

    def raw_cuda_graph(self) -> int:
        assert self.keep_graph
        if self.recorder.failed:
            raise RuntimeError("the capture of this graph did not end")
        CUDAGraph.known[id(self)] = self
        return id(self)

    def reset(self) -> None:
        self.recorder = None

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class graph:  # noqa: N801  (torch's name)
    """torch.cuda.graph, whose order of steps it keeps."""

    def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global") -> None:
        self.cuda_graph, self.mode = cuda_graph, capture_error_mode
        self.stream = stream_context(stream or Stream())

    def __enter__(self) -> None:
        _wait()
        empty_cache()
        self.stream.__enter__()
        self.cuda_graph.capture_begin(capture_error_mode=self.mode)

    def __exit__(self, *args: object) -> None:
        self.cuda_graph.capture_end()
        self.stream.__exit__(*args)


class Stream:
    """Everything runs in order, whatever the stream."""

    def __init__(self, device=None, priority: int = 0) -> None:
        self.cuda_stream, self.device = id(self), CUDA

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None:
        _wait()

    def query(self) -> bool:
        return time.monotonic() >= _State.busy_until


class CaptureStream:
    """_C.CaptureStream."""

    def __init__(self, device: int) -> None:
        self.address = id(self)


def _external_stream(address: int, device=None) -> Stream:
    assert isinstance(address, int)
    return Stream(device)


def _end_allocation(device: int, pool: Any) -> None:
    """What a capture that failed leaves open is closed."""
    _State.broken = False


class Event:
    """A moment."""

    def __init__(self, enable_timing=False, blocking=False, interprocess=False, external=False) -> None:
        self.timing, self.at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self.at = max(time.monotonic(), _State.busy_until)

    def query(self) -> bool:
        return time.monotonic() >= self.at

    def synchronize(self) -> None:
        _wait()

    def wait(self, stream: Stream | None = None) -> None:
        assert self.at is not None

    def elapsed_time(self, end: Event) -> float:
        assert self.timing and end.timing
        return max(1e-6, (end.at - self.at) * 1e3)


@contextlib.contextmanager
def stream_context(stream: Stream) -> Iterator[None]:
    assert isinstance(stream, Stream)
    before, _State.stream = current_stream(), stream
    yield
    _State.stream = before


def current_stream(device=None) -> Stream:
    _State.stream = _State.stream or Stream()
    return _State.stream


def empty_cache() -> None:
    if _State.broken:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


def _sleep(cycles: int) -> None:
    _State.busy_until = max(time.monotonic(), _State.busy_until) + cycles / CLOCK


def set_sync_debug_mode(mode: int | str) -> None:
    mode = mode if isinstance(mode, int) else ("default", "warn", "error").index(mode)
    if mode == 2 and _State.sync_mode != 2:
        _State.no_waiting = _NoWaiting()
        _State.no_waiting.__enter__()
    elif _State.sync_mode == 2 and mode != 2:
        _State.no_waiting.__exit__(None, None, None)
    _State.sync_mode = mode


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(_mapped(device_type), *args, **kwargs)


def _properties(device: object = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="Pretended", major=9, minor=0, multi_processor_count=1, L2_cache_size=L2_BYTES, total_memory=1 << 30
    )


def _same(function, *args, **kwargs):
    """torch.compile without compiling."""
    return function if callable(function) else (lambda f: f)


@contextlib.contextmanager
def _on_the_device() -> Iterator[None]:
    """What runs here stands for kernels, which wait for nothing."""
    busy, _State.busy_until = _State.busy_until, 0.0
    yield
    _State.busy_until = busy


def _of_the_cpu(function):
    """A question about a device type, asked of the CPU."""
    return lambda kind="cuda": function(_mapped(kind))


class GatedGraph:
    """_C.GatedGraph: the exits on the CPU, graphs by their records."""

    def __init__(self, tensors: dict[str, Tensor], policy: str, on: str) -> None:
        from aep_ext.inference.cuda_graph_capture import StaticPass

        exits = len(tensors["temperatures"])
        self.static = StaticPass(lambda e, x: (x, x), tensors["logits"], exits, tensors, policy, on)
        self.parts: list[tuple[CUDAGraph, int, Tensor, bool, bool]] = []

    def add(self, raw: int, e: int, logits: Tensor, may_leave: bool, opens: bool) -> None:
        self.parts.append((CUDAGraph.known[raw], e, logits, may_leave, opens))

    def instantiate(self) -> None:
        assert self.parts

    def launch(self) -> None:
        with _on_the_device():
            for part, e, logits, may_leave, opens in self.parts:
                part.replay()
                self.run_exit(e, logits, may_leave)
                if opens and not self.static.tensors["remaining"][e]:
                    return

    def run_exit(self, e: int, logits: Tensor, may_leave: bool) -> None:
        from graphed_fake import run_exit

        with _on_the_device():
            run_exit(self.static, e, logits, may_leave)


def install() -> None:
    """For the rest of this process."""
    stand_ins = {
        "CUDAGraph": CUDAGraph, "graph": graph, "graph_pool_handle": lambda: (0, 1), "Stream": Stream, "Event": Event,
        "stream": stream_context, "current_stream": current_stream, "empty_cache": empty_cache, "_sleep": _sleep,
        "set_sync_debug_mode": set_sync_debug_mode, "get_sync_debug_mode": lambda: _State.sync_mode,
        "synchronize": lambda device=None: _wait(), "is_available": lambda: True, "is_initialized": lambda: True,
        "current_device": lambda: 0, "device_count": lambda: 1, "device": lambda device: contextlib.nullcontext(),
        "get_device_name": lambda device=None: "Pretended", "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (9, 0), "get_rng_state": lambda device=None: torch.get_rng_state(),
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 1 << 20,
        "ExternalStream": _external_stream, "mem_get_info": lambda device=None: (1 << 26, 1 << 30),
        "memory_reserved": lambda device=None: 0, "reset_peak_memory_stats": lambda device=None: None,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name), f"this torch has no torch.cuda.{name}"
        setattr(torch.cuda, name, stand_in)
    torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool = _end_allocation, lambda device, pool: None
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch.compile, torch.autocast = _same, _Autocast
    torch.is_autocast_enabled = _of_the_cpu(torch.is_autocast_enabled)
    torch.get_autocast_dtype = _of_the_cpu(torch.get_autocast_dtype)
    from aep_ext import _load
    from aep_ext.ops import _dispatch

    if _load.extension is not None:
        _load.record["kind"], _dispatch._native["cuda"] = "cuda", True
        _load.extension.GatedGraph, _load.extension.refused_node = GatedGraph, lambda raw: ""
        _load.extension.CaptureStream = CaptureStream
    PretendCuda().__enter__()


def main() -> None:
    """``python -m pretend_cuda -m MODULE [ARGUMENTS]``, as python would run it."""
    if sys.argv[1:2] != ["-m"] or len(sys.argv) < 3:
        sys.exit("usage: python -m pretend_cuda -m MODULE [ARGUMENTS]")
    install()
    sys.argv[:3] = [sys.argv[2]]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    # Under its own name, once: what tests import is this very module.
    import pretend_cuda

    pretend_cuda.main()
