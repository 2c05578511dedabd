"""Continuous batching: survivors of several batches are pooled before each later stage, which runs on full batches."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from aep_ext._utils import inputs_of
from aep_ext.inference.executor import Answers, Executor, GatedOutput, Rows
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.stages import StageRun, take_rows


class _Pool:
    """Rows that wait at one exit, with their features: first in, first out, ascending numbers."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Rows]] = []
        self.count = 0

    def add(self, features: Tensor, rows: Rows) -> None:
        self.parts.append((features, rows))
        self.count += len(features)

    def take(self, wanted: int) -> tuple[Tensor, Rows]:
        """The first ``wanted`` rows, or all there are."""
        features, *columns = (torch.cat(c) for c in zip(*((f, *rows) for f, rows in self.parts), strict=True))
        self.parts, self.count = [], 0
        if len(features) > wanted:
            # Cloned, or the rows that stay would keep the memory of those that go.
            self.add(features[wanted:].clone(), Rows(*(column[wanted:].clone() for column in columns)))
        return features[:wanted], Rows(*(column[:wanted] for column in columns))


class _Batch:
    """One batch of the caller's that is not answered yet."""

    def __init__(self, first: int, n: int) -> None:
        self.first, self.end, self.open = first, first + n, n
        self.answers: Answers  # from the first logits on


class ContinuousBatcher:
    """The pooled executor, for whoever feeds batches by hand; :meth:`GatedNet.predict` does it for a loader.

    Every batch runs to the first gate on its own. Those that stay wait there until ``capacity`` of them have come
    together, from however many batches; the next stage then runs on exactly that many, and so on from exit to exit.
    Outputs come back batch by batch, in the order pushed, as soon as a batch and all before it are answered.

    What is held at most, after a push: ``capacity - 1`` samples' features at each live exit, and the outputs of
    ``max_delay`` batches; while a batch of n is worked on, its inputs and the features of ``2 * n + 3 * capacity``
    samples more.

    Args:
        begin: gives a run of the stages whose features may be held.
        policy: the policy, for the whole stream.
        capacity: how many rows make a full batch; by default the size of the first one pushed.
        max_delay: so many batches may be unanswered after a push; the oldest is then carried to its end on batches
            that are not full. None: no limit (for a finite stream: outputs, but not features, may then pile up).

    Raises:
        ValueError: capacity below 1 or max_delay below 0.
    """

    def __init__(
        self,
        begin: Callable[[], StageRun],
        policy: ExitPolicy,
        *,
        capacity: int | None = None,
        max_delay: int | None = 64,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"ContinuousBatcher: capacity must be at least 1, got {capacity}")
        if max_delay is not None and max_delay < 0:
            raise ValueError(f"ContinuousBatcher: max_delay must be at least 0, got {max_delay}")
        self.capacity, self.max_delay = capacity, max_delay
        self._begin, self._executor = begin, Executor(policy)
        self._pools: dict[int, _Pool] = {}
        self._batches: deque[_Batch] = deque()
        self._pushed = 0

    @property
    def unanswered(self) -> int:
        """Batches whose outputs have not been handed out."""
        return len(self._batches)

    @torch.no_grad()
    def push(self, x: Tensor) -> list[GatedOutput]:
        """Takes a batch, (n, ...), and returns the outputs that are ready, in order."""
        n = len(x)
        if self.capacity is None and n:
            self.capacity = n
        batch = _Batch(self._pushed, n)
        self._batches.append(batch)
        self._pushed += n
        with contextlib.closing(self._begin()) as run:
            self._advance(run, 0, x, None, torch.arange(batch.first, batch.end, device=x.device))
            self._drain(run)
            if self.max_delay is not None and len(self._batches) > self.max_delay:
                self._force(run, self._batches[-1 - self.max_delay].end)
        return self._ready()

    @torch.no_grad()
    def flush(self) -> list[GatedOutput]:
        """Carries everything to its end, on batches that are not full, and returns all outputs."""
        with contextlib.closing(self._begin()) as run:
            self._force(run, self._pushed)
        return self._ready()

    def _ready(self) -> list[GatedOutput]:
        outputs = []
        while self._batches and self._batches[0].open == 0:
            outputs.append(self._batches.popleft().answers.output())
        return outputs

    def _advance(self, run: StageRun, first: int, features: Tensor, rows: Rows | None, indices: Tensor) -> None:
        """From stage ``first`` on, up to the next live exit; who stays there is pooled."""
        executor = self._executor
        for e in range(first, executor.last + 1):
            features, logits = run(e, features)
            if rows is None:
                rows = executor.start(logits, indices.to(logits.device))
                # Numbers that come first leave first, so the newest batch is the last.
                self._batches[-1].answers = Answers(len(indices), rows.running, logits.dtype)
            result = executor.step(e, rows, logits)
            present, stay = len(rows.indices), executor.stay(e, rows.indices, result)
            if stay < present:
                self._answer(e, result.indices[stay:], result.running[stay:], result.stats[stay:])
            if stay == 0:
                return
            before, rows = rows.indices, Rows(*(column[:stay] for column in result[:4]))
            pool = self._pools.get(e)
            full_already = stay == self.capacity and (pool is None or pool.count == 0)
            if stay < present:
                features = take_rows(features, torch.searchsorted(before, rows.indices))
                # Cloned, or what waits would keep the memory of those that left.
                rows = Rows(*(column.clone() for column in rows))
            if executor.live[e] and not full_already:
                self._pools.setdefault(e, _Pool()).add(features, rows)
                return

    def _drain(self, run: StageRun) -> None:
        """Runs whatever has a full batch waiting, the deepest first: no pool is fed before it has room."""
        while full := [e for e, pool in self._pools.items() if self.capacity and pool.count >= self.capacity]:
            self._run_pool(run, max(full))

    def _force(self, run: StageRun, end: int) -> None:
        """Carries all samples with numbers below ``end`` to their exits."""
        for e in range(self._executor.last):
            pool = self._pools.get(e)
            while pool is not None and pool.count and pool.parts[0][1].indices[0] < end:
                self._run_pool(run, e)
                self._drain(run)

    def _run_pool(self, run: StageRun, e: int) -> None:
        assert self.capacity is not None  # since the first row
        features, rows = self._pools[e].take(self.capacity)
        self._advance(run, e + 1, features, rows, rows.indices)

    def _answer(self, e: int, indices: Tensor, logits: Tensor, stats: Tensor) -> None:
        """Hands rows, in ascending order of their numbers, to the batches they belong to."""
        numbers = indices.tolist()
        done, position = 0, 0
        while done < len(numbers):
            while self._batches[position].end <= numbers[done]:
                position += 1
            batch = self._batches[position]
            until = bisect_left(numbers, batch.end, done)
            batch.answers.write(e, indices[done:until] - batch.first, logits[done:until], stats[done:until])
            batch.open -= until - done
            done = until


def batched(loader: Iterable[Any], device: torch.device, batcher: ContinuousBatcher) -> Iterator[GatedOutput]:
    """One output per batch of the loader, in its order."""
    for item in loader:
        yield from batcher.push(inputs_of("GatedNet.predict", item).to(device, non_blocking=True))
    yield from batcher.flush()
