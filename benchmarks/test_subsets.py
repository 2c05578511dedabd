"""Scoring every subset of the exits."""

from __future__ import annotations

import pytest
import torch

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import rivals
from benchmarks.cases import cases, logits_sets

SIZES = [(4, 2000, 10), (5, 1000, 100), (6, 1000, 100), (7, 500, 200)]
LARGE = [(10, 10000, 100), (12, 10000, 10)]
SMALL_GOALS = [f"{'x'.join(map(str, size))}{data}" for size in SIZES for data in ("", "-chance")]


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=LARGE,
        variants=("plain", "chance"),
        goal=(*SMALL_GOALS, "10x10000x100", "12x10000x10"),
        quick=("4x2000x10", "4x2000x10-chance", "7x500x200", "7x500x200-bfloat16"),
    ),
)
def test_subset_correct(race, device, case):
    """Logits as a trained network gives them, or at chance, where no class can be ruled out early.

    The published way, one subset at a time, is slow where there are many subsets: it runs once.
    """
    if case.dtype == "float32" and case.size not in LARGE:  # rivals may round otherwise, we count exactly
        for arguments in logits_sets(case, device, lifted=case.variant == "plain"):
            assert torch.equal(ops.subset_correct(*arguments), reference.subset_correct(*arguments))
    large = case.size in LARGE
    published = {"published": rivals.subsets_published}
    race(
        ops.subset_correct,
        {"product": rivals.subsets_product} | ({} if large else published),
        once=published if large else {},
        # Where scores by the gigabyte pass through the caches, inputs need not rotate.
        inputs=logits_sets(case, device, lifted=case.variant == "plain")[: 1 if large else None],
        reference=reference.subset_correct,
        inductor=rivals.subset_ranks,  # the loop around it would be unrolled a thousand times
        around=lambda compiled: lambda *arguments: rivals.subsets_product(*arguments, compiled),
        comparable=lambda counts: counts.double(),
        # Matrix products add up in another order: a sample whose label is level with another class may fall either way.
        rtol=5e-2 if case.dtype == "bfloat16" else 1e-3,
        atol=20 if case.dtype == "bfloat16" else 2,
    )
