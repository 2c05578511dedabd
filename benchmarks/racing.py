"""How contestants are timed: in turn, on the same rotating inputs, after their results were compared.

The machine's moods (clock, neighbours, memory traffic) last longer than a round of all contestants, so the *paired*
ratio (rival's time over fused time within one round) hardly sees them. The order of the rivals turns from round to
round, so that nobody always runs in the caches that the same neighbour left.

Where others compute on the same cores, ``--benchmark-timer=time.thread_time`` leaves out what they take: a benchmark
with one thread then counts its own time only.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

ROUND_SECONDS = 1.5e-3  # calls are repeated inside a round until it takes about this long: the timer's cost vanishes
MIN_ROUNDS, MAX_ROUNDS, WARMUP_ROUNDS = 5, 51, 2

# Who is not "eager torch as a user could write it"; engines and the trunk's own variants are not either.
NOT_EAGER = ("inductor", "reference", "published", "with_heads")
NOT_EAGER_PREFIX = "whole"

Contestant = Callable[..., object]


class Rotation:
    """Calls a contestant on one input set after the other."""

    def __init__(
        self, function: Contestant, inputs: Sequence[tuple[Any, ...]], clock: Callable[[], float] | None = None
    ) -> None:
        self.function, self.inputs, self.turn = function, inputs, 0
        self.clock = clock or time.perf_counter

    def round(self, calls: int) -> None:
        """``calls`` calls; on a GPU it ends when the device has finished them."""
        for _ in range(calls):
            self.function(*self.inputs[self.turn])
            self.turn = (self.turn + 1) % len(self.inputs)
        if torch.cuda.is_initialized():  # only where a benchmark has used the GPU
            torch.cuda.synchronize()

    def seconds(self, calls: int) -> float:
        """Time of one call, from a round of ``calls``."""
        start = self.clock()
        self.round(calls)
        return (self.clock() - start) / calls


def pace(contestant: Rotation, seconds: float = ROUND_SECONDS) -> tuple[int, float]:
    """How many calls take about ``seconds``, and how long a round of so many is.

    An interruption only ever adds time, so it is the shortest of three measurements that counts: one preempted call
    must not make a contestant look slow and leave it with a round of a single call.
    """
    best = min(contestant.seconds(1) for _ in range(2))
    if best > 10 * seconds:  # nothing to calibrate, and time to save
        return 1, best
    calls = 1
    while contestant.seconds(calls) * calls < seconds / 4:
        calls *= 2
    best = min(contestant.seconds(calls) for _ in range(3))
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


def condense_times(own: Sequence[float], times: dict[str, Sequence[float]], ceilings: Sequence[str]) -> dict[str, Any]:
    """Medians in microseconds, ratios, paired ratios and their quartile range, as they go into ``extra_info``.

    ``own`` and each of ``times``: seconds per call, round by round. ``ceilings`` are not rivals (a plain copy, say):
    they have ratios but do not enter ``ratio_best_*``.
    """
    info: dict[str, Any] = {"fused_median_us": statistics.median(own) * 1e6}
    for name, values in times.items():
        paired = [v / o for v, o in zip(values, own, strict=True)]
        info[f"{name}_median_us"] = statistics.median(values) * 1e6
        info[f"ratio_{name}"] = statistics.median(values) / statistics.median(own)
        info[f"paired_ratio_{name}"] = statistics.median(paired)
        info[f"iqr_{name}"] = quartile_range(paired)
    rivals = [name for name in times if name not in ceilings]
    if rivals:
        info["ratio_best_rival"] = min(info[f"ratio_{name}"] for name in rivals)
    eager = [name for name in rivals if name not in NOT_EAGER and not name.startswith(NOT_EAGER_PREFIX)]
    if eager:
        best = min(eager, key=lambda name: info[f"paired_ratio_{name}"])
        info["best_eager"] = best
        info["ratio_best_eager"] = min(info[f"ratio_{name}"] for name in eager)
        info["paired_ratio_best_eager"] = info[f"paired_ratio_{best}"]
        info["iqr_best_eager"] = info[f"iqr_{best}"]
    return info


def compare(
    result: object, expected: object, comparable: Callable[[Any], object] | None, rtol: float, atol: float, who: str
) -> None:
    """Raises AssertionError with the contestant's name where its result is another than expected."""
    if comparable is not None:
        result, expected = comparable(result), comparable(expected)
    torch.testing.assert_close(
        _plain(result), _plain(expected), rtol=rtol, atol=atol, equal_nan=True, check_dtype=False,
        check_stride=False, msg=lambda text: f"{who}: {text}",
    )  # fmt: skip


