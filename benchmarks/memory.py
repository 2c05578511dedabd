"""Bytes that torch's CPU allocator hands out while a function runs, above what was there before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


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
