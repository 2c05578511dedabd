"""The data that the selection and loss figures were computed on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from published_formula import formula_data

Data = Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="session")
def data() -> Data:
    return formula_data
