"""Benchmarks of the operators, networks and engines on a CPU, each against baselines that are timed in turn with it.

    pytest benchmarks --benchmark-only -m quick        a look, under five minutes
    pytest benchmarks --benchmark-only -m goal         the cases that benchmarks/goals.toml judges
    pytest benchmarks --benchmark-only                 both
    pytest benchmarks --benchmark-only --full --inductor always --result FILE.json      the sweep: all cases, hours
    pytest benchmarks --benchmark-disable -m quick     compares the results and times nothing

The time that pytest-benchmark shows is the fused operator's, per round of ``extra_info["calls_per_round"]`` calls. The
baselines' medians per call and their ratio to the fused one (above 1: the fused one is faster) are in ``extra_info``.

With ``--result FILE.json`` every case is written to that file (benchmarks/aggregate.py says what is in it) as soon as
it is known, and cases that are in it are not run again: stopped at any moment, the same command goes on where it was.
Cases that were skipped or failed are tried again. benchmarks/compare.py compares two such files.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import aep_ext
from benchmarks import memory
from benchmarks.aggregate import ResultError, aggregate_case, open_result, save
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
    parser.addoption("--result", type=Path, metavar="FILE", help="keep results here; cases that are in it are not run")
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
    """Leaves out what is marked ``full`` unless asked for, and what is in the result file."""
    done = _result(config)["cases"] if config.getoption("--result") else ()
    full = config.getoption("--full")
    left_out = [item for item in items if item.name in done or ("full" in item.keywords and not full)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Writes a case down that was timed, or was skipped for a reason."""
    report = (yield).get_result()
    info = item.funcargs["benchmark"].extra_info if "benchmark" in getattr(item, "funcargs", {}) else {}
    timed = report.when == "call" and report.passed and "fused_median_us" in info
    if item.config.getoption("--result") is None or not (timed or report.skipped):
        return
    result = _result(item.config)
    if timed:
        result["cases"][item.name] = aggregate_case(info)
        result["skipped"].pop(item.name, None)
    else:
        result["skipped"][item.name] = report.longrepr[2].removeprefix("Skipped: ")
    save(item.config.getoption("--result"), result)


def _result(config: pytest.Config) -> dict[str, Any]:
    try:
        return open_result(config.getoption("--result"), _machine(config))
    except ResultError as error:
        raise pytest.UsageError(str(error)) from error


def _case(item: pytest.Item) -> Case | None:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, Case) else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _machine(config: pytest.Config) -> dict[str, Any]:
    """What a reader needs to judge a number: machine, versions, threads, allocator; not the machine's name."""
    info = aep_ext.build_info()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "python_version": platform.python_version(),
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


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["aep_ext"] = _machine(config)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    case = _case(request.node)
    torch.set_num_threads(request.config.getoption("--threads") if case is None else case.threads or ALL_THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def paired_timing(request: pytest.FixtureRequest, benchmark: Any) -> PairedTiming:
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
    return PairedTiming(benchmark, option("--case-seconds"), inductor == "always", memory.known_bandwidth)
