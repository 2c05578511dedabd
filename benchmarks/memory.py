"""Memory as a limit: the bandwidth of this machine, and the bytes that torch's CPU allocator hands out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

BYTES = 256 << 20  # far beyond any cache
REPEATS = 7
_known: dict[tuple[int, str], dict[str, float]] = {}


def bandwidth(clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """GB/s with torch's current threads: ``read`` (one stream, summed) and ``copy`` (bytes read plus bytes written)."""

    def best(function: Callable[[], object]) -> float:
        function()  # touches the pages and starts the threads
        seconds = []
        for _ in range(REPEATS):
            start = clock()
            function()
            seconds.append(clock() - start)
        return min(seconds)

    source = torch.ones(BYTES // 4)
    target = torch.zeros_like(source)
    read = min(best(source.sum), best(source.amax))  # which of the two computes less than it reads differs
    return {"read": BYTES / read * 1e-9, "copy": 2 * BYTES / best(lambda: target.copy_(source)) * 1e-9}


def known_bandwidth(clock: Callable[[], float]) -> dict[str, float]:
    """:func:`bandwidth`, measured once for each clock and number of threads."""
    key = (torch.get_num_threads(), clock.__name__)
    if key not in _known:
        _known[key] = bandwidth(clock)
    return _known[key]


@dataclass(frozen=True)
class Peak:
    """``peak``: the most that was allocated at one time; ``held``: what was still allocated at the end. Bytes.

    Memory that a kernel takes past torch's allocator (a few rows of scratch on a thread's heap) is not seen.
    """

    peak: int
    held: int


def peak(function: Callable[[], object]) -> Peak:
    """Runs ``function`` twice (once to warm up) and follows torch's CPU allocations in the second run.

    Whatever ``function`` returns is alive when ``held`` is taken.
    """
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() != torch.autograd.DeviceType.CPU:
            continue
        now += event.nbytes()
        most = max(most, now)
    del result
    return Peak(most, now)
