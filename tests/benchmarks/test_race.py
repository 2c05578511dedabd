"""The fixture ``race`` on a benchmark and a clock that are made up: compared, timed in turn, put into extra_info."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import racing
from benchmarks.racing import MIN_ROUNDS, Race


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as a race uses."""

    disabled = False

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None
        self._timer = self.clock
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def pedantic(
        self, target: Callable, args: tuple = (), *, setup=None, rounds=1, warmup_rounds=0, iterations=1
    ) -> None:
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
def race() -> Race:
    return Race(FakeBenchmark(), 0.01, True, lambda clock: {"read": 10.0, "copy": 8.0})


@pytest.fixture
def takes(race: Race) -> Callable[..., Callable[..., torch.Tensor]]:
    """``takes(seconds, value)``: a contestant."""

    def make(seconds: float, value: float = 1.0) -> Callable[..., torch.Tensor]:
        def function(*_: object) -> torch.Tensor:
            race.benchmark.now += seconds
            return torch.tensor(value)

        return function

    return make


def test_what_a_race_records(race, takes):
    race(
        takes(1e-3), {"eager": takes(3e-3), "other": takes(5e-3)}, inputs=[(torch.ones(1),), (torch.ones(1),)],
        reference=takes(4e-3), once={"published": takes(2.0)}, ceilings={"copy": takes(5e-4, 7.0)},
        bytes_moved=5_000_000,
    )  # fmt: skip
    info = race.benchmark.extra_info
    assert info["rounds"] >= MIN_ROUNDS
    assert info["best_eager"] == "eager"
    ratios = {name.removeprefix("paired_ratio_"): value for name, value in info.items() if name.startswith("paired")}
    assert ratios == pytest.approx({"eager": 3.0, "other": 5.0, "reference": 4.0, "copy": 0.5, "best_eager": 3.0})
    assert (info["ratio_best_rival"], info["iqr_eager"]) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-9))
    assert (info["timed_once"], info["ratio_published"]) == (["published"], pytest.approx(2000.0))
    assert (info["gb_per_s"], info["fraction_of_read"]) == (pytest.approx(5.0), pytest.approx(0.5))
    assert (info["clock"], info["input_sets"], info["threads"]) == ("clock", 2, 1)


@pytest.mark.parametrize("who", ["fused", "eager"])
def test_a_wrong_result_is_not_timed(race, takes, who):
    wrong, right = takes(2e-3, 2.0), takes(2e-3, 1.0)
    with pytest.raises(AssertionError, match=f"{who}: "):
        race(wrong if who == "fused" else right, {"eager": wrong if who == "eager" else right}, reference=right)
    assert race.benchmark.stats is None


def test_disabled_it_compares_and_times_nothing(race, takes):
    race.benchmark.disabled = True
    race(takes(2e-3), {"eager": takes(2e-3)}, once={"published": takes(2e-3)}, bytes_moved=1)
    assert "fused_median_us" not in race.benchmark.extra_info
    with pytest.raises(AssertionError):
        race(takes(2e-3), {"eager": takes(2e-3, 2.0)})


def test_without_a_compiler_the_rival_is_left_out_with_the_reason(race, takes, monkeypatch):
    def compiled(*_: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long explanation")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    race(takes(2e-3), {"eager": takes(2e-3)}, inductor=takes(2e-3))
    info = race.benchmark.extra_info
    assert info["left_out"] == {"inductor": "torch.compile failed: RuntimeError: no C++ compiler"}
    assert "paired_ratio_inductor" not in info


def test_a_compiled_rival_is_compiled_once_and_outside_the_timing(race, takes, monkeypatch):
    compilations = []

    def compile_(function: Callable, dynamic: bool) -> Callable:
        compilations.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    race(takes(1e-3), {}, inductor=takes(2e-3), around=lambda compiled: lambda *arguments: compiled(*arguments))
    assert len(compilations) == 1
    assert race.benchmark.extra_info["paired_ratio_inductor"] > 1
    race.with_inductor = False
    race(takes(2e-3), {}, inductor=takes(2e-3))
    assert len(compilations) == 1


def test_several_threads_are_timed_by_the_wall_clock(race, takes, monkeypatch):
    race(takes(2e-3), {})
    assert race.benchmark.extra_info["clock"] == "clock"
    monkeypatch.setattr(racing.torch, "get_num_threads", lambda: 2)
    race(lambda: time.sleep(1e-3), {})
    assert race.benchmark.extra_info["clock"] == "perf_counter"
