"""Paired timing: an operator and its baselines run in turn on the same rotating inputs, after a comparison of results.

Changes of the machine's speed (clock, neighbours, memory traffic) last longer than one round of all functions, so the
*paired* ratio (the baseline's time over the operator's within one round) hardly sees them. The order of the baselines
turns from round to round, so that none always runs in the caches that the same neighbour left.

Where others compute on the same cores, ``--benchmark-timer=time.thread_time`` leaves out what they take: a benchmark
with one thread then counts its own time only.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cases import bytes_of, input_sets

ROUND_SECONDS = 1.5e-3  # calls are repeated inside a round until it takes about this long: the timer's cost vanishes
MIN_ROUNDS, MAX_ROUNDS, WARMUP_ROUNDS = 5, 51, 2
# Baselines that are not "eager torch as a user could write it", by the beginning of their name.
NOT_EAGER = ("inductor", "reference", "published", "with_heads", "whole")

Function = Callable[..., Any]


@dataclass
class Comparison:
    """An operator and what it is compared with.

    Attributes:
        fused: the operator, which pytest-benchmark's own columns show.
        baselines: by name; what :data:`NOT_EAGER` does not name counts as eager torch.
        make: makes one set of arguments; several sets rotate.
        sets: how many, instead of as many as the caches ask for.
        reference: what all results are compared with, and itself a baseline: the pure-torch path.
        compiled: what ``torch.compile`` gets, once and outside the timing: the baseline ``inductor``.
        around: wraps the compiled function (a backward around a compiled forward, say).
        once: baselines too slow to alternate: one timed call each, and the result says so (``timed_once``).
        limits: no baselines but limits (a plain copy): timed in turn, not compared.
        liger: makes Liger-Kernel's form for a GPU; raises ImportError without the package.
        comparable: maps a result to what is compared (gathers, scales).
        rtol, atol: of the comparison on a CPU.
        bytes_moved: bytes that one call reads and writes at least; adds GB/s and its fraction of the read bandwidth.
    """

    fused: Function
    baselines: dict[str, Function]
    make: Callable[[], tuple[Any, ...]] = lambda: ()
    sets: int | None = None
    reference: Function | None = None
    compiled: Function | None = None
    around: Callable[[Function], Function] = lambda function: function
    once: dict[str, Function] = field(default_factory=dict)
    limits: dict[str, Function] = field(default_factory=dict)
    liger: Callable[[], Function] | None = None
    comparable: Callable[[Any], Any] = lambda result: result
    rtol: float = 1e-4
    atol: float = 1e-5
    bytes_moved: int | None = None

    def inputs(self) -> list[tuple[Any, ...]]:
        """The argument sets that rotate on a CPU."""
        first = self.make()
        sets = self.sets or (input_sets(bytes_of(first)) if first else 1)
        return [first, *(self.make() for _ in range(sets - 1))]


class Rotation:
    """Calls a function on one set of arguments after the other."""

    def __init__(
        self, function: Function, inputs: Sequence[tuple[Any, ...]], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.function, self.inputs, self.turn, self.clock = function, inputs, 0, clock

    def round(self, calls: int) -> None:
        """``calls`` calls."""
        for _ in range(calls):
            self.function(*self.inputs[self.turn])
            self.turn = (self.turn + 1) % len(self.inputs)

    def seconds(self, calls: int) -> float:
        """Time of one call, from a round of ``calls``."""
        start = self.clock()
        self.round(calls)
        return (self.clock() - start) / calls


def calls_per_round(rotation: Rotation, seconds: float = ROUND_SECONDS) -> tuple[int, float]:
    """How many calls take about ``seconds``, and how long a round of so many is.

    An interruption only ever adds time, so it is the shortest of three measurements that counts: one preempted call
    must not make a function look slow and leave it with a round of a single call.
    """
    best = min(rotation.seconds(1) for _ in range(2))
    if best > 10 * seconds:  # nothing to calibrate, and time to save
        return 1, best
    calls = 1
    while rotation.seconds(calls) * calls < seconds / 4:
        calls *= 2
    best = min(rotation.seconds(calls) for _ in range(3))
    calls = max(1, round(seconds / best))
    return calls, calls * best


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collects now and not while timing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def quartile_range(values: Sequence[float]) -> float:
    """The distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def summarize(own: Sequence[float], times: dict[str, Sequence[float]], limits: Sequence[str] = ()) -> dict[str, Any]:
    """Medians in microseconds, ratios, paired ratios and their quartile range, as they go into ``extra_info``.

    ``own`` and each of ``times``: seconds per call, round by round. ``limits`` are not among the eager baselines.
    """
    info: dict[str, Any] = {"fused_median_us": statistics.median(own) * 1e6}
    for name, values in times.items():
        paired = [v / o for v, o in zip(values, own, strict=True)]
        info[f"{name}_median_us"] = statistics.median(values) * 1e6
        info[f"ratio_{name}"] = statistics.median(values) / statistics.median(own)
        info[f"paired_ratio_{name}"] = statistics.median(paired)
        info[f"iqr_{name}"] = quartile_range(paired)
    eager = [name for name in times if name not in limits and not name.startswith(NOT_EAGER)]
    if eager:
        best = min(eager, key=lambda name: info[f"paired_ratio_{name}"])
        info["best_eager"] = best
        info["ratio_best_eager"] = min(info[f"ratio_{name}"] for name in eager)
        info["paired_ratio_best_eager"], info["iqr_best_eager"] = info[f"paired_ratio_{best}"], info[f"iqr_{best}"]
    return info


