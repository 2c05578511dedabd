"""Paired benchmarks: contestants alternate inside one benchmark, so that the machine's moods meet all of them alike.

    pytest benchmarks --benchmark-only                 everything
    pytest benchmarks --benchmark-only -m quick        a look, under two minutes
    pytest benchmarks --benchmark-only --benchmark-json=result.json

The time that pytest-benchmark shows is the fused operator's, per round of ``extra_info["calls_per_round"]`` calls. The
rivals' medians per call and their ratio to the fused one (above 1: the fused one is faster) are in ``extra_info``.
On a GPU (``-m gpu``) a round ends when the device has finished all of its calls, so what is timed is a stream of
calls and not the latency of one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import aep_ext

ROUNDS = 25
ROUND_SECONDS = (
    1.5e-3  # calls are repeated inside a round until it takes about this long: the timer's own cost vanishes
)
WARMUP_ROUNDS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads during the benchmarks (default 1)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: the small selection of benchmarks that everyone can run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to judge a number: machine, versions, threads, allocator."""
    allocator = ("LD_PRELOAD", "MALLOC_CONF", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
    info = aep_ext.build_info()
    machine_info["aep_ext"] = {
        "version": info.version,
        "backend": info.backend,
        "isa_in_use": info.isa_in_use,
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": info.gpu,
        "threads": config.getoption("--threads"),
        "allocator": {name: os.environ[name] for name in allocator if name in os.environ} or "default",
    }


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def _per_call(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    _round(function, calls)
    return (time.perf_counter() - start) / calls


def _round(function: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        function()
    if torch.cuda.is_initialized():  # only where a benchmark has used the GPU
        torch.cuda.synchronize()


def _calls_per_round(function: Callable[[], object]) -> int:
    function()
    calls = 1
    while (elapsed := _per_call(function, calls) * calls) < ROUND_SECONDS / 4:
        calls *= 2
    return max(1, round(calls * ROUND_SECONDS / elapsed))


@pytest.fixture
def race(benchmark: Any) -> Callable[..., None]:
    """``race(fused, rivals)``: compares the results with the rivals', then times all in turn."""

    def run(fused: Callable[[], object], rivals: dict[str, Callable[[], object]]) -> None:
        for rival in rivals.values():
            torch.testing.assert_close(fused(), rival(), rtol=1e-4, atol=1e-5)
        calls = {name: _calls_per_round(rival) for name, rival in rivals.items()}
        fused_calls = _calls_per_round(fused)
        times: dict[str, list[float]] = {name: [] for name in rivals}

        def others() -> None:
            for name, rival in rivals.items():
                times[name].append(_per_call(rival, calls[name]))

        def round_of_fused() -> None:
            _round(fused, fused_calls)

        benchmark.pedantic(round_of_fused, setup=others, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS, iterations=1)
        info = benchmark.extra_info
        info["calls_per_round"] = fused_calls
        info["threads"] = torch.get_num_threads()
        if benchmark.stats is None:  # --benchmark-disable
            return
        own = [t / fused_calls for t in benchmark.stats.stats.data]
        info["fused_median_us"] = statistics.median(own) * 1e6
        for name, values in times.items():
            values = values[-len(own) :]  # without the warm-up
            info[f"{name}_median_us"] = statistics.median(values) * 1e6
            info[f"ratio_{name}"] = statistics.median(values) / statistics.median(own)
            info[f"paired_ratio_{name}"] = statistics.median(v / o for v, o in zip(values, own, strict=True))
        info["ratio_best_rival"] = min(info[f"ratio_{name}"] for name in rivals)

    return run
