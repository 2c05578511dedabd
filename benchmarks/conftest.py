"""Benchmarks of the operators, networks and engines on a CPU, each against baselines that are timed in turn with it.

    pytest benchmarks --benchmark-only -m quick        a look, under five minutes
    pytest benchmarks --benchmark-only -m goal         the cases that benchmarks/goals.toml judges
    pytest benchmarks --benchmark-only                 both
    pytest benchmarks --benchmark-only --full          all cases: hours; benchmarks/sweep.py does it in resumable pieces
    pytest benchmarks --benchmark-only --benchmark-json=result.json
    pytest benchmarks --benchmark-disable -m quick     compares the results and times nothing

The time that pytest-benchmark shows is the fused operator's, per round of ``extra_info["calls_per_round"]`` calls. The
baselines' medians per call and their ratio to the fused one (above 1: the fused one is faster) are in ``extra_info``.
The benchmarks of a GPU are in benchmarks/gpu.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import aep_ext
from benchmarks import memory
from benchmarks.cases import ALL_THREADS, MARKS, Case
from benchmarks.paired_timing import PairedTiming

_ALLOCATOR = (
    "LD_PRELOAD", "MALLOC_CONF", "MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES",
    "MALLOC_MMAP_THRESHOLD_", "THP_MEM_ALLOC_ENABLE",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads of cases that do not say (default 1)")
    parser.addoption("--full", action="store_true", help="all cases (hours), not only the quick ones and the goals'")
    parser.addoption("--case-seconds", type=float, default=1.0, help="time for the rounds of one case (default 1)")
    parser.addoption(
        "--inductor",
        choices=("auto", "always", "never"),
        default="auto",
        help="torch.compile as a baseline; auto: except in cases that are quick and no goal (that is slow)",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, what in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {what}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``full`` unless asked for; skips what is marked ``gpu`` where there is no GPU."""
    left_out = [item for item in items if "full" in item.keywords and not config.getoption("--full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _case(item: pytest.Item) -> Case | None:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What a reader needs to judge a number: machine, versions, threads, allocator."""
    info = aep_ext.build_info()
    machine_info["aep_ext"] = {
        "version": info.version,
        "backend": info.backend,
        "isa_in_use": info.isa_in_use,
        "torch": torch.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_used": ALL_THREADS,
        "gpu": info.gpu,
        "threads": config.getoption("--threads"),
        "allocator": {name: os.environ[name] for name in _ALLOCATOR if name in os.environ} or "default",
    }


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    case = _case(request.node)
    torch.set_num_threads(request.config.getoption("--threads") if case is None else case.threads or ALL_THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bandwidth() -> Callable[[Callable[[], float]], dict[str, float]]:
    """``bandwidth(clock)``: read and copy, GB/s, with torch's current threads; measured once in a session for each."""
    known: dict[tuple[int, str], dict[str, float]] = {}

    def of_these_threads(clock: Callable[[], float]) -> dict[str, float]:
        key = (torch.get_num_threads(), clock.__name__)
        if key not in known:
            known[key] = memory.bandwidth(clock)
        return known[key]

    return of_these_threads


@pytest.fixture
def paired_timing(
    request: pytest.FixtureRequest, benchmark: Any, bandwidth: Callable[..., dict[str, float]]
) -> PairedTiming:
    """``paired_timing(comparison)``: see :class:`benchmarks.paired_timing.PairedTiming`."""
    option, marks = request.config.getoption, request.node.keywords
    inductor = option("--inductor")
    if inductor == "auto":
        inductor = "always" if "goal" in marks or "quick" not in marks else "never"
    operator = request.function.__name__.removeprefix("test_")
    benchmark.group = operator
    benchmark.extra_info["operator"] = operator
    benchmark.extra_info["marks"] = [name for name in ("goal", "quick") if name in marks]
    if (case := _case(request.node)) is not None:
        benchmark.extra_info["case"] = {
            "size": "x".join(str(n) for n in case.size),
            "variant": case.variant,
            "dtype": case.dtype,
            "layout": case.layout,
        }
    return PairedTiming(benchmark, option("--case-seconds"), inductor == "always", bandwidth)
