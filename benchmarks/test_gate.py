"""One step of early stopping: running sum, decision, survivors moved to the front."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.cases import Case, cases, feature_map
from benchmarks.paired_timing import Comparison, Function

CHANNELS, HEIGHT, WEIGHT = 512, 8, 0.7


def gate(case: Case, device: str) -> Comparison:
    """Features of 512 x 8 x 8; half of the rows leave, or none (variant ``stay``, or one row).

    The size is (rows,) or (rows, classes); ten classes by default. On a CPU the survivors' count is read and the
    results are cut to it, as a caller does; on a GPU that would wait for the device, and only the comparison does.
    """
    rows, classes = (*case.size, 10)[:2]
    wide = torch.promote_types(case.torch_dtype, torch.float32)
    indices, state = torch.arange(rows, device=device), torch.zeros(rows, 0, dtype=torch.int64, device=device)
    sums, logits = (torch.randn(rows, classes, device=device, dtype=wide) for _ in range(2))
    logits = (logits * 16).round() / 16  # the same in every dtype
    all_stay = rows == 1 or case.variant == "stay"
    confidence = torch.softmax((sums + WEIGHT * logits).double(), -1).amax(-1).sort().values
    # Midway between two rows, so that no rounding decides; the same for all sets of inputs, whose rows differ in
    # order, since a compiler makes code for each number.
    threshold = 2.0 if all_stay else confidence[rows // 2 - 1 : rows // 2 + 1].mean().item()
    survivors = rows if all_stay else rows - rows // 2

    def make() -> tuple[Tensor, Tensor, Tensor]:
        order = torch.randperm(rows, device=device)
        features = feature_map(rows, CHANNELS, HEIGHT, case, device)
        return features, sums[order], logits[order].to(case.torch_dtype)

    def step(function: Function) -> Function:
        def call(features: Tensor, running: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
            # The weights so far add up to one: the softmax is that of the plain sum.
            r = function(features, running, 1 - WEIGHT, indices, state, logits, weight=WEIGHT, threshold=threshold)
            if device != "cpu":
                return r.features, r.running, r.indices, r.stats, r.count
            count = int(r.count)
            return r.features[:count], r.running[:count], r.indices, r.stats

        return call

    def eager(function: Function) -> Function:
        return lambda features, running, logits: function(features, running, indices, logits, WEIGHT, threshold)

    def comparable(result: tuple[Any, ...]) -> tuple[Tensor, ...]:
        features, running, order, stats = result[:4]
        stay = int(result[4]) if len(result) == 5 else len(features)
        return features[:stay], running[:stay], order, stats

    target = torch.empty_like(make()[0])
    row_bytes = CHANNELS * HEIGHT**2 * case.torch_dtype.itemsize
    return Comparison(
        fused=step(ops.gate),
        baselines={"naive": eager(baselines.gate_naive), "eager": eager(baselines.gate_eager)},
        make=make,
        reference=step(reference.gate),
        compiled=eager(baselines.gate_eager),
        limits={"copy": lambda features, *_: target[:survivors].copy_(features[:survivors])},
        comparable=comparable,
        bytes_moved=2 * survivors * row_bytes + rows * classes * (2 * wide.itemsize + case.torch_dtype.itemsize),
        **case.tolerance,
    )


@pytest.mark.parametrize(
    "case",
    cases(
        [(1,), (8,), (64,), (256,)],
        variants=("plain", "stay"),
        dtypes=("float32", "float64"),
        layouts=("contiguous", "channels_last"),
        goal=("1", "8", "64", "256"),
        quick=("1", "64", "64-channels_last", "8-stay"),
    ),
)
def test_gate(paired_timing, case):
    paired_timing(gate(case, "cpu"))
    info = paired_timing.benchmark.extra_info
    if "paired_ratio_copy" in info:
        info["over_copy"] = 1 / info["paired_ratio_copy"]
