"""The executor: a batch walks from exit to exit, and who is sure enough leaves.

The decisions are made by :meth:`Policy.gate` on those that are still under way, in their order, exactly as the
simulator makes them. The features are no part of that step: they follow it only where carrying fewer rows pays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import GateResult
from .policies import Policy
from .settings import GateSettings
from .units import Run

Compacts = Callable[[int, int, int], bool]
"""``compacts(e, rows, survivors)``: whether ``rows`` rows of features at exit e are cut down to the survivors'."""


class GatedOutput(NamedTuple):
    """What a gated net answers for a batch of N samples, in their order."""

    logits: Tensor
    """(N, K), the dtype of the exits' logits: the unnormalised sum of b_j O_j up to the exit taken."""
    exit: Tensor
    """(N,) int64: the exit taken, from 0, in the network at hand."""
    confidence: Tensor
    """(N,) float32: the largest probability of the judged distribution there."""


class Rows(NamedTuple):
    """Those under way, without their features: n rows, in the order of their numbers."""

    running: Tensor
    """(n, K): the running ensemble, in the accumulation dtype."""
    indices: Tensor
    """(n,) int64: the caller's numbers, ascending."""
    state: Tensor
    """(n, S) int64: the policy's memory."""


def start(policy: Policy, logits: Tensor, indices: Tensor) -> Rows:
    """The rows before the first exit, whose ``logits`` (n, K) settle classes, dtype and device."""
    n, classes = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    running = torch.zeros((n, classes), dtype=acc, device=logits.device)
    return Rows(running, indices, policy.initial_state(n, classes, logits.device))


def step(policy: Policy, settings: GateSettings, e: int, rows: Rows, logits: Tensor) -> GateResult:
    """Exit e for ``rows``: the gate's result, with features of no columns."""
    running = rows.running
    return policy.gate(
        running.narrow(1, 0, 0),
        running,
        settings.sums[running.dtype][e],
        rows.indices,
        rows.state,
        logits,
        exit_index=e,
        weight=settings.weights[e],
        threshold=settings.thresholds[e],
        temperature=settings.temperatures[e],
        enabled=settings.live[e],
    )


def survivors(result: GateResult, stay: int) -> Rows:
    """The first ``stay`` rows of a gate's result."""
    return Rows(result.running[:stay], result.indices[:stay], result.state[:stay])


def take(features: Tensor, positions: Tensor) -> Tensor:
    """Copies rows, (n, ...) and (m,) int64 -> (m, ...), in the memory order of ``features``.

    Equivalent to ``features[positions]``, but channels_last stays so.
    """
    if not features.is_contiguous() and features.dim() in (4, 5):
        form = torch.channels_last if features.dim() == 4 else torch.channels_last_3d
        if features.is_contiguous(memory_format=form):
            return features.movedim(1, -1).index_select(0, positions).movedim(-1, 1)
    return features.index_select(0, positions)


def run_one(run: Run, policy: Policy, settings: GateSettings, x: Tensor) -> GatedOutput:
    """One sample, (1, ...): no rows to sort, so nothing is gathered or scattered."""
    features, logits = run(0, x)
    rows = start(policy, logits, torch.zeros(1, dtype=torch.int64, device=logits.device))
    last = len(settings.live) - 1
    for e in range(last + 1):
        if e:
            features, logits = run(e, features)
        result = step(policy, settings, e, rows, logits)
        if e == last or (settings.live[e] and result.count.item() == 0):
            taken = torch.full((1,), e, dtype=torch.int64, device=logits.device)
            return GatedOutput(result.running.to(logits.dtype), taken, result.stats[:, 0])
        rows = Rows(result.running, result.indices, result.state)
    raise AssertionError("the last exit answers")


class Answers:
    """The outputs of N samples, written as they leave."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        """``like``: (any, K) in the accumulation dtype; ``dtype``: that of the answer's logits."""
        self.dtype = dtype
        self.logits = like.new_empty((n, like.shape[1]))
        self.exit = torch.empty(n, dtype=torch.int64, device=like.device)
        self.confidence = torch.empty(n, dtype=torch.float32, device=like.device)

    def write(self, e: int, indices: Tensor, running: Tensor, stats: Tensor) -> None:
        """Rows that leave at exit e."""
        self.logits.index_copy_(0, indices, running)
        self.exit.index_fill_(0, indices, e)
        self.confidence.index_copy_(0, indices, stats[:, 0])

    def output(self) -> GatedOutput:
        """What was written."""
        return GatedOutput(self.logits.to(self.dtype), self.exit, self.confidence)


def run_batch(run: Run, policy: Policy, settings: GateSettings, x: Tensor, compacts: Compacts) -> GatedOutput:
    """A batch, (n, ...), of any size."""
    n, last = len(x), len(settings.live) - 1
    features, logits = run(0, x)
    rows = start(policy, logits, torch.arange(n, device=logits.device))
    dtype = logits.dtype
    answers: Answers | None = None
    places: Tensor | None = None  # where in `features` the rows are; None: they are all of it, in order
    for e in range(last + 1):
        if e:
            features, logits = run(e, features)
            if places is not None:
                logits = logits.index_select(0, places)
        result = step(policy, settings, e, rows, logits)
        present = len(rows.indices)
        stay = 0 if e == last else result.count.item() if settings.live[e] else present
        if stay == 0 and answers is None:  # all leave together, in order
            taken = torch.full((n,), e, dtype=torch.int64, device=logits.device)
            return GatedOutput(result.running.to(dtype), taken, result.stats[:, 0].contiguous())
        before, rows = rows, survivors(result, stay)
        if stay < present:
            if answers is None:
                answers = Answers(n, result.running, dtype)
            answers.write(e, result.indices[stay:], result.running[stay:], result.stats[stay:])
            if stay == 0:
                break
            positions = torch.searchsorted(before.indices, rows.indices)
            places = positions if places is None else places.index_select(0, positions)
        if places is not None and compacts(e, len(features), stay):
            features, places = take(features, places), None
    return answers.output()
