"""Device times: CUDA events around graph replays, or calls, on inputs that rotate past the L2; contestants in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.store import spread

Contestant = Callable[..., object]
MOST_SETS = 256
WARMUP, ROUNDS, ROUND_MS = 3, 15, 4.0


def input_sets(bytes_each: int, l2_bytes: int) -> int:
    """So many that together they are more than twice the L2, at most 256: what is so small stays in it in life too."""
    return max(2, min(MOST_SETS, math.ceil((2 * l2_bytes + 1) / max(1, bytes_each))))


def l2_bytes() -> int:
    """Of the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


broken_captures: list[str] = []
"""Captures that failed in this process. Torch does not get over one (its allocator goes on believing in it: no other
capture, no ``empty_cache``): who finds an entry here should go on in another process."""


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def waits(function: Contestant, arguments: tuple[Any, ...]) -> str:
    """Why a call cannot be captured, as far as torch notices: it waits for the device. Empty where it does not."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments)
    except RuntimeError as error:
        return _in_a_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


class Turn:
    """One contestant over its inputs: a round is a number of passes over all sets, or of calls."""

    def __init__(self, function: Contestant, inputs: Sequence[tuple[Any, ...]], graph: bool) -> None:
        self.function, self.inputs, self.passes, self.graph = function, inputs, 1, None
        for arguments in inputs[:WARMUP]:
            function(*arguments)
        torch.cuda.synchronize()
        self.refused = (broken_captures[0] if broken_captures else waits(function, inputs[0])) if graph else ""
        if graph and not self.refused:
            try:
                self.graph = captured(self._pass)
            except Exception as error:
                self.refused = _in_a_line(error)
                broken_captures.append(f"an earlier capture failed: {self.refused}"[:200])

    @property
    def way(self) -> str:
        """How it was timed."""
        return "graph replays" if self.graph is not None else "calls"

    def _pass(self) -> None:
        for arguments in self.inputs:
            self.function(*arguments)

    def round(self) -> None:
        """``passes`` passes over the inputs."""
        for _ in range(self.passes):
            if self.graph is None:
                self._pass()
            else:
                self.graph.replay()

    def microseconds(self) -> float:
        """Of one call, from the first's start to the last's end on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.round()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (self.passes * len(self.inputs))

    def pace(self) -> None:
        """Makes a round take about :data:`ROUND_MS`."""
        best = min(self.microseconds() for _ in range(2)) * len(self.inputs)
        self.passes = max(1, min(1000, round(ROUND_MS * 1e3 / max(best, 1e-3))))


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, captured as torch asks for it."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(current), torch.cuda.graph(graph):  # the outer one: a failed capture leaves its stream on
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def race(
    contestants: dict[str, Contestant], inputs: Sequence[tuple[Any, ...]], *, graph: bool, rounds: int = ROUNDS
) -> dict[str, dict[str, Any]]:
    """Microseconds per call of all contestants, in turn: median, quartile range and raw times, and how it was timed."""
    turns = {name: Turn(function, inputs, graph) for name, function in contestants.items()}
    for turn in turns.values():
        turn.pace()
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    for _ in range(rounds):
        order.append(order.pop(0))
        for name in order:
            times[name].append(turns[name].microseconds())
    found = {}
    for name, turn in turns.items():
        found[name] = spread(times[name]) | {"way": turn.way}
        if turn.refused:
            found[name]["no_graph"] = turn.refused
    return found


def latency(function: Contestant, inputs: Sequence[tuple[Any, ...]], calls: int = 50) -> dict[str, Any]:
    """Microseconds from a call to its result's being there, on the host's clock, one call at a time."""
    times = []
    for i in range(calls + WARMUP):
        arguments = inputs[i % len(inputs)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return spread(times[WARMUP:])


def peak_bytes(function: Contestant, arguments: tuple[Any, ...]) -> int:
    """Device memory that one call takes at its peak above what was held before."""
    function(*arguments)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function(*arguments)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del result
    return peak - before


def launches(function: Contestant, arguments: tuple[Any, ...]) -> int | None:
    """Kernels of one call, copies and fills included; None where the profiler cannot tell."""
    from torch.profiler import ProfilerActivity, profile

    counts, on_device = [], torch.autograd.DeviceType.CUDA
    try:
        for _ in range(2):  # the first may be late for the first kernels
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                function(*arguments)
                torch.cuda.synchronize()
            counts.append(sum(event.count for event in profiler.key_averages() if event.device_type == on_device))
    except Exception:  # no CUPTI here, or not allowed to use it
        return None
    return max(counts) or None  # nothing at all: it saw nothing
