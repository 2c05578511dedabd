"""Measuring on a GPU: device times by CUDA events around graph replays or calls, memory, launches, and the ceilings.

    python3 -m benchmarks.gpu.measure FILE.json     the machine's limits: copy bandwidth, launches, launches of graphs

Inputs rotate past the L2, and functions are timed in turn. Has not run on a GPU.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import bytes_of, tensors
from benchmarks.gpu.result_file import spread
from benchmarks.paired_timing import Comparison, Function

MAX_SETS = 256
WARMUP, ROUNDS, ROUND_MS, LATENCY_CALLS = 3, 15, 4.0, 50
COPY_MEGABYTES = (64, 256, 1024)
NODES = (1, 10, 100)
# Of the value, and of the largest value in its tensor: gradients of a mean over many rows are small all over.
TOLERANCE = {
    "float32": (2e-3, 5e-4),  # products of 1024 rows in another order
    "bfloat16": (6e-2, 3e-2),  # baselines also add up in bfloat16
}

broken_captures: list[str] = []
"""Captures that failed in this process. Torch does not get over one (its allocator goes on believing in it: no other
capture, no ``empty_cache``): who finds an entry here should go on in another process."""


def input_sets(bytes_each: int, l2_bytes: int) -> int:
    """So many that together they are more than twice the L2, at most 256: what is so small stays in it in life too."""
    return max(2, min(MAX_SETS, math.ceil((2 * l2_bytes + 1) / max(1, bytes_each))))


def l2_bytes() -> int:
    """Of the current device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(getattr(properties, "L2_cache_size", 0)) or 64 << 20


def in_a_line(error: Exception) -> str:
    """Type and first line of the message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of one call, captured as torch asks for it."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            function()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(current), torch.cuda.graph(graph):  # the outer one: a failed capture leaves its stream on
        function()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def waits(function: Function, arguments: tuple[Any, ...]) -> str:
    """Why a call cannot be captured, as far as torch notices: it waits for the device. Empty where it does not."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments)
    except RuntimeError as error:
        return in_a_line(error)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return ""


