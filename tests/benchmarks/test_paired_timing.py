"""Paired timing on a made-up clock: compared first, timed in turn, put into extra_info; and the baselines are right."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import memory
from benchmarks.cases import Case, cases, input_sets
from benchmarks.gpu.cases import COMPARISONS
from benchmarks.paired_timing import (
    MIN_ROUNDS,
    Comparison,
    PairedTiming,
    Rotation,
    assert_same,
    calls_per_round,
    summarize,
)


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as is used, with a clock that only contestants move."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None
        self._timer, self.now = self.clock, 0.0

    def clock(self) -> float:
        return self.now

    def pedantic(self, target: Callable, args: tuple = (), *, setup=None, rounds=1, warmup_rounds=0, iterations=1):
        data = []
        for _ in range(warmup_rounds + rounds):
            if setup is not None:
                setup()
            start = self._timer()
            target(*args)
            data.append(self._timer() - start)
        if not self.disabled:
            self.stats = SimpleNamespace(stats=SimpleNamespace(data=data[warmup_rounds:]))


@pytest.fixture
def timing() -> PairedTiming:
    return PairedTiming(FakeBenchmark(), 0.01, True, lambda clock: {"read": 10.0, "copy": 8.0})


@pytest.fixture
def takes(timing) -> Callable[..., Callable[..., torch.Tensor]]:
    """``takes(seconds, value)``: a function."""

    def make(seconds: float, value: float = 1.0) -> Callable[..., torch.Tensor]:
        def function(*_: object) -> torch.Tensor:
            timing.benchmark.now += seconds
            return torch.tensor(value)

        return function

    return make


def test_what_is_recorded(timing, takes, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function) or function)
    timing(
        Comparison(
            takes(1e-3),
            {"eager": takes(3e-3), "other": takes(5e-3)},
            make=lambda: (torch.ones(1),),
            sets=2,
            reference=takes(4e-3),
            compiled=takes(2e-3),
            once={"published": takes(2.0)},
            limits={"copy": takes(5e-4, 7.0)},
            bytes_moved=5_000_000,
        )
    )
    info = timing.benchmark.extra_info
    assert info["rounds"] >= MIN_ROUNDS and info["best_eager"] == "eager" and len(compiled) == 1
    ratios = {name.removeprefix("paired_ratio_"): value for name, value in info.items() if name.startswith("paired")}
    expected = {"eager": 3.0, "other": 5.0, "reference": 4.0, "inductor": 2.0, "copy": 0.5, "best_eager": 3.0}
    assert ratios == pytest.approx(expected)
    assert info["iqr_eager"] == pytest.approx(0.0, abs=1e-9)
    assert (info["timed_once"], info["ratio_published"]) == (["published"], pytest.approx(2000.0))
    assert (info["gb_per_s"], info["fraction_of_read"]) == (pytest.approx(5.0), pytest.approx(0.5))
    assert (info["clock"], info["input_sets"], info["threads"]) == ("clock", 2, torch.get_num_threads())


@pytest.mark.parametrize("who", ["fused", "eager"])
def test_a_wrong_result_is_not_timed(timing, takes, who):
    wrong, right = takes(2e-3, 2.0), takes(2e-3, 1.0)
    functions = {"fused": right, "eager": right} | {who: wrong}
    with pytest.raises(AssertionError, match=f"{who}: "):
        timing(Comparison(functions["fused"], {"eager": functions["eager"]}, reference=right))
    assert timing.benchmark.stats is None


def test_without_a_compiler_the_baseline_is_left_out_with_the_reason(timing, takes, monkeypatch):
    def compiled(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    timing(Comparison(takes(2e-3), {"eager": takes(2e-3)}, compiled=takes(2e-3)))
    info = timing.benchmark.extra_info
    assert info["left_out"] == {"inductor": "torch.compile failed: RuntimeError: no C++ compiler"}
    assert "paired_ratio_inductor" not in info


def test_one_interruption_does_not_decide_the_calls_of_a_round():
    """A clock that jumps by 50 ms once, while the length of a round is measured; inputs rotate all the while."""
    ticks, clock, seen = itertools.count(), {"now": 0.0}, []

    def advance(x: int) -> None:
        seen.append(x)
        clock["now"] += 10e-6 + (0.05 if next(ticks) == 64 else 0.0)

    calls, seconds = calls_per_round(Rotation(advance, [(1,), (2,), (3,)], lambda: clock["now"]), 1.5e-3)
    assert (calls, seconds) == (150, pytest.approx(1.5e-3)) and seen[:5] == [1, 2, 3, 1, 2]


def test_paired_ratios_do_not_feel_a_change_of_speed():
    """The machine becomes three times as slow half way; the paired ratio and its spread do not notice."""
    pace = [1.0] * 5 + [3.0] * 5
    times = {name: [factor * 1e-6 * p for p in pace] for name, factor in (("eager", 2), ("inductor", 1.5), ("copy", 1))}
    info = summarize([1e-6 * p for p in pace], times, ("copy",))
    assert info["paired_ratio_best_eager"] == info["paired_ratio_eager"] == pytest.approx(2.0)
    assert info["iqr_eager"] == pytest.approx(0.0, abs=1e-12) and info["best_eager"] == "eager"


def test_cases_and_input_sets():
    assert Case((4, 8), "out", "bfloat16", "strided", 0).id == "4x8-out-bfloat16-strided-allthreads"
    with pytest.raises(ValueError, match="no such case: 4x9"):
        cases([(4, 8)], goal=["4x9"])
    marks = {p.id: [m.name for m in p.marks] for p in cases([(4, 8)], goal=["4x8"], quick=["4x8"], huge=[(9, 9)])}
    assert len(marks) == 12 + 4
    assert marks["cpu-4x8"] == ["goal", "quick"] and marks["cpu-9x9-bfloat16"] == ["full"]
    assert [input_sets(n) for n in (160, 4 << 20, 16 << 20, 1 << 30)] == [8, 4, 2, 1]


def test_memory_peaks_are_counted():
    x = torch.randn(1 << 18)  # 1 MiB
    found = memory.peak(lambda: x * 2 + 1)
    assert 2 << 20 <= found.peak < (2 << 20) + 4096
    assert 1 << 20 <= found.held < (1 << 20) + 4096


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize(
    "operator, size, variant",
    [
        ("ensemble", (3, 5, 7), "plain"),
        ("ensemble_stats", (3, 5, 7), "plain"),
        ("joint_cross_entropy", (3, 5, 7), "plain"),
        ("joint_cross_entropy", (3, 5, 7), "in_place"),
        ("linear_joint_cross_entropy", (2, 5, 7), "wide"),
        ("subset_correct", (3, 20, 7), "plain"),
        ("multi_exit_linear_head", (2, 64, 5), "plain"),
        ("global_avg_pool", (2, 4, 3), "plain"),
        ("global_avg_pool", (2, 4, 3), "forward"),
        ("gate", (6,), "plain"),
        ("gate", (6,), "stay"),
    ],
)
def test_all_functions_of_a_comparison_give_the_same(operator, size, variant, layout):
    comparison = COMPARISONS[operator](Case(size, variant, layout=layout), "cpu")
    arguments = comparison.make()
    expected = comparison.reference(*arguments)
    functions = {"fused": comparison.fused, "compiled": comparison.around(comparison.compiled)}
    for name, function in (functions | comparison.baselines | comparison.once).items():
        assert_same(name, function(*arguments), expected, comparison)
    assert comparison.bytes_moved > 0
