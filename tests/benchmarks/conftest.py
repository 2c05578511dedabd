"""Made-up benchmark results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.cases import MARKS

MACHINE = {
    "processor": "made up",
    "cores": 2,
    "cores_used": 2,
    "isa_in_use": "avx2",
    "torch": "9.9",
    "allocator": "default",
}


def pytest_configure(config: pytest.Config) -> None:
    """The benchmarks' own marks, which their conftest.py registers: some tests import the benchmarks."""
    for name, what in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {what}")


@pytest.fixture
def make_case() -> Callable[..., dict[str, Any]]:
    """A case of a result file: ``make_case("gate", best_eager=2.0, spread=0.1)``."""

    def make(operator: str = "gate", *, spread: float = 0.1, threads: int = 1, **ratios: float) -> dict[str, Any]:
        return {
            "operator": operator,
            "case": {"size": "8", "variant": "plain", "dtype": "float32", "layout": "contiguous"},
            "marks": ["goal"],
            "threads": threads,
            "rounds": 11,
            "median_us": {"fused": 10.0} | {name: 10.0 * ratio for name, ratio in ratios.items()},
            "ratio": dict(ratios),
            "paired_ratio": dict(ratios),
            "iqr": dict.fromkeys(ratios, spread),
            "more": {},
        }

    return make


@pytest.fixture
def make_result() -> Callable[..., dict[str, Any]]:
    """A result file's content from its cases, by name."""

    def make(cases: dict[str, dict[str, Any]], **machine: Any) -> dict[str, Any]:
        return {"format": 1, "machine": MACHINE | machine, "cases": cases, "skipped": {}}

    return make
