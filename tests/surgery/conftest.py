"""The published figures, and one thread for all: the images here are small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def published() -> dict[str, Any]:
    """tests/golden/published.json: facts and figures of the published method."""
    return json.loads((Path(__file__).parents[1] / "golden" / "published.json").read_text())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine a parallel region costs more than the work inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
