"""Paired timing: networks are timed in turn on the very same batches, and what is made of the times.

Changes of a machine's speed (clock, neighbours, memory traffic) last longer than one turn of all networks, so ratios
within a turn hardly see them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Key = TypeVar("Key")
LEAST_TURNS = 5
DISTINCT_BATCHES = 8  # at least, where there are more samples than fit one: an interval needs them
REPEATS = 5  # of every batch: fewer batches are taken where the time does not last for all
DRAWS = 2000
SHORT = 5e-3  # seconds; calls below begin with a call that is not timed


def draw_batches(samples: int, rows: int, seed: int = 0) -> list[Tensor]:
    """Which samples make up which batch: int64 (rows,) each, drawn without replacement until all have been drawn.

    Args:
        samples: how many there are; with fewer than ``rows`` they are repeated inside a batch.
        rows: the batch size.
        seed: of the order, which is drawn anew whenever all samples were used.

    Returns:
        As many batches as the samples fill, and at least :data:`DISTINCT_BATCHES` where they differ.
    """
    count = max(samples // rows, DISTINCT_BATCHES if samples > 1 else 1)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count * rows // samples)
    order = torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])
    return list(order[: count * rows].view(count, rows))


@dataclass(frozen=True)
class Times:
    """Seconds per call of one network, by batch: ``batches[b]`` are those on batch b, in the order they were taken.

    The t-th call of one network on a batch was made in the same turn as the t-th of another.
    """

    batches: tuple[tuple[float, ...], ...]

    def calls(self) -> NDArray[np.float64]:
        """All of them."""
        return np.concatenate([np.asarray(taken) for taken in self.batches if taken])

    def typical(self) -> NDArray[np.float64]:
        """The median of each batch that was timed: an interruption hits one call of several."""
        return np.array([np.median(taken) for taken in self.batches if taken])


def time_in_turn(
    calls: Mapping[Key, Callable[[Tensor], object]],
    batches: Sequence[Tensor],
    seconds: float,
    *,
    wait: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, Times]:
    """Times all calls in turn, batch by batch, around and around until ``seconds`` have passed.

    Of the batches so many are taken that the time lasts for :data:`REPEATS` times around (and :data:`DISTINCT_BATCHES`
    at least), so that an interruption can be told from a batch that takes long.

    Which call begins changes from turn to turn. A short call comes after one of the same name, on the batch before,
    that is not timed: another's turn leaves the caches cold, which a loop of its own never meets.

    Args:
        calls: by name.
        batches: what they are given, one after another.
        seconds: how long, all calls and untimed ones together; there are at least :data:`LEAST_TURNS` turns.
        wait: returns when the device has done what it was given.
        clock: seconds.
    """
    names = list(calls)
    taken: dict[Key, list[list[float]]] = {name: [[] for _ in batches] for name in names}

    def timed(name: Key, x: Tensor) -> float:
        begin = clock()
        calls[name](x)
        wait()
        return clock() - begin

    with _no_garbage_collection():
        alone = {name: min(timed(name, batches[0]) for _ in range(2)) for name in names}
        short = {name: found < SHORT for name, found in alone.items()}
        one_turn = max(sum(found * (1 + short[name]) for name, found in alone.items()), 1e-9)
        count = min(len(batches), max(DISTINCT_BATCHES, int(seconds / one_turn / REPEATS)))
        turn, end = 0, clock() + seconds
        while turn < LEAST_TURNS or clock() < end:
            batch = turn % count
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if short[name]:
                    calls[name](batches[(turn - 1) % count])
                    wait()
                taken[name][batch].append(timed(name, batches[batch]))
            turn += 1
    return {name: Times(tuple(map(tuple, lists))) for name, lists in taken.items()}


def device_wait(device: torch.device) -> Callable[[], None]:
    """Returns when the device has done what it was given. (The branch for a GPU has not run on one.)"""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def latency(times: Times, rows: int) -> dict[str, float]:
    """Percentiles of all calls in milliseconds, and images per second (all images over all time)."""
    calls = times.calls()
    p50, p95, p99 = (float(value) for value in np.percentile(calls * 1e3, (50, 95, 99)))
    return {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "images_per_s": float(rows * len(calls) / calls.sum()),
    }


def ratio_of_sums(slow: NDArray[np.float64], fast: NDArray[np.float64], *, seed: int = 0) -> tuple[float, list[float]]:
    """How many times as long ``slow`` takes for all batches together, and a 95 % bootstrap interval over the batches.

    Of sums, not the median of the batches' ratios: at batch 1 most samples may leave at the first exit, and their ratio
    is not what a user gains over all of them.

    Args:
        slow, fast: (B,) the times of the same batches.
        seed: of the :data:`DRAWS` draws of B batches with replacement.
    """
    ratio = float(slow.sum() / fast.sum())
    chosen = np.random.default_rng(seed).integers(0, len(slow), (DRAWS, len(slow)))
    low, high = np.percentile(slow[chosen].sum(1) / fast[chosen].sum(1), (2.5, 97.5))
    return ratio, [float(low), float(high)]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects now and not while timing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
