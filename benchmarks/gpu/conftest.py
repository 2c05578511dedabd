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

from benchmarks.gpu import store

_FIGURES = pytest.StashKey[dict[str, Any]]()
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
    path, stage, source = target
    done = store.finished(path, stage, source)
    ours = [item for item in items if "benchmarks/gpu/" in item.path.as_posix()]
    again = [item for item in ours if _part(item) in done]
    if again:
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item not in again]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("AEP_GPU_END", "inf")):
        pytest.skip(_TIME_IS_UP)
    target = _target()
    if target is not None:  # who ends the process is known by this
        path, stage, source = target
        store.record(path, stage, _part(item), source, "unfinished", 0.0, store.BEGUN)


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
        note = str(call.excinfo.value).strip().splitlines()[0][:300] if str(call.excinfo.value).strip() else ""
        note = f"{call.excinfo.typename}: {note}"
    figures = item.stash.get(_FIGURES, None)
    more = {} if figures is None else {"details": figures}
    path, stage, source = target
    store.record(path, stage, _part(item), source, status, report.duration, note, **more)
    print(f"\ngpu_check: {stage}: {_part(item)}: {status}" + (f" ({note})" if note else ""), flush=True)


@pytest.fixture
def figures(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``figures(found, again)``: keeps what was measured; ``again``, ours, also gives pytest-benchmark its columns."""

    def keep(found: dict[str, Any], again: Callable[[], object]) -> None:
        request.node.stash[_FIGURES] = found
        benchmark.group = os.environ.get("AEP_GPU_STAGE", "gpu")
        benchmark.extra_info.update(found)
        benchmark.pedantic(again, rounds=5, warmup_rounds=1)

    return keep


@pytest.fixture(scope="session")
def copy_gb_per_s() -> Callable[[], float]:
    """The copy bandwidth: from the check's ceilings where they are known, else measured once."""
    known: list[float] = []

    def best() -> float:
        if not known:
            target = _target()
            entry = store.read(target[0])["stages"].get("ceilings", {}).get("ceilings", {}) if target else {}
            table = entry.get("details", {}).get("copy_gb_per_s")
            if table is None:
                from benchmarks.gpu.ceilings import copy_bandwidth

                table = copy_bandwidth()
            known.append(max(size["median"] for size in table.values()))
        return known[0]

    return best


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every case starts without another's memory; where a capture failed, in another process."""
    yield
    torch, clock = sys.modules.get("torch"), sys.modules.get("benchmarks.gpu.clock")
    if clock is not None and clock.broken_captures:
        request.session.shouldfail = "a capture failed, which torch does not get over in this process"
    elif torch is not None and torch.cuda.is_initialized():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