def assert_same(name: str, result: Any, expected: Any, comparison: Comparison) -> None:
    """Raises AssertionError, naming the function, where its result is another than expected."""
    torch.testing.assert_close(
        _detached(comparison.comparable(result)), _detached(comparison.comparable(expected)), rtol=comparison.rtol,
        atol=comparison.atol, equal_nan=True, check_dtype=False, check_stride=False,
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def _detached(result: Any) -> Any:
    """Named tuples as tuples, tensors without their graph."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, (tuple, list)):
        return tuple(_detached(entry) for entry in result)
    return result


class PairedTiming:
    """The fixture ``paired_timing``: ``paired_timing(comparison)`` compares all results, then times all in turn."""

    def __init__(self, benchmark: Any, case_seconds: float, inductor: bool, bandwidth: Callable[..., dict]) -> None:
        self.benchmark, self.case_seconds, self.with_inductor = benchmark, case_seconds, inductor
        self.bandwidth = bandwidth

    def __call__(self, comparison: Comparison) -> None:
        info, inputs, baselines = self.benchmark.extra_info, comparison.inputs(), dict(comparison.baselines)
        if comparison.compiled is not None and self.with_inductor:
            compiled, reason = compile_now(comparison, inputs)
            if compiled is None:
                info["left_out"] = {"inductor": reason}
            else:
                baselines["inductor"] = compiled
        if comparison.reference is not None:
            baselines["reference"] = comparison.reference
        oracle = comparison.reference or comparison.fused
        for arguments in inputs:
            expected = oracle(*arguments)
            for name, function in {"fused": comparison.fused, **baselines}.items():
                if function is not oracle:
                    assert_same(name, function(*arguments), expected, comparison)
        clock = self._clock()
        info["threads"], info["input_sets"], info["clock"] = torch.get_num_threads(), len(inputs), clock.__name__
        self._time(Rotation(comparison.fused, inputs, clock), baselines | comparison.limits, tuple(comparison.limits))
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        for name, function in comparison.once.items():
            start = clock()
            result = function(*arguments)
            info[f"{name}_median_us"] = (clock() - start) * 1e6
            assert_same(name, result, expected, comparison)
            info[f"ratio_{name}"] = info[f"{name}_median_us"] / info["fused_median_us"]
            info.setdefault("timed_once", []).append(name)
        if comparison.bytes_moved is not None:
            limits = self.bandwidth(clock)
            info["gb_per_s"] = comparison.bytes_moved / info["fused_median_us"] * 1e-3
            info["read_gb_per_s"], info["copy_gb_per_s"] = limits["read"], limits["copy"]
            info["fraction_of_read"] = info["gb_per_s"] / limits["read"]

    def _clock(self) -> Callable[[], float]:
        """The clock of ``--benchmark-timer``, for the baselines too. Several threads need the wall's."""
        if torch.get_num_threads() > 1:
            self.benchmark._timer = time.perf_counter
        return getattr(self.benchmark, "_timer", time.perf_counter)

    def _time(self, fused: Rotation, others: dict[str, Function], limits: Sequence[str]) -> None:
        if self.benchmark.disabled:  # --benchmark-disable: a check of the results, which is done
            self.benchmark.pedantic(fused.round, (1,))
            return
        rotations = {name: Rotation(function, fused.inputs, fused.clock) for name, function in others.items()}
        with no_garbage_collection():
            fused_calls, cycle = calls_per_round(fused)
            calls: dict[str, int] = {}
            for name, rotation in rotations.items():
                calls[name], round_seconds = calls_per_round(rotation)
                cycle += round_seconds
            times: dict[str, list[float]] = {name: [] for name in rotations}
            order = list(rotations)

            def time_the_others() -> None:
                order.append(order.pop(0))
                for name in order:
                    times[name].append(rotations[name].seconds(calls[name]))

            self.benchmark.pedantic(
                lambda: fused.round(fused_calls),
                setup=time_the_others if rotations else None,
                rounds=min(MAX_ROUNDS, max(MIN_ROUNDS, round(self.case_seconds / cycle))),
                warmup_rounds=WARMUP_ROUNDS if cycle < 1.0 else 0,  # seconds of work have warmed up already
                iterations=1,
            )
        info = self.benchmark.extra_info
        info["calls_per_round"] = fused_calls
        if self.benchmark.stats is None:
            return
        own = [t / fused_calls for t in self.benchmark.stats.stats.data]
        info["rounds"] = len(own)
        info.update(summarize(own, {name: values[-len(own) :] for name, values in times.items()}, limits))


def compile_now(comparison: Comparison, inputs: Sequence[tuple[Any, ...]]) -> tuple[Function | None, str]:
    """The compiled baseline, run on every input set, or None and why there is none."""
    torch._dynamo.reset()  # every case compiles for its own shapes, and none meets the limit of recompilations
    compiled = comparison.around(torch.compile(comparison.compiled, dynamic=False))
    try:
        for arguments in inputs:
            compiled(*arguments)
    except Exception as error:  # no C++ compiler, no Triton, or something that Inductor cannot do
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return None, f"torch.compile failed: {text[:200]}"
    return compiled, ""
