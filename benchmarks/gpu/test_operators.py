"""Operators on a GPU against plain torch, torch.compile and Liger-Kernel. Has not run on a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.measure import measure
from benchmarks.gpu.operators import all_cases, setup


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(all_cases()), ids=lambda case: case.id)
def test_operator(figures, copy_gb_per_s, case):
    found = measure(case, copy_gb_per_s)
    ours = setup(case, "cuda")
    arguments = ours.make()

    def again() -> None:
        ours.fused(*arguments)
        torch.cuda.synchronize()

    figures(found, again)
