"""What a gated net's parts cost on this machine, and what follows: carry fewer rows on, or all of them.

The times are those of the machine, the thread count and the dtype they were measured with; files do not hold them.
"""

from __future__ import annotations

import contextlib
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference.executor import Executor, Rows
from aep_ext.inference.stages import StageRun

_SECONDS = 0.1  # that whole calls of one batch size are timed for
_CHUNKS = 16


@dataclass(frozen=True)
class StageProfile:
    """Milliseconds by number of rows.

    Attributes:
        sizes: the numbers of rows measured, ascending.
        stages: E rows, for each exit: its stages and head.
        gates: E rows: its gate, with the count read back.
        copies: E-1 rows: copying that many rows of its features.
    """

    sizes: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]
    gates: tuple[tuple[float, ...], ...]
    copies: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] < 1 or any(b <= a for a, b in pairwise(self.sizes)):
            raise ValueError(f"StageProfile: sizes must be positive and ascending, got {self.sizes}")
        exits = len(self.stages)
        for name, count in (("stages", exits), ("gates", exits), ("copies", exits - 1)):
            table = getattr(self, name)
            if len(table) != count or any(len(row) != len(self.sizes) for row in table):
                raise ValueError(
                    f"StageProfile: {name} must have {count} rows of {len(self.sizes)} entries, "
                    f"got {[len(row) for row in table]}"
                )

    def stage(self, e: int, n: float) -> float:
        """Milliseconds of the stages and the head of exit e on n rows, interpolated."""
        return self._at(self.stages[e], n)

    def gate(self, e: int, n: float) -> float:
        """Milliseconds of gate e on n rows, interpolated."""
        return self._at(self.gates[e], n)

    def copy(self, e: int, n: float) -> float:
        """Milliseconds to copy n rows of the features of exit e, interpolated."""
        return self._at(self.copies[e], n)

    def _at(self, values: Sequence[float], n: float) -> float:
        """Linear between the sizes; below the first its value, beyond the last in proportion to n."""
        sizes = self.sizes
        if n >= sizes[-1]:
            return values[-1] * n / sizes[-1]
        if n <= sizes[0]:
            return values[0] if n else 0.0
        right = bisect_left(sizes, n)
        share = (n - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
        return values[right - 1] + share * (values[right] - values[right - 1])

    def rest(self, e: int, n: int) -> float:
        """Milliseconds of all stages and heads after exit e on n rows."""
        return sum(self.stage(later, n) for later in range(e + 1, len(self.stages)))

    def ungated(self, n: int) -> float:
        """Milliseconds of the whole network on n rows, without gates."""
        return self.rest(-1, n)

    def predicted(self, counts: Sequence[float] | Tensor, rows: int = 1, *, gates: bool = False) -> float:
        """Expected milliseconds per sample where ``counts[e]`` samples are answered at exit e.

        With one row and without gates the ideal that a gated net is measured against,
        ``sum_e counts[e] * sum_{j<=e} stages[j] / sum(counts)``, the stages' times being those of one row.

        In larger batches exit e sees as many rows as are there on average, cut down at every exit; an average below one
        counts as a batch of one in so many of the batches. (So a batch that is carried on whole costs more than this.)

        Args:
            counts: E numbers (counts or shares), none negative, not all 0.
            rows: the size of the batch, at least the smallest one measured.
            gates: whether to count the gates too, and in batches the copies of those that stay.

        Raises:
            ValueError: a number is out of its range, or there are too few or too many.
        """
        shares = [float(c) for c in (counts.tolist() if isinstance(counts, Tensor) else counts)]
        if len(shares) != len(self.stages):
            raise ValueError(f"StageProfile.predicted: counts must have {len(self.stages)} entries, got {len(shares)}")
        if not all(0 <= share < math.inf for share in shares) or sum(shares) == 0:
            raise ValueError(f"StageProfile.predicted: counts must be finite, none negative, not all 0, got {shares}")
        if rows < self.sizes[0]:
            raise ValueError(
                f"StageProfile.predicted: rows must be at least {self.sizes[0]}, the smallest size measured, got {rows}"
            )
        total, spent = sum(shares), 0.0
        for e in range(len(self.stages)):
            present = rows * sum(shares[e:]) / total
            batch, often = max(present, 1.0), min(present, 1.0)
            spent += often * self.stage(e, batch)
            if gates:
                spent += often * self.gate(e, batch)
                stay = rows * sum(shares[e + 1 :]) / total
                if rows > 1 and 0 < stay < present:
                    spent += min(stay, 1.0) * self.copy(e, max(stay, 1.0))
        return spent / rows

    def compacts(self, e: int, rows: int, stay: int) -> bool:
        """Whether ``rows`` rows at exit e are best cut down to ``stay`` now, and not later or never.

        Each way is counted to the end with nobody else leaving, so cutting down is never dearer than carrying all on,
        as far as the times are right.
        """
        now = self.copy(e, stay) + self.rest(e, stay)
        carried = 0.0
        for later in range(e + 1, len(self.stages)):
            carried += self.stage(later, rows)
            if later < len(self.copies) and carried + self.copy(later, stay) + self.rest(later, stay) < now:
                return False
        return now <= carried


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type in ("cuda", "xpu", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def measure_stages(
    begin: Callable[[], StageRun], executor: Executor, example: Tensor, sizes: Sequence[int], repeats: int
) -> StageProfile:
    """Times every part on the first n rows of ``example`` for each n of ``sizes``, ascending.

    In whole passes from the first exit to the last, so that every part meets the caches as the one before left them.
    The shortest of several times counts: an interruption only ever adds.
    """
    exits, device = executor.last + 1, example.device
    best: dict[Any, float] = {}

    def timed(part: Any, call: Callable[..., Any], *arguments: Any) -> Any:
        start = _now(device)
        result = call(*arguments)
        best[part] = min(best.get(part, math.inf), (_now(device) - start) * 1e3)
        return result

    def decide(e: int, rows: Rows, logits: Tensor) -> int:
        return executor.step(e, rows, logits).count.item()

    with contextlib.closing(begin()) as run:
        for n in sizes:
            everybody = torch.arange(n, device=device)
            for _ in range(repeats + 1):
                features, rows = example[:n].clone(), None  # a stage may write on its input
                for e in range(exits):
                    features, logits = timed(("stages", e, n), run, e, features)
                    rows = executor.start(logits, everybody.to(logits.device)) if rows is None else rows
                    timed(("gates", e, n), decide, e, rows, logits)
                    # Everybody goes on.
                    running = rows.running + logits.to(rows.running.dtype) * executor.policy.output_weights[e]
                    rows = rows._replace(running=running)
                    if e < exits - 1:
                        features = timed(("copies", e, n), run.take, features, everybody)
    return StageProfile(
        tuple(sizes),
        *(
            tuple(tuple(best[name, e, n] for n in sizes) for e in range(count))
            for name, count in (("stages", exits), ("gates", exits), ("copies", exits - 1))
        ),
    )


def faster_without(
    gated: Callable[[Tensor], object],
    ungated: Callable[[Tensor], object],
    example: Tensor,
    sizes: Sequence[int],
    repeats: int,
) -> frozenset[int]:
    """The batch sizes at which the network is faster without its gates, on batches cut from ``example``.

    What the parts' times do not show is what lies between them. The two take turns on the same batches, at least once,
    and up to ``repeats`` times on up to 16 batches of a size for at most a tenth of a second; for each batch the
    shortest time counts.

    Args:
        gated, ungated: the whole network with its gates and with them off.
        example: (N, ...).
        sizes: within 1..N.
        repeats: at least 1.
    """
    found = set()
    for n in sizes:
        batches = [example[k * n : (k + 1) * n] for k in range(min(len(example) // n, _CHUNKS))]
        best = [[math.inf, math.inf] for _ in batches]
        begin, visited = time.perf_counter(), 0
        for turn in range(repeats):
            for number, batch in enumerate(batches):
                if visited and time.perf_counter() - begin > _SECONDS:
                    break
                for which in (0, 1) if (turn + number) % 2 else (1, 0):
                    start = _now(example.device)
                    (ungated, gated)[which](batch)
                    best[number][which] = min(best[number][which], _now(example.device) - start)
                visited += 1
        without, with_gates = (sum(times[which] for times in best if times[0] < math.inf) for which in (0, 1))
        if with_gates > without:
            found.add(n)
    return frozenset(found)
