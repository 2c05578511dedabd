"""The ensemble's weighted sum, and the sum with its statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.cases import Case, cases, make_logits
from benchmarks.memory import peak
from benchmarks.paired_timing import Comparison

HUGE = (4, 1024, 21841)
SIZES = [(4, 1, 10), (4, 64, 100), (4, 256, 1000), (7, 256, 200)]


def ensemble(case: Case, device: str) -> Comparison:
    """The weighted sum of logits of size (E, N, K)."""
    exits, rows, classes = case.size
    return Comparison(
        fused=ops.ensemble,
        baselines={
            "naive": baselines.ensemble_naive,
            "einsum": baselines.ensemble_einsum,
            "product": baselines.ensemble_product,
        },
        make=lambda: make_logits(case, device)[:2],
        reference=reference.ensemble,
        compiled=baselines.ensemble_naive,
        bytes_moved=(exits + 1) * rows * classes * case.torch_dtype.itemsize,
        **case.tolerance,
    )


def ensemble_stats(case: Case, device: str) -> Comparison:
    """The same with statistics."""
    exits, rows, classes = case.size

    def comparable(result: Any) -> tuple[Tensor, ...]:
        """The answer by its score: among equal scores (bfloat16) torch's top-k may name another class."""
        total, stats, answer = result
        return total, stats.float(), total.gather(1, answer[:, None])

    return Comparison(
        fused=ops.ensemble_stats,
        baselines={"naive": baselines.stats_naive, "eager": baselines.stats_eager},
        make=lambda: make_logits(case, device)[:2],
        reference=reference.ensemble_stats,
        compiled=baselines.stats_fusable,
        comparable=comparable,
        bytes_moved=(exits + 1) * rows * classes * case.torch_dtype.itemsize,
        **case.tolerance,
    )


@pytest.mark.parametrize(
    "case",
    cases(SIZES, huge=[HUGE], quick=("4x1x10", "4x64x100", "4x256x1000", "4x256x1000-bfloat16")),
)
def test_ensemble(paired_timing, case):
    paired_timing(ensemble(case, "cpu"))


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=[HUGE],
        goal=("4x1x10", "4x64x100", "4x256x1000", "7x256x200", "4x1024x21841"),
        quick=(
            "4x1x10", "4x64x100", "4x256x1000", "7x256x200", "4x256x1000-bfloat16", "4x256x1000-strided",
            "4x256x1000-allthreads",
        ),
    ),
)  # fmt: skip
def test_ensemble_stats(paired_timing, case):
    comparison = ensemble_stats(case, "cpu")
    logits, weights = comparison.make()
    # Equal scores have one answer here, which the baselines need not share.
    assert torch.equal(ops.ensemble_stats(logits, weights).argmax, reference.ensemble_stats(logits, weights).argmax)
    if case.size == HUGE:
        outputs = logits[0].numel() * logits.element_size() + logits.shape[1] * (3 * 4 + 8)
        for name, function in (("", ops.ensemble_stats), ("_eager", baselines.stats_eager)):
            used = peak(lambda function=function: function(logits, weights)).peak
            paired_timing.benchmark.extra_info[f"peak_over_outputs{name}"] = used / outputs
    paired_timing(comparison)
