"""The executor: a batch goes from exit to exit, and who is sure enough leaves.

The decisions are made by :func:`~aep_ext.inference.criteria.gate_step` on those that are still under way, in their
order, exactly as the simulator makes them. The features are no part of that step: they are cut down after it, and only
where somebody has left.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.inference.criteria import STATELESS, gate_step, initial_state
from aep_ext.inference.exit_policy import ExitPolicy
from aep_ext.inference.stages import StageRun
from aep_ext.ops import GateResult

_CPU = torch.device("cpu")  # said always: the default device may be another
_ACC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtypes that gates take, and those in which they form sums."""


class GatedOutput(NamedTuple):
    """What a gated net answers for a batch of N samples, in their order."""

    logits: Tensor
    """(N, K), the dtype of the exits' logits: R_e at the exit taken."""
    exit: Tensor
    """(N,) int64: the exit taken, from 0, in the network at hand."""
    confidence: Tensor
    """(N,) float32: the largest probability of the criterion's distribution there."""


class Rows(NamedTuple):
    """Those under way, without their features: n rows, in the order of their numbers."""

    running: Tensor
    """(n, K): the sum of b_j O_j so far, in the accumulation dtype."""
    indices: Tensor
    """(n,) int64: the caller's numbers, ascending."""
    state: Tensor
    """(n, S) int64: the criterion's memory."""


class Answers:
    """The outputs of N samples, written as they leave."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        """``like``: (any, K) in the accumulation dtype; ``dtype``: that of the answer's logits."""
        self.dtype = dtype
        self.logits = like.new_empty((n, like.shape[1]))
        self.exit = torch.empty(n, dtype=torch.int64, device=like.device)
        self.confidence = torch.empty(n, dtype=torch.float32, device=like.device)

    def write(self, e: int, indices: Tensor, logits: Tensor, stats: Tensor) -> None:
        """Rows that leave at exit e."""
        self.logits.index_copy_(0, indices, logits)
        self.exit.index_fill_(0, indices, e)
        self.confidence.index_copy_(0, indices, stats[:, 0])

    def output(self) -> GatedOutput:
        """What was written."""
        return GatedOutput(self.logits.to(self.dtype), self.exit, self.confidence)


@lru_cache(maxsize=64)
def _weight_sums(weights: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...]:
    """The sum of the weights before each exit, rounded as the operator rounds it in the accumulation ``dtype``.

    A sum in double precision could differ in the last bit, and with it a confidence.
    """
    total, sums = torch.zeros((), dtype=dtype, device=_CPU), []
    for weight in weights:
        sums.append(total.item())
        total = total + torch.tensor(weight, dtype=dtype, device=_CPU)
    return tuple(sums)


