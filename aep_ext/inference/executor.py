"""The executor: a batch walks from exit to exit, and who is sure enough leaves.

The decisions are made by :meth:`Policy.gate` on those that are still under way, in their order, exactly as the
simulator makes them. The features are no part of that step: they follow it only where carrying fewer rows pays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.inference._old_criteria import Confidence, Entropy, Margin, Policy
from aep_ext.inference.settings import GateSettings
from aep_ext.inference.stages import Run
from aep_ext.ops import GateResult

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


def step(
    policy: Policy, settings: GateSettings, e: int, rows: Rows, logits: Tensor, nothing: Tensor | None = None
) -> GateResult:
    """Exit e for ``rows``: the gate's result, with features of no columns (``nothing``, if they are at hand)."""
    running = rows.running
    return policy.gate(
        running.narrow(1, 0, 0) if nothing is None else nothing,
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


def only_adds(policy: Policy) -> bool:
    """Whether an exit where nobody may leave only adds to the running ensemble: no memory of the policy's to keep."""
    return type(policy) in (Confidence, Entropy, Margin)


def add(settings: GateSettings, e: int, rows: Rows, logits: Tensor) -> Rows:
    """Exit e where nobody may leave, for a policy that only adds: as :func:`step` does, bit for bit."""
    running = rows.running
    return rows._replace(running=running + logits.to(running.dtype) * settings.weights[e])


def survivors(result: GateResult, stay: int) -> Rows:
    """The first ``stay`` rows of a gate's result."""
    return Rows(result.running[:stay], result.indices[:stay], result.state[:stay])


class Stop(NamedTuple):
    """One exit on the way of a single sample."""

    gate: Callable[..., GateResult] | None
    """The gate with all numbers but the sum of the weights; None where it only adds to the running ensemble."""
    weight_sum: float
    weight: float
    live: bool
    mark: Tensor
    """(1,) int64: the exit's number where only the gate sees it, else the sample's, 0."""


class First(NamedTuple):
    """What the walk of one sample starts from: made once for each form of logits, never written on."""

    policy: Policy
    settings: GateSettings
    running: Tensor
    state: Tensor
    nothing: Tensor
    """(1, 0): its features, for the gate."""
    stops: tuple[Stop, ...]


def first_of(policy: Policy, settings: GateSettings, logits: Tensor) -> First:
    """For one sample's logits (1, K).

    A gate hands on the sample's number whatever it is, so a built-in policy is given the exit's in its place: the
    ``exit`` of the answer is then there already. A user's own rule may look at it and is given the sample's.
    """
    last, stops = len(settings.live) - 1, []
    for e, live in enumerate(settings.live):
        numbers = {
            "weight": settings.weights[e],
            "threshold": settings.thresholds[e],
            "temperature": settings.temperatures[e],
            "enabled": live,
        }
        if only_adds(policy) and not live and e < last:
            gate = None
        elif type(policy).gate is Policy.gate:  # what that does, without the way there
            gate = partial(ops.gate, policy=policy.name, on=policy.on, **numbers)
        else:
            gate = partial(policy.gate, exit_index=e, **numbers)
        mark = torch.full((1,), e if policy.built_in else 0, dtype=torch.int64, device=logits.device)
        rows = start(policy, logits, mark)
        stops.append(Stop(gate, settings.sums[rows.running.dtype][e], settings.weights[e], live, mark))
    return First(policy, settings, rows.running, rows.state, rows.running.new_empty((1, 0)), tuple(stops))


def answer(
    run: Run, policy: Policy, settings: GateSettings, x: Tensor, compacts: Compacts, known: dict[Any, Any]
) -> GatedOutput:
    """A batch, (n, ...) of any size, from the first unit on; closes the run.

    ``known`` keeps where single samples start from, by form of the logits.
    """
    try:
        features, logits = run(0, x)
        if logits.shape[0] == 1:
            if logits.dtype in _ACC and type(logits) is Tensor and logits.is_cpu and only_adds(policy):
                return _slim(run, policy, settings, features, logits, known)
            return _one(run, policy, settings, features, logits, known)
        return _batch(run, policy, settings, features, logits, compacts)
    finally:
        run.close()


def all_at_the_end(settings: GateSettings, exit_logits: Tensor) -> GatedOutput:
    """The answers (E, n, K) of a batch that nobody leaves early, by a policy that only adds, in one operator: what the
    walk would give, bit for bit, for float32 and float64."""
    numbers = torch.tensor(settings.weights, dtype=exit_logits.dtype, device=exit_logits.device)
    found = ops.ensemble_stats(
        exit_logits,
        numbers,
        normalizer=settings.sums[exit_logits.dtype][-1],
        temperature=settings.temperatures[-1],
    )
    taken = torch.full(exit_logits.shape[1:2], len(exit_logits) - 1, dtype=torch.int64, device=exit_logits.device)
    return GatedOutput(found.logits, taken, found.stats[:, 0].contiguous())


def _one(
    run: Run, policy: Policy, settings: GateSettings, features: Any, logits: Tensor, known: dict[Any, First]
) -> GatedOutput:
    """One sample: no rows to sort, so nothing is gathered or scattered."""
    dtype = logits.dtype
    key = (logits.shape[1], dtype, logits.device, logits.is_inference())
    first = known.get(key)
    if first is None or first.settings is not settings or first.policy is not policy:
        first = known[key] = first_of(policy, settings, logits)
    _, _, running, state, nothing, stops = first
    last = len(stops) - 1
    for e, (gate, weight_sum, weight, live, mark) in enumerate(stops):
        if e:
            features, logits = run(e, features)
        if gate is None:
            running = running + logits.to(running.dtype) * weight
            continue
        result = gate(nothing, running, weight_sum, mark, state, logits)
        if e == last or (live and result.count.item() == 0):
            running, taken = result.running, result.indices
            if not policy.built_in:
                taken = torch.full_like(taken, e)
            return GatedOutput(
                running if running.dtype == dtype else running.to(dtype), taken, result.stats.select(1, 0)
            )
        running, state = result.running, result.state
    raise AssertionError("the last exit answers")


_ACC = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtypes that gates take, and those in which they form sums."""
_CPU = torch.device("cpu")  # said always: the default device may be another


class Slim(NamedTuple):
    """What :func:`_slim` needs, made once for each form of logits; tensors are only read."""

    policy: Policy
    settings: GateSettings
    stops: tuple[tuple[tuple[Any, ...], bool, Tensor], ...]
    """For each exit: what ``gate_one_`` takes beside its tensors, whether one may leave, and its number (1,) int64."""


def slim_of(policy: Policy, settings: GateSettings, dtype: torch.dtype) -> Slim:
    """For logits of ``dtype``."""
    stops, usual = [], ("confidence", "ensemble", True)
    exits = (settings.sums[_ACC[dtype]][:-1], settings.weights, settings.thresholds, settings.temperatures)
    for e, (numbers, live) in enumerate(zip(zip(*exits, strict=True), settings.live, strict=True)):
        names = (policy.name, policy.on, live)
        # A default costs less than a string.
        stops.append((numbers if names == usual else numbers + names, live, torch.tensor([e], device=_CPU)))
    return Slim(policy, settings, tuple(stops))


def _slim(
    run: Run, policy: Policy, settings: GateSettings, features: Any, logits: Tensor, known: dict[Any, Any]
) -> GatedOutput:
    """One sample on the CPU, by a policy without a memory: as :func:`_one` does, bit for bit, with fewer tensors.

    The sum is updated in the memory that the answer is given in. This call allocates it, so nothing that is written on
    is shared between calls or threads.
    """
    dtype = logits.dtype
    slim = known.get(dtype)
    if slim is None or slim.settings is not settings or slim.policy is not policy:
        slim = known[dtype] = slim_of(policy, settings, dtype)
    running = torch.zeros((1, logits.shape[1]), dtype=_ACC[dtype], device=_CPU)
    stats = torch.empty((1, 3), dtype=torch.float32, device=_CPU)
    leaves = torch.empty(1, dtype=torch.bool, device=_CPU)
    stops = slim.stops
    last = len(stops) - 1
    for e, (numbers, live, _) in enumerate(stops):
        if e:
            features, logits = run(e, features)
        ops.gate_one_(running, stats, leaves, logits, *numbers)
        if e == last or (live and leaves.item()):
            break
    taken = stops[e][2].clone()
    return GatedOutput(running if running.dtype == dtype else running.to(dtype), taken, stats.select(1, 0))


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


def _batch(
    run: Run, policy: Policy, settings: GateSettings, features: Any, logits: Tensor, compacts: Compacts
) -> GatedOutput:
    """Any number of samples but one."""
    n, last, adds = len(logits), len(settings.live) - 1, only_adds(policy)
    rows = start(policy, logits, torch.arange(n, device=logits.device))
    dtype = logits.dtype
    answers: Answers | None = None
    carried = n  # rows of features
    places: Tensor | None = None  # where among these the rows are; None: they are all of them, in order
    for e in range(last + 1):
        if e:
            features, logits = run(e, features)
            if places is not None:
                logits = logits.index_select(0, places)
        live, stay = settings.live[e], len(rows.indices)
        if adds and not live and e < last and stay:
            rows = add(settings, e, rows, logits)
        else:
            result, present = step(policy, settings, e, rows, logits), stay
            stay = 0 if e == last else result.count.item() if live else present
            if stay == 0 and answers is None:  # all leave together, in order
                taken = torch.full((n,), e, dtype=torch.int64, device=logits.device)
                return GatedOutput(result.running.to(dtype), taken, result.stats[:, 0].contiguous())
            before, rows = rows, survivors(result, stay) if stay < present else _all(result)
            if stay < present:
                if answers is None:
                    answers = Answers(n, result.running, dtype)
                answers.write(e, result.indices[stay:], result.running[stay:], result.stats[stay:])
                if stay == 0:
                    break
                positions = torch.searchsorted(before.indices, rows.indices)
                places = positions if places is None else places.index_select(0, positions)
        if places is not None and compacts(e, carried, stay):
            features, places, carried = run.take(features, places), None, stay
    return answers.output()


def _all(result: GateResult) -> Rows:
    """The rows of a gate's result where nobody left."""
    return Rows(result.running, result.indices, result.state)
