"""Refill: survivors of several batches are pooled before each later unit, so that it runs on full batches."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from aep_ext.inference._old_criteria import Policy
from aep_ext.inference.executor import Answers, GatedOutput, Rows, start, step, survivors
from aep_ext.inference.settings import GateSettings
from aep_ext.inference.stages import Run, take


class _Pool:
    """Rows that wait at one exit, with their features: first in, first out, ascending numbers."""

    def __init__(self) -> None:
        self.parts: deque[tuple[Tensor, Rows]] = deque()
        self.count = 0

    def add(self, features: Tensor, rows: Rows) -> None:
        self.parts.append((features, rows))
        self.count += len(features)

    def first(self) -> int:
        """The number of the row that waits longest."""
        return int(self.parts[0][1].indices[0])

    def take(self, wanted: int) -> tuple[Tensor, Rows]:
        """The first ``wanted`` rows, or all there are."""
        taken: list[tuple[Tensor, ...]] = []
        while wanted and self.parts:
            features, rows = self.parts.popleft()
            self.count -= len(features)
            part = (features, *rows)
            if len(features) > wanted:
                # Cloned, or the rows that stay would keep the memory of those that go.
                self.add(features[wanted:].clone(), Rows(*(column[wanted:].clone() for column in rows)))
                self.parts.rotate(1)
                part = tuple(column[:wanted] for column in part)
            taken.append(part)
            wanted -= len(part[0])
        if len(taken) == 1:
            features, *columns = taken[0]
        else:
            features, *columns = (torch.cat(column) for column in zip(*taken, strict=True))
        return features, Rows(*columns)


class _Batch:
    """One batch of the caller's that is not answered yet."""

    __slots__ = ("answers", "end", "first", "open")

    def __init__(self, first: int, n: int) -> None:
        self.first, self.end, self.open = first, first + n, n
        self.answers: Answers | None = None


class Refill:
    """The pooled executor, for whoever feeds batches by hand; :meth:`GatedNet.predict` does it for a loader.

    Every batch walks to the first gate on its own. Those that stay wait there until ``capacity`` of them have come
    together, from however many batches; the next unit then runs on exactly that many, and so on from exit to exit.
    Outputs come back batch by batch, in the order pushed, as soon as a batch and all before it are answered.

    What is held at most, after a push: ``capacity - 1`` samples' features at each live exit, and the outputs of
    ``max_delay`` batches; while a batch of n is worked on, its inputs and the features of ``2 * n + 3 * capacity``
    samples more.

    Args:
        begin: gives a run of the units whose features may be held (``units.begin_owning``).
        policy: the policy.
        settings: the numbers to go by, for the whole stream.
        capacity: how many rows make a full batch; by default the size of the first one pushed.
        max_delay: so many batches may be unanswered after a push; the oldest is then carried to its end on batches
            that are not full. None: no limit (for a finite stream: outputs, but not features, may then pile up).

    Raises:
        ValueError: capacity below 1 or max_delay below 0.
    """

    def __init__(
        self,
        begin: Callable[[], Run],
        policy: Policy,
        settings: GateSettings,
        *,
        capacity: int | None = None,
        max_delay: int | None = 64,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"Refill: capacity must be at least 1, got {capacity}")
        if max_delay is not None and max_delay < 0:
            raise ValueError(f"Refill: max_delay must be at least 0, got {max_delay}")
        self.begin, self.policy, self.settings = begin, policy, settings
        self.capacity, self.max_delay = capacity, max_delay
        self._pools: dict[int, _Pool] = {}
        self._batches: deque[_Batch] = deque()
        self._pushed = 0

    @property
    def waiting(self) -> int:
        """Samples whose features are held."""
        return sum(pool.count for pool in self._pools.values())

    @property
    def unanswered(self) -> int:
        """Batches whose outputs have not been handed out."""
        return len(self._batches)

    @torch.no_grad()
    def push(self, x: Tensor) -> list[GatedOutput]:
        """Takes a batch, (n, ...), and returns the outputs that are ready, in order."""
        n, work = len(x), _Work(self)
        if self.capacity is None and n:
            self.capacity = n
        batch = _Batch(self._pushed, n)
        self._batches.append(batch)
        self._pushed += n
        work.walk(0, x, None, torch.arange(batch.first, batch.end, device=x.device))
        work.drain()
        if self.max_delay is not None and len(self._batches) > self.max_delay:
            work.force(self._batches[-1 - self.max_delay].end)
        return self._ready()

    @torch.no_grad()
    def flush(self) -> list[GatedOutput]:
        """Carries everything to its end, on batches that are not full, and returns all outputs."""
        _Work(self).force(self._pushed)
        return self._ready()

    def _ready(self) -> list[GatedOutput]:
        outputs = []
        while self._batches and self._batches[0].open == 0:
            outputs.append(self._batches.popleft().answers.output())
        return outputs


