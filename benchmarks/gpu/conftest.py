"""Cases of the GPU check: those that are finished are not run again, each is written down at once, and time is kept.

``benchmarks.gpu.check`` says by environment where to (AEP_GPU_RESULT, AEP_GPU_STAGE, AEP_GPU_SOURCE) and until when
(AEP_GPU_END, seconds since the epoch). Without these, ``pytest benchmarks/gpu -m gpu`` runs all and writes nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import result_file

_DETAILS = pytest.StashKey[dict[str, Any]]()
_TIME_IS_UP = "no time left"


def _target() -> tuple[Path, str, str] | None:
    result = os.environ.get("AEP_GPU_RESULT")
    return (Path(result), os.environ["AEP_GPU_STAGE"], os.environ["AEP_GPU_SOURCE"]) if result else None


def _part(item: pytest.Item) -> str:
    """The case's id: ``ensemble-4x1x10``."""
    return item.callspec.id if hasattr(item, "callspec") else item.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    target = _target()
    if target is None:
        return
    done = result_file.finished(*target)
    again = [item for item in items if "benchmarks/gpu/" in item.path.as_posix() and _part(item) in done]
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in again]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("AEP_GPU_END", "inf")):
        pytest.skip(_TIME_IS_UP)
    target = _target()
    if target is not None:  # what ends the process is known by this
        path, stage, source = target
        result_file.record(path, stage, _part(item), source, "unfinished", 0.0, result_file.BEGUN)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = (yield).get_result()
    target = _target()
    if target is None or not (report.when == "call" or (report.when == "setup" and not report.passed)):
        return
    status, note = report.outcome, ""
    if report.skipped:
        note = report.longrepr[2].removeprefix("Skipped: ")
        status = "unfinished" if note == _TIME_IS_UP else "left out"
    elif report.failed:
        first = (str(call.excinfo.value).strip().splitlines() or [""])[0]
        note = f"{call.excinfo.typename}: {first[:300]}"
    details = item.stash.get(_DETAILS, None)
    more = {} if details is None else {"details": details}
    path, stage, source = target
    result_file.record(path, stage, _part(item), source, status, report.duration, note, **more)
    print(f"\ngpu_check: {stage}: {_part(item)}: {status}" + (f" ({note})" if note else ""), flush=True)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``record(found, call)``: keeps what was measured; ``call`` gives pytest-benchmark its own columns."""

    def write(found: dict[str, Any], call: Callable[[], object]) -> None:
        request.node.stash[_DETAILS] = found
        benchmark.group = os.environ.get("AEP_GPU_STAGE", "gpu")
        benchmark.extra_info.update(found)
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)

    return write


@pytest.fixture(scope="session")
def copy_gb_per_s() -> Callable[[], float]:
    """The copy bandwidth: from the check's ceilings where they are known, else measured once."""
    known: list[float] = []

    def best() -> float:
        if not known:
            target = _target()
            stages = result_file.read(target[0])["stages"] if target else {}
            table = stages.get("ceilings", {}).get("ceilings", {}).get("details", {}).get("copy_gb_per_s")
            if table is None:
                from benchmarks.gpu.measure import copy_bandwidth

                table = copy_bandwidth()
            known.append(max(size["median"] for size in table.values()))
        return known[0]

    return best


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every case starts without another's memory; where a capture failed, in another process."""
    yield
    torch, measure = sys.modules.get("torch"), sys.modules.get("benchmarks.gpu.measure")
    if measure is not None and measure.broken_captures:
        request.session.shouldfail = "a capture failed, which torch does not get over in this process"
    elif torch is not None and torch.cuda.is_initialized():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