class Rotation:
    """One function over its inputs: a round is a number of passes over all sets, as calls or as replays of a graph."""

    def __init__(self, function: Function, inputs: Sequence[tuple[Any, ...]], graph: bool) -> None:
        self.function, self.inputs, self.passes, self.graph = function, inputs, 1, None
        for arguments in inputs[:WARMUP]:
            function(*arguments)
        torch.cuda.synchronize()
        self.refused = (broken_captures[0] if broken_captures else waits(function, inputs[0])) if graph else ""
        if graph and not self.refused:
            try:
                self.graph = captured(self._pass)
            except Exception as error:
                self.refused = in_a_line(error)
                broken_captures.append(f"an earlier capture failed: {self.refused}"[:200])

    def _pass(self) -> None:
        for arguments in self.inputs:
            self.function(*arguments)

    def microseconds(self) -> float:
        """Of one call, from the first's start to the last's end on the device."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self.passes):
            if self.graph is None:
                self._pass()
            else:
                self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / (self.passes * len(self.inputs))

    def pace(self) -> None:
        """Makes a round take about :data:`ROUND_MS`."""
        best = min(self.microseconds() for _ in range(2)) * len(self.inputs)
        self.passes = max(1, min(1000, round(ROUND_MS * 1e3 / max(best, 1e-3))))


def paired_times(
    functions: dict[str, Function], inputs: Sequence[tuple[Any, ...]], *, graph: bool
) -> dict[str, dict[str, Any]]:
    """Microseconds per call of all functions, in turn: median, quartile range, raw times, and how they were timed."""
    rotations = {name: Rotation(function, inputs, graph) for name, function in functions.items()}
    for rotation in rotations.values():
        rotation.pace()
    times: dict[str, list[float]] = {name: [] for name in rotations}
    order = list(rotations)
    for _ in range(ROUNDS):
        order.append(order.pop(0))
        for name in order:
            times[name].append(rotations[name].microseconds())
    found = {}
    for name, rotation in rotations.items():
        found[name] = spread(times[name]) | {"way": "calls" if rotation.graph is None else "graph replays"}
        if rotation.refused:
            found[name]["no_graph"] = rotation.refused
    return found


def latency(function: Function, inputs: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Microseconds from a call to its result's being there, on the host's clock, one call at a time."""
    times = []
    for i in range(LATENCY_CALLS + WARMUP):
        arguments = inputs[i % len(inputs)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        function(*arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return spread(times[WARMUP:])


def peak_bytes(function: Function, arguments: tuple[Any, ...]) -> int:
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


def launches(function: Function, arguments: tuple[Any, ...]) -> int | None:
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


def functions_of(comparison: Comparison) -> tuple[dict[str, Function], dict[str, str]]:
    """The operator, its eager baselines, ``inductor`` and ``liger``; and what is left out, with the reason."""
    functions, left_out = {"fused": comparison.fused, **comparison.baselines}, {}
    torch._dynamo.reset()
    functions["inductor"] = comparison.around(torch.compile(comparison.compiled, dynamic=False))
    if comparison.liger is not None:
        try:
            functions["liger"] = comparison.liger()
        except ImportError as error:
            left_out["liger"] = f"not installed: {error}"[:200]
    return functions, left_out


def compared(
    name: str, dtype: str, comparison: Comparison, functions: dict[str, Function], arguments: tuple[Any, ...]
) -> tuple[dict[str, Function], dict[str, str]]:
    """The functions whose result is the first baseline's, and baselines that raised, with their error.

    Raises:
        AssertionError: a result differs; it names the function. The operator may not raise either.
    """
    oracle = next(iter(comparison.baselines.values()))
    expected, kept, broken = comparison.comparable(oracle(*arguments)), {}, {}
    for who, function in functions.items():
        try:
            result = function(*arguments)
        except Exception as error:
            if who == "fused":
                raise
            broken[who] = in_a_line(error)
            continue
        assert_close(comparison.comparable(result), expected, dtype, f"{name}: {who}")
        kept[who] = function
    return kept, broken


def assert_close(result: Any, expected: Any, dtype: str, who: str) -> None:
    """Each tensor by the size of its own values (:data:`TOLERANCE`), whole numbers exactly."""
    rtol, share = TOLERANCE[dtype]
    for i, (one, other) in enumerate(zip(tensors(result), tensors(expected), strict=True)):
        inexact = other.is_floating_point()
        torch.testing.assert_close(
            one.detach(),
            other.detach(),
            rtol=rtol if inexact else 0,
            atol=share * float(other.abs().max()) if inexact and other.numel() else 0.0,
            check_dtype=False,
            check_stride=False,
            msg=lambda text, i=i: f"{who}: result {i}: {text}",
        )


def ratios(times: dict[str, dict[str, Any]], eager: Sequence[str]) -> dict[str, float]:
    """How many times as long as the operator the others take: the best eager one, torch.compile, Liger.

    Only of those that were timed in the same way: what cannot be captured has no ratio in graphs.
    """
    own = times["fused"]["median"]
    times = {name: entry for name, entry in times.items() if entry.get("way") == times["fused"].get("way")}
    found = {name: times[name]["median"] / own for name in ("inductor", "liger") if name in times}
    known = [times[name]["median"] for name in eager if name in times]
    if known:
        found["best_eager"] = min(known) / own
    return {name: round(value, 3) for name, value in found.items()}


def measure(name: str, dtype: str, comparison: Comparison, copy_gb_per_s: Callable[[], float]) -> dict[str, Any]:
    """Everything about an operator's case, as it goes into the result file. Needs a GPU.

    ``copy_gb_per_s``: the copy bandwidth measured on this machine.
    """
    first, eager = comparison.make(), list(comparison.baselines)
    inputs = [first, *(comparison.make() for _ in range(input_sets(bytes_of(first), l2_bytes()) - 1))]
    functions, left_out = functions_of(comparison)
    functions, broken = compared(name, dtype, comparison, functions, first)
    peaks = {who: peak_bytes(function, first) for who, function in functions.items()}
    kernels = {who: launches(function, first) for who, function in functions.items()}
    own, least = peaks["fused"], min(peaks[who] for who in eager if who in peaks)
    result_bytes = bytes_of(functions["fused"](*first))
    beyond = [max(0, peak - result_bytes) for peak in (own, least)]
    # Graphs last: a capture that fails leaves torch's allocator unfit for the rest.
    as_calls, in_graphs = (paired_times(functions, inputs, graph=graph) for graph in (False, True))
    gb_per_s, copy = comparison.bytes_moved / in_graphs["fused"]["median"] * 1e-3, copy_gb_per_s()
    return {
        "input_sets": len(inputs),
        "input_bytes": bytes_of(first),
        "left_out": left_out | broken,
        "peak_bytes": peaks,
        "launches": kernels,
        "result_bytes": result_bytes,
        "peak_over_eager": round(own / max(1, least), 4),
        "peak_over_eager_beyond_result": round(beyond[0] / max(1, beyond[1]), 4),
        "graph_us": in_graphs,
        "call_us": as_calls,
        "ratio": {"graph": ratios(in_graphs, eager), "call": ratios(as_calls, eager)},
        "bytes_moved": comparison.bytes_moved,
        "gb_per_s": round(gb_per_s, 1),
        "copy_gb_per_s": copy,
        "fraction_of_copy": round(gb_per_s / copy, 4),
    }


def copy_bandwidth() -> dict[str, Any]:
    """GB/s of a copy from device memory to device memory, bytes read and written counted, by size in MB."""
    found = {}
    for megabytes in COPY_MEGABYTES:
        sets = [tuple(torch.randn(megabytes << 18, device="cuda") for _ in range(2)) for _ in range(2)]
        times = paired_times({"copy": lambda source, target: target.copy_(source)}, sets, graph=False)["copy"]
        found[str(megabytes)] = spread([2 * (megabytes << 20) / us * 1e-3 for us in times["raw"]])
    return found


def _host_us(function: Callable[[], object], calls: int) -> dict[str, Any]:
    """Microseconds that the host spends on one call of many that it does not wait for."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return spread(times)


def launch_latencies() -> dict[str, Any]:
    """Of a small kernel, and of graphs of so many of them: the host's microseconds for a launch, the device's from one
    to the next."""
    x = torch.zeros(1, device="cuda")

    def kernels(count: int) -> None:
        for _ in range(count):
            x.add_(1)

    launches = {"kernel": lambda: x.add_(1)}
    launches |= {f"graph of {count}": captured(partial(kernels, count)).replay for count in NODES}
    return {
        name: {
            "host_us": _host_us(launch, 50),
            "device_us": paired_times({name: launch}, [()] * 50, graph=False)[name],
        }
        for name, launch in launches.items()
    }


def measure_ceilings(file: Path) -> None:
    """Measures the machine's limits and writes the file; prints the medians."""
    found = {"copy_gb_per_s": copy_bandwidth(), "launch": launch_latencies()}
    file.write_text(json.dumps(found), encoding="utf-8")
    print("copy GB/s:", {size: entry["median"] for size, entry in found["copy_gb_per_s"].items()})
    print("launch us:", {what: entry["host_us"]["median"] for what, entry in found["launch"].items()})


if __name__ == "__main__":
    measure_ceilings(Path(sys.argv[1]))