class _Work:
    """What one push or flush does, on one run of the units."""

    def __init__(self, refill: Refill) -> None:
        self.refill, self.settings, self.run = refill, refill.settings, refill.begin()
        self.pools, self.last = refill._pools, len(self.settings.live) - 1

    def walk(self, e: int, features: Tensor, rows: Rows | None, indices: Tensor) -> None:
        """From unit e on, up to the next live exit; who stays there is pooled."""
        policy = self.refill.policy
        for exit_number in range(e, self.last + 1):
            features, logits = self.run(exit_number, features)
            if rows is None:
                rows = start(policy, logits, indices.to(logits.device))
                # Numbers that come first leave first, so the newest batch is the last.
                self.refill._batches[-1].answers = Answers(len(indices), rows.running, logits.dtype)
            result = step(policy, self.settings, exit_number, rows, logits)
            present, live = len(rows.indices), self.settings.live[exit_number]
            stay = 0 if exit_number == self.last else result.count.item() if live else present
            before, rows = rows.indices, survivors(result, stay)
            if stay < present:
                self._answer(exit_number, result.indices[stay:], result.running[stay:], result.stats[stay:])
            if stay == 0:
                return
            pool = self.pools.get(exit_number)
            full_already = stay == self.refill.capacity and (pool is None or pool.count == 0)
            if stay < present:
                features = take(features, torch.searchsorted(before, rows.indices))
                # Cloned, or what waits would keep the memory of those that left.
                rows = Rows(*(column.clone() for column in rows))
            if live and not full_already:
                self.pools.setdefault(exit_number, _Pool()).add(features, rows)
                return

    def drain(self) -> None:
        """Runs whatever has a full batch waiting, the deepest first: no pool is fed before it has room."""
        while full := [e for e, pool in self.pools.items() if pool.count >= self.refill.capacity]:
            self._advance(max(full))

    def force(self, end: int) -> None:
        """Carries all samples with numbers below ``end`` to their exits."""
        for e in range(self.last):
            pool = self.pools.get(e)
            while pool is not None and pool.count and pool.first() < end:
                self._advance(e)
                self.drain()

    def _advance(self, e: int) -> None:
        features, rows = self.pools[e].take(self.refill.capacity)
        self.walk(e + 1, features, rows, rows.indices)

    def _answer(self, e: int, indices: Tensor, running: Tensor, stats: Tensor) -> None:
        """Hands rows, in ascending order of their numbers, to the batches they belong to."""
        batches, numbers = self.refill._batches, indices.tolist()
        done, batch_number = 0, 0
        while done < len(numbers):
            while batches[batch_number].end <= numbers[done]:
                batch_number += 1
            batch = batches[batch_number]
            until = bisect_left(numbers, batch.end, done)
            batch.answers.write(e, indices[done:until] - batch.first, running[done:until], stats[done:until])
            batch.open -= until - done
            done = until


def images_of(item: Any) -> Tensor:
    """The inputs of a loader's item: itself, or the first of a tuple or list.

    Raises:
        TypeError: neither.
    """
    x = item[0] if isinstance(item, tuple | list) and item else item
    if not isinstance(x, Tensor):
        raise TypeError(
            f"GatedNet.predict: the loader must give tensors, or tuples that start with one, got {type(item).__name__}"
        )
    return x


def predicted(loader: Iterable[Any], device: torch.device, refill: Refill) -> Iterator[GatedOutput]:
    """One output per batch of the loader, in its order."""
    for item in loader:
        yield from refill.push(images_of(item).to(device, non_blocking=True))
    yield from refill.flush()
