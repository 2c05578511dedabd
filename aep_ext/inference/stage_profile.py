"""What a gated net's parts cost on this machine, and what follows: carry fewer rows on, or all of them.

The costs are those of the machine, the thread count and the dtype they were measured with; files do not hold them.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference._old_criteria import Policy
from aep_ext.inference.executor import start, step, survivors
from aep_ext.inference.settings import GateSettings
from aep_ext.inference.stages import Run, take


def _interpolated(sizes: Sequence[int], values: Sequence[float], n: float) -> float:
    """Linear between the sizes; below the first its value, beyond the last in proportion to n."""
    if n >= sizes[-1]:
        return values[-1] * n / sizes[-1]
    if n <= sizes[0]:
        return values[0] if n else 0.0
    right = bisect_left(sizes, n)
    share = (n - sizes[right - 1]) / (sizes[right] - sizes[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])


@dataclass(frozen=True)
class StageCosts:
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
            raise ValueError(f"StageCosts: sizes must be positive and ascending, got {self.sizes}")
        exits = len(self.stages)
        for name, count in (("stages", exits), ("gates", exits), ("copies", exits - 1)):
            table = getattr(self, name)
            if len(table) != count or any(len(row) != len(self.sizes) for row in table):
                raise ValueError(
                    f"StageCosts: {name} must have {count} rows of {len(self.sizes)} entries, "
                    f"got {[len(row) for row in table]}"
                )

    def stage(self, e: int, n: float) -> float:
        """Milliseconds of the stages and the head of exit e on n rows, interpolated."""
        return _interpolated(self.sizes, self.stages[e], n)

    def gate(self, e: int, n: float) -> float:
        """Milliseconds of gate e on n rows, interpolated."""
        return _interpolated(self.sizes, self.gates[e], n)

    def copy(self, e: int, n: float) -> float:
        """Milliseconds to copy n rows of the features of exit e, interpolated."""
        return _interpolated(self.sizes, self.copies[e], n)

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
            raise ValueError(f"StageCosts.predicted: counts must have {len(self.stages)} entries, got {len(shares)}")
        if not all(0 <= share < math.inf for share in shares) or sum(shares) == 0:
            raise ValueError(f"StageCosts.predicted: counts must be finite, none negative, not all 0, got {shares}")
        if rows < self.sizes[0]:
            raise ValueError(
                f"StageCosts.predicted: rows must be at least {self.sizes[0]}, the smallest size measured, got {rows}"
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
        as far as the costs are right.
        """
        now = self.copy(e, stay) + self.rest(e, stay)
        carried = 0.0
        for later in range(e + 1, len(self.stages)):
            carried += self.stage(later, rows)
            if later < len(self.copies) and carried + self.copy(later, stay) + self.rest(later, stay) < now:
                return False
        return now <= carried

    def pays(self, e: int, leaving: float = 1.0) -> bool:
        """Whether gate e can save more than it costs, at any measured size, if the fraction ``leaving`` goes."""
        return any(gate < leaving * self.rest(e, n) for n, gate in zip(self.sizes, self.gates[e], strict=True))


class _Clock:
    """The shortest of several times of each part: an interruption only ever adds time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.begin = device, 0.0
        self.best: dict[Any, float] = {}

    def start(self) -> None:
        self._wait()
        self.begin = time.perf_counter()

    def stop(self, part: Any) -> None:
        self._wait()
        milliseconds = (time.perf_counter() - self.begin) * 1e3
        self.best[part] = min(self.best.get(part, math.inf), milliseconds)

    def _wait(self) -> None:
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).synchronize()


def measure_costs(
    begin: Callable[[], Run],
    policy: Policy,
    settings: GateSettings,
    example: Tensor,
    sizes: Sequence[int],
    repeats: int,
) -> StageCosts:
    """Times every part on the first n rows of ``example`` for each n of ``sizes``, ascending.

    In whole walks from the first exit to the last, so that every part meets the caches as the one before left them.
    """
    exits, clock = len(settings.live), _Clock(example.device)
    nobody = replace(settings, live=(False,) * exits)  # a step that leaves every row in its place
    run = begin()
    try:
        for n in sizes:
            for _ in range(repeats + 1):
                features, rows = example[:n].clone(), None  # a stage may write on its input
                for e in range(exits):
                    clock.start()
                    features, logits = run(e, features)
                    clock.stop(("stages", e, n))
                    rows = start(policy, logits, torch.arange(n, device=logits.device)) if rows is None else rows
                    clock.start()
                    step(policy, settings, e, rows, logits).count.item()
                    clock.stop(("gates", e, n))
                    rows = survivors(step(policy, nobody, e, rows, logits), n)
                    if e < exits - 1:
                        held = run.tensor(features)
                        clock.start()
                        take(held, rows.indices)
                        clock.stop(("copies", e, n))
    finally:
        run.close()
    return StageCosts(
        tuple(sizes),
        *(
            tuple(tuple(clock.best[name, e, n] for n in sizes) for e in range(count))
            for name, count in (("stages", exits), ("gates", exits), ("copies", exits - 1))
        ),
    )