def _plain(result: object) -> object:
    """Named tuples as tuples, tensors without their graph."""
    if isinstance(result, torch.Tensor):
        return result.detach()
    if isinstance(result, (tuple, list)):
        return tuple(_plain(entry) for entry in result)
    return result


class Race:
    """The fixture ``race``: ``race(fused, rivals)`` compares the results with each other's, then times all in turn.

    Args of the call:
        fused: the contestant that pytest-benchmark's own columns show.
        rivals: by name; names other than ``inductor``, ``reference`` and ``published`` count as eager torch.
        inputs: argument tuples that rotate; without it contestants take no arguments.
        reference: what all results are compared with, and itself a rival (column ``reference``): the pure-torch path.
        inductor: a function that ``torch.compile`` compiles once, outside the timing; the rival ``inductor``.
        around: wraps the compiled function (a backward around a compiled forward, say).
        once: rivals too slow to alternate: one timed call each, and the ratio says so (``timed_once``).
        ceilings: not rivals but limits (a plain copy): timed in turn, not compared.
        comparable: maps a result to what is compared (gathers, scales); default: all of it.
        rtol, atol: of the comparison.
        bytes_moved: bytes read and written at least by one call; adds GB/s and its fraction of the read bandwidth.
    """

    def __init__(self, benchmark: Any, case_seconds: float, inductor: bool, bandwidth: Callable[..., dict]) -> None:
        self.benchmark, self.case_seconds, self.with_inductor = benchmark, case_seconds, inductor
        self.bandwidth = bandwidth

    def __call__(
        self,
        fused: Contestant,
        rivals: dict[str, Contestant],
        *,
        inputs: Sequence[tuple[Any, ...]] | None = None,
        reference: Contestant | None = None,
        inductor: Contestant | None = None,
        around: Callable[[Contestant], Contestant] | None = None,
        once: dict[str, Contestant] | None = None,
        ceilings: dict[str, Contestant] | None = None,
        comparable: Callable[[Any], object] | None = None,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        bytes_moved: int | None = None,
    ) -> None:
        inputs = [()] if inputs is None else list(inputs)
        rivals, once, ceilings = dict(rivals), dict(once or {}), dict(ceilings or {})
        info = self.benchmark.extra_info
        if inductor is not None and self.with_inductor:
            compiled, reason = compile_now(inductor, around, inputs)
            if compiled is None:
                info["left_out"] = {"inductor": reason}
            else:
                rivals["inductor"] = compiled
        if reference is not None:
            rivals["reference"] = reference
        oracle = reference or fused
        for arguments in inputs:
            expected = oracle(*arguments)
            for name, contestant in {"fused": fused, **rivals}.items():
                if contestant is not oracle:
                    compare(contestant(*arguments), expected, comparable, rtol, atol, name)
        clock = self._clock(inputs)
        info["threads"], info["input_sets"], info["clock"] = torch.get_num_threads(), len(inputs), clock.__name__
        self._time(Rotation(fused, inputs, clock), rivals | ceilings, tuple(ceilings), inputs)
        if self.benchmark.stats is None:  # --benchmark-disable
            return
        for name, contestant in once.items():
            start = clock()
            result = contestant(*arguments)
            info[f"{name}_median_us"] = (clock() - start) * 1e6
            compare(result, expected, comparable, rtol, atol, name)
            info[f"ratio_{name}"] = info[f"{name}_median_us"] / info["fused_median_us"]
            info.setdefault("timed_once", []).append(name)
        if bytes_moved is not None and inputs_on_cpu(inputs):
            self._bandwidth(bytes_moved, clock)

    def _clock(self, inputs: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
        """The clock of ``--benchmark-timer``, for the rivals too. Several threads, or a GPU, need the wall's."""
        clock = getattr(self.benchmark, "_timer", time.perf_counter)
        if torch.get_num_threads() > 1 or not inputs_on_cpu(inputs):
            self.benchmark._timer = clock = time.perf_counter
        return clock

    def _time(
        self, fused: Rotation, others: dict[str, Contestant], ceilings: Sequence[str], inputs: Sequence[tuple[Any, ...]]
    ) -> None:
        if self.benchmark.disabled:  # --benchmark-disable: a check of the results, which is done
            self.benchmark.pedantic(fused.round, (1,))
            return
        turns = {name: Rotation(contestant, inputs, fused.clock) for name, contestant in others.items()}
        with no_garbage_collection():
            fused_calls, cycle = pace(fused)
            calls: dict[str, int] = {}
            for name, turn in turns.items():
                calls[name], round_seconds = pace(turn)
                cycle += round_seconds
            rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, round(self.case_seconds / cycle)))
            times: dict[str, list[float]] = {name: [] for name in turns}
            order = list(turns)

            def everyone_else() -> None:
                order.append(order.pop(0))
                for name in order:
                    times[name].append(turns[name].seconds(calls[name]))

            self.benchmark.pedantic(
                lambda: fused.round(fused_calls),
                setup=everyone_else if turns else None,
                rounds=rounds,
                warmup_rounds=WARMUP_ROUNDS if cycle < 1.0 else 0,  # seconds of work have warmed up already
                iterations=1,
            )
        info = self.benchmark.extra_info
        info["calls_per_round"] = fused_calls
        if self.benchmark.stats is None:
            return
        own = [t / fused_calls for t in self.benchmark.stats.stats.data]
        info["rounds"] = len(own)
        info.update(condense_times(own, {name: values[-len(own) :] for name, values in times.items()}, ceilings))

    def _bandwidth(self, bytes_moved: int, clock: Callable[[], float]) -> None:
        info, limits = self.benchmark.extra_info, self.bandwidth(clock)
        info["gb_per_s"] = bytes_moved / info["fused_median_us"] * 1e-3
        info["read_gb_per_s"], info["copy_gb_per_s"] = limits["read"], limits["copy"]
        info["fraction_of_read"] = info["gb_per_s"] / limits["read"]


def inputs_on_cpu(inputs: Sequence[tuple[Any, ...]]) -> bool:
    """Whether no tensor among the arguments (or in a list among them) lies on another device."""

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for entry in value:
                yield from tensors(entry)

    return all(tensor.device.type == "cpu" for tensor in tensors(inputs))


def compile_now(
    function: Contestant, around: Callable[[Contestant], Contestant] | None, inputs: Sequence[tuple[Any, ...]]
) -> tuple[Contestant | None, str]:
    """``function`` compiled in torch.compile's default mode and run on every input set, or None and why not."""
    torch._dynamo.reset()  # every case compiles for its own shapes, and none meets the limit of recompilations
    compiled: Contestant = torch.compile(function, dynamic=False)
    compiled = around(compiled) if around is not None else compiled
    try:
        for arguments in inputs:
            compiled(*arguments)
    except Exception as error:  # no C++ compiler, no Triton, or something that Inductor cannot do
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return None, f"torch.compile failed: {text[:200]}"
    return compiled, ""
