"""Whether gates pay, timed on whole calls: what the parts' times do not show is what lies between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST_SECONDS = 0.1
_CHUNKS = 16


def sizes_without_gates(
    gated: Callable[[Tensor], object],
    ungated: Callable[[Tensor], object],
    example: Tensor,
    sizes: Sequence[int],
    repeats: int,
) -> frozenset[int]:
    """The batch sizes at which the network is faster without its gates, on batches cut from ``example``.

    The two take turns on the same batches, at least once, and up to ``repeats`` times on up to 16 batches of a size
    for at most a tenth of a second; for each batch the shortest time counts, since an interruption only ever adds.

    Args:
        gated, ungated: the whole network with its gates and with them off.
        example: (N, ...).
        sizes: within 1..N.
        repeats: at least 1.
    """

    def seconds(call: Callable[[Tensor], object], batch: Tensor) -> float:
        begin = time.perf_counter()
        call(batch)
        if example.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, example.device.type).synchronize()
        return time.perf_counter() - begin

    slower = set()
    for n in sizes:
        batches = [example[k * n : (k + 1) * n] for k in range(min(len(example) // n, _CHUNKS))]
        best = [[float("inf"), float("inf")] for _ in batches]
        begin, visited = time.perf_counter(), 0
        for turn in range(repeats):
            for number, batch in enumerate(batches):
                if visited and time.perf_counter() - begin > _LEAST_SECONDS:
                    break
                order = (0, 1) if (turn + number) % 2 else (1, 0)
                for which in order:
                    taken = seconds((ungated, gated)[which], batch)
                    best[number][which] = min(best[number][which], taken)
                visited += 1
        without, with_gates = (sum(times[which] for times in best if times[0] < float("inf")) for which in (0, 1))
        if with_gates > without:
            slower.add(n)
    return frozenset(slower)
