"""The executor: a batch goes from exit to exit, and who is sure enough leaves.

The decisions are made by :func:`~aep_ext.inference.criteria.gate_step` on those that are still under way, in their
order, exactly as the simulator makes them. The features are no part of that step: they are cut down after it, and only
where somebody has left.
"""

from __future__ import annotations

from functools import partial
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

    nothing: Tensor
    """(n, 0): in the features' place, for the gate."""
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
        self._in_place = isinstance(policy.criterion, str) and policy.criterion in STATELESS
        self._gates: dict[torch.dtype, list[tuple[partial[GateResult], float]]] = {}
        self._first: dict[Any, Rows] = {}  # what single samples start from
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
        state = initial_state(self.policy.criterion, n, classes, logits.device)
        return Rows(running.new_empty((n, 0)), running, indices, state)

    def step(self, e: int, rows: Rows, logits: Tensor) -> GateResult:
        """Exit e for ``rows``: the gate's result, with features of no columns."""
        gate, weight_sum = self._gates_of(rows.running.dtype)[e]
        running = torch.zeros_like(rows.running) if self.policy.starts_anew(e) else rows.running
        return gate(rows.nothing, running, weight_sum, rows.indices, rows.state, logits)

    def _gates_of(self, dtype: torch.dtype) -> list[tuple[partial[GateResult], float]]:
        """For each exit the gate with its numbers, and the sum of the weights before it, in the accumulation dtype."""
        if dtype in self._gates:
            return self._gates[dtype]
        policy, gates = self.policy, []
        for e, (weight_sum, weight, threshold, temperature) in enumerate(self._numbers(dtype)):
            numbers: dict[str, Any] = {"weight": weight, "threshold": threshold, "temperature": temperature}
            numbers |= {"enabled": self.live[e], "last": e == self.last}
            if isinstance(policy.criterion, str):  # what gate_step does, without the way there
                gate = partial(ops.gate, criterion=policy.criterion, criterion_on=policy.criterion_on, **numbers)
            else:
                gate = partial(gate_step, policy.criterion, policy.criterion_on, exit_index=e, **numbers)
            gates.append((gate, weight_sum))
        self._gates[dtype] = gates
        return gates

    def _numbers(self, dtype: torch.dtype) -> list[tuple[float, float, float, float]]:
        """For each exit the sum of the weights before it, its weight, threshold and temperature.

        The sum is rounded as the operator rounds it in the accumulation ``dtype``: in double precision it could differ
        in the last bit, and with it a confidence.
        """
        policy, numbers = self.policy, []
        total = torch.zeros((), dtype=dtype, device=_CPU)
        columns = policy.output_weights, (*policy.thresholds, 0.0), policy.temperatures
        for e, (weight, threshold, temperature) in enumerate(zip(*columns, strict=True)):
            if policy.starts_anew(e):
                total, weight = torch.zeros_like(total), 1.0
            numbers.append((total.item(), weight, threshold, temperature))
            total = total + torch.tensor(weight, dtype=dtype, device=_CPU)
        return numbers

    def stay(self, e: int, indices: Tensor, result: GateResult) -> int:
        """How many of ``indices`` go on; read from the device only where some may leave."""
        if e == self.last:
            return 0
        return result.count.item() if self.live[e] else len(indices)  # type: ignore[return-value]  # an int64's

    def _batch(self, run: StageRun, features: Any, logits: Tensor) -> GatedOutput:
        n, dtype = len(logits), logits.dtype
        form = n, logits.shape[1], dtype, logits.device
        rows = self._first.get(form)  # only read: a gate gives new tensors
        if rows is None:
            rows = self.start(logits, torch.arange(n, device=logits.device))
            if n == 1:
                self._first[form] = rows
        nothing, running, indices, state = rows
        answers: Answers | None = None
        for e, (gate, weight_sum) in enumerate(self._gates_of(running.dtype)):
            if e:
                features, logits = run(e, features)
                if self.policy.starts_anew(e):
                    running = torch.zeros_like(running)
            result = gate(nothing, running, weight_sum, indices, state, logits)
            stay = self.stay(e, indices, result)
            if stay == 0 and answers is None:  # all leave together, in order
                logits = result.running if result.running.dtype == dtype else result.running.to(dtype)
                return GatedOutput(logits, result.indices.fill_(e), result.stats.select(1, 0).contiguous())
            if stay == len(indices):
                nothing, running, indices, state = result[:4]
                continue
            if answers is None:
                answers = Answers(n, result.running, dtype)
            answers.write(e, result.indices[stay:], result.running[stay:], result.stats[stay:])
            if stay == 0:
                break
            before = indices
            nothing, running, indices, state = (column[:stay] for column in result[:4])
            features = run.take(features, torch.searchsorted(before, indices))
        assert answers is not None  # nobody stays at the last exit
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
        last = self.last
        for e, (numbers, _) in enumerate(exits):
            if e:
                features, logits = run(e, features)
                if self.policy.starts_anew(e):
                    running.zero_()
            ops.gate_one_(running, stats, leaves, logits, *numbers)
            if e == last or leaves.item():
                break
        if running.dtype != dtype:
            running = running.to(dtype)
        return GatedOutput(running, exits[e][1].clone(), stats.select(1, 0))

    def _single_exits(self, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], Tensor]]:
        """For each exit what ``gate_one_`` takes beside its tensors, and its number, (1,) int64."""
        policy, exits = self.policy, []
        for e, numbers in enumerate(self._numbers(dtype)):
            names = (policy.criterion, policy.criterion_on, self.live[e], e == self.last)
            # A default costs less than a string.
            arguments = numbers if names == ("confidence", "ensemble", True, False) else numbers + names
            exits.append((arguments, torch.tensor([e], device=_CPU)))
        return exits
