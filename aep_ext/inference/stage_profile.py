"""What a gated net's stages cost on this machine, and where its gates cost more than they save.

The times are those of the machine, the thread count and the dtype they were measured with; files do not hold them.
"""

from __future__ import annotations

import contextlib
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aep_ext.inference.stages import StageRun


@dataclass(frozen=True)
class StageProfile:
    """Milliseconds by number of rows.

    Attributes:
        sizes: the numbers of rows measured, ascending.
        stages: E rows, for each exit: its stages and head.
    """

    sizes: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]

    def stage(self, e: int, n: float) -> float:
        """Milliseconds of the stages and the head of exit e on n rows: linear between the sizes; below the first its
        value, beyond the last in proportion to n."""
        sizes, values = self.sizes, self.stages[e]
        if n >= sizes[-1]:
            return values[-1] * n / sizes[-1]
        if n <= sizes[0]:
            return values[0] if n else 0.0
        right = bisect_left(sizes, n)
        share = (n - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return values[right - 1] + share * (values[right] - values[right - 1])

    def ungated(self, n: int) -> float:
        """Milliseconds of the whole network on n rows, without gates."""
        return sum(self.stage(e, n) for e in range(len(self.stages)))

    def predicted(self, counts: Sequence[float] | Tensor, rows: int = 1) -> float:
        """Expected milliseconds per sample where ``counts[e]`` samples are answered at exit e.

        The ideal that a gated net is measured against, without the time of its gates: with one row
        ``sum_e counts[e] * sum_{j<=e} stages[j] / sum(counts)``. In larger batches exit e sees as many rows as are
        there on average; an average below one counts as a batch of one in so many of the batches.

        Args:
            counts: E numbers (counts or shares), none negative, not all 0.
            rows: the size of the batch, at least 1.

        Raises:
            ValueError: a count is out of its range, or there are too few or too many.
        """
        shares = [float(c) for c in (counts.tolist() if isinstance(counts, Tensor) else counts)]
        if len(shares) != len(self.stages) or not all(0 <= share < math.inf for share in shares) or sum(shares) == 0:
            raise ValueError(
                f"StageProfile.predicted: counts must be {len(self.stages)} finite numbers, none negative, not all 0, "
                f"got {shares}"
            )
        total, spent = sum(shares), 0.0
        for e in range(len(self.stages)):
            present = rows * sum(shares[e:]) / total
            spent += min(present, 1.0) * self.stage(e, max(present, 1.0))
        return spent / rows


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def measure_stages(
    begin: Callable[[], StageRun], exits: int, example: Tensor, sizes: Sequence[int], repeats: int
) -> StageProfile:
    """Times every stage with its head on the first n rows of ``example`` for each n of ``sizes``, ascending.

    In whole passes from the first exit to the last, so that every stage meets the caches as the one before left them.
    The shortest of several times counts: an interruption only ever adds.
    """
    best = [[math.inf] * len(sizes) for _ in range(exits)]
    with contextlib.closing(begin()) as run:
        for position, n in enumerate(sizes):
            for _ in range(repeats + 1):
                features = example[:n].clone()  # a stage may write on its input
                for e in range(exits):
                    start = _now(example.device)
                    features, _ = run(e, features)
                    best[e][position] = min(best[e][position], (_now(example.device) - start) * 1e3)
    return StageProfile(tuple(sizes), tuple(map(tuple, best)))


def faster_without(
    gated: Callable[[Tensor], object],
    ungated: Callable[[Tensor], object],
    example: Tensor,
    sizes: Sequence[int],
    repeats: int,
) -> frozenset[int]:
    """The batch sizes, of ``sizes`` within 1..N, at which the network is faster without its gates, on batches cut from
    ``example``, (N, ...).

    What the stages' times do not show is what lies between them. The two take turns on the same batches, up to 16 of a
    size; for each batch the shortest time counts.
    """
    found = set()
    for n in sizes:
        batches = [batch for batch in example.split(n)[:16] if len(batch) == n]
        best = [[math.inf, math.inf] for _ in batches]
        for turn in range(repeats):
            for number, batch in enumerate(batches):
                for which in (0, 1) if (turn + number) % 2 else (1, 0):
                    start = _now(example.device)
                    (ungated, gated)[which](batch)
                    best[number][which] = min(best[number][which], _now(example.device) - start)
        if sum(times[1] for times in best) > sum(times[0] for times in best):
            found.add(n)
    return frozenset(found)
