"""What the memory of this machine gives, measured in the same run as the kernels that are judged by it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

BYTES = 256 << 20  # far beyond any cache
REPEATS = 7


def _best(function: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the quickest of some calls: a limit is what the machine can do when nobody disturbs it."""
    function()  # pages are touched, threads are started
    seconds = []
    for _ in range(REPEATS):
        start = clock()
        function()
        seconds.append(clock() - start)
    return min(seconds)


def measure(clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """GB/s with torch's current threads: ``read`` (one stream, summed) and ``copy`` (bytes read plus bytes written)."""
    source = torch.ones(BYTES // 4)
    target = torch.zeros_like(source)
    read = min(
        _best(source.sum, clock), _best(source.amax, clock)
    )  # which of the two computes less than it reads differs
    copy = _best(lambda: target.copy_(source), clock)
    return {"read": BYTES / read * 1e-9, "copy": 2 * BYTES / copy * 1e-9}
