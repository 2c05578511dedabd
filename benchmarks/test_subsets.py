"""Scoring every subset of the exits."""

from __future__ import annotations

import pytest
import torch

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.cases import Case, cases, make_logits
from benchmarks.paired_timing import Comparison

SIZES = [(4, 2000, 10), (5, 1000, 100), (6, 1000, 100), (7, 500, 200)]
LARGE = [(10, 10000, 100), (12, 10000, 10)]
GPU_TABLE = 1 << 27  # scores at a time: half a gigabyte


def subset_correct(case: Case, device: str) -> Comparison:
    """Logits as a trained network gives them, or (``chance``) where no class can be ruled out early.

    The published way, one subset at a time, is slow where there are many subsets: it runs once.
    """
    large, table = case.size in LARGE, {} if device == "cpu" else {"table": GPU_TABLE}
    published = {"published": baselines.subsets_published} if device == "cpu" else {}
    exits, rows, classes = case.size
    return Comparison(
        fused=ops.subset_correct,
        baselines={"product": lambda *x: baselines.subsets_product(*x, **table)} | ({} if large else published),
        once=published if large else {},
        make=lambda: make_logits(case, device, trained=case.variant == "plain"),
        sets=1 if large else None,  # scores by the gigabyte pass through the caches: inputs need not rotate
        reference=reference.subset_correct,
        compiled=baselines.subset_ranks,  # the loop around it would be unrolled a thousand times
        around=lambda ranks: lambda *x: baselines.subsets_product(*x, ranks=ranks, **table),
        comparable=lambda counts: counts.double(),
        # Matrix products add up in another order: a sample whose label is level with another class may fall either way.
        rtol=5e-2 if case.dtype == "bfloat16" else 1e-3,
        atol=20 if case.dtype == "bfloat16" else 2,
        bytes_moved=exits * rows * classes * case.torch_dtype.itemsize,
    )


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=LARGE,
        variants=("plain", "chance"),
        goal=(
            *(f"{'x'.join(map(str, size))}{data}" for size in SIZES for data in ("", "-chance")),
            "10x10000x100", "12x10000x10",
        ),
        quick=("4x2000x10", "4x2000x10-chance", "7x500x200", "7x500x200-bfloat16"),
    ),
)  # fmt: skip
def test_subset_correct(paired_timing, case):
    comparison = subset_correct(case, "cpu")
    if case.dtype == "float32" and case.size not in LARGE:  # baselines may round otherwise, we count exactly
        arguments = comparison.make()
        assert torch.equal(ops.subset_correct(*arguments), reference.subset_correct(*arguments))
    paired_timing(comparison)
