"""Shared by all tests: seeds, threads, the GPU marker, and a header that says what this run cannot show."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # a missing native module is said in the header below
    import aep_ext
    from aep_ext import _load
    from aep_ext._build_info import OPTIONAL_PACKAGES


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Which backend the run tests, and which tests are left out for want of a package or a device."""
    info = aep_ext.build_info()
    lines = [f"aep_ext {info.version}: {info.backend}, torch {info.torch}, instruction set {info.isa_in_use or '-'}"]
    if _load.reason:
        lines.append(f"aep_ext runs on the reference: {_load.reason}")
    packages = dict.fromkeys(name for names in OPTIONAL_PACKAGES.values() for name in names)
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        lines.append(f"left out: tests that need {', '.join(absent)} (not installed)")
    if not torch.cuda.is_available():
        lines.append("left out: tests marked gpu (no CUDA device)")
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `campaign` unless -m names it; skip `gpu` where there is no CUDA device."""
    if "campaign" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """tests/golden/published.json: facts and figures of the published method."""
    return json.loads((Path(__file__).parent / "golden" / "published.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One thread: inputs are small here, and on a busy machine a parallel region costs more than the work inside.

    Tests that are about threads set their number themselves.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(420)
    np.random.seed(420)  # noqa: NPY002  (libraries under test draw from the global generator)