class Executor:
    """What a policy does to batches.

    Attributes:
        policy: the policy.
        last: number of the last exit.
        live: E flags, whether a sample may leave there before the end; the last is False.
    """

    def __init__(self, policy: ExitPolicy) -> None:
        self.policy = policy
        self.last = policy.num_exits - 1
        self.live = (*policy.enabled, False)
        self._thresholds = (*policy.thresholds, 0.0)
        self._in_place = isinstance(policy.criterion, str) and policy.criterion in STATELESS
        self._singles: dict[torch.dtype, list[tuple[tuple[Any, ...], Tensor]]] = {}

    def __call__(self, run: StageRun, x: Tensor) -> GatedOutput:
        """Answers a batch, (n, ...) of any size; closes the run."""
        try:
            features, logits = run(0, x)
            if self._in_place and logits.shape[0] == 1 and logits.is_cpu and logits.dtype in _ACC:
                return self._single(run, features, logits)
            return self._batch(run, features, logits)
        finally:
            run.close()

    def start(self, logits: Tensor, indices: Tensor) -> Rows:
        """The rows before the first exit, whose ``logits`` (n, K) settle classes, dtype and device."""
        n, classes = logits.shape
        running = torch.zeros((n, classes), dtype=_ACC.get(logits.dtype, torch.float32), device=logits.device)
        return Rows(running, indices, initial_state(self.policy.criterion, n, classes, logits.device))

    def step(self, e: int, rows: Rows, logits: Tensor) -> GateResult:
        """Exit e for ``rows``: the gate's result, with features of no columns."""
        policy, running = self.policy, rows.running
        return gate_step(
            policy.criterion,
            policy.criterion_on,
            running.narrow(1, 0, 0),
            running,
            _weight_sums(policy.output_weights, running.dtype)[e],
            rows.indices,
            rows.state,
            logits,
            exit_index=e,
            weight=policy.output_weights[e],
            threshold=self._thresholds[e],
            temperature=policy.temperatures[e],
            enabled=self.live[e],
            last=e == self.last,
        )

    def stay(self, e: int, rows: Rows, result: GateResult) -> int:
        """How many go on; read from the device only where some may leave."""
        if e == self.last:
            return 0
        return int(result.count.item()) if self.live[e] else len(rows.indices)

    def _batch(self, run: StageRun, features: Any, logits: Tensor) -> GatedOutput:
        n, dtype = len(logits), logits.dtype
        rows = self.start(logits, torch.arange(n, device=logits.device))
        answers: Answers | None = None
        for e in range(self.last + 1):
            if e:
                features, logits = run(e, features)
            result, present = self.step(e, rows, logits), len(rows.indices)
            stay = self.stay(e, rows, result)
            if stay == 0 and answers is None:  # all leave together, in order
                taken = torch.full((n,), e, dtype=torch.int64, device=logits.device)
                return GatedOutput(result.running.to(dtype), taken, result.stats[:, 0].contiguous())
            if stay < present:
                if answers is None:
                    answers = Answers(n, result.running, dtype)
                answers.write(e, result.indices[stay:], result.running[stay:], result.stats[stay:])
                if stay == 0:
                    break
                features = run.take(features, torch.searchsorted(rows.indices, result.indices[:stay]))
            rows = Rows(result.running[:stay], result.indices[:stay], result.state[:stay])
        return answers.output()

    def _single(self, run: StageRun, features: Any, logits: Tensor) -> GatedOutput:
        """One sample on the CPU, by a criterion without a memory: as :meth:`_batch` does, bit for bit, but in place.

        The sum is updated in the memory that the answer is given in. This call allocates it, so nothing that is
        written on is shared between calls or threads.
        """
        dtype = logits.dtype
        exits = self._singles.get(dtype)
        if exits is None:
            exits = self._singles[dtype] = self._single_exits(_ACC[dtype])
        running = torch.zeros((1, logits.shape[1]), dtype=_ACC[dtype], device=_CPU)
        stats = torch.empty((1, 3), dtype=torch.float32, device=_CPU)
        leaves = torch.empty(1, dtype=torch.bool, device=_CPU)
        for e, (numbers, _) in enumerate(exits):
            if e:
                features, logits = run(e, features)
            ops.gate_one_(running, stats, leaves, logits, *numbers)
            if leaves.item():
                break
        return GatedOutput(running if running.dtype == dtype else running.to(dtype), exits[e][1].clone(), stats[:, 0])

    def _single_exits(self, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], Tensor]]:
        """For each exit what ``gate_one_`` takes beside its tensors, and its number, (1,) int64."""
        policy, exits = self.policy, []
        columns = (_weight_sums(policy.output_weights, dtype), policy.output_weights, self._thresholds)
        for e, numbers in enumerate(zip(*columns, policy.temperatures, strict=True)):
            names = (policy.criterion, policy.criterion_on, self.live[e], e == self.last)
            # A default costs less than a string.
            arguments = numbers if names == ("confidence", "ensemble", True, False) else numbers + names
            exits.append((arguments, torch.tensor([e], device=_CPU)))
        return exits
