"""Pool and linear layer of all exits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.cases import Case, cases, feature_map
from benchmarks.paired_timing import Comparison

RESNET50 = [(256, 16), (512, 8), (1024, 4), (2048, 2)]  # channels and, at 64 pixels, heights of its four exits


def multi_exit_linear_head(case: Case, device: str) -> Comparison:
    """Heads of a ResNet-50, inference. Size: (rows, pixels) or (rows, pixels, classes), by default ten classes."""
    rows, pixels, classes = (*case.size, 10)[:3]
    shapes = [(channels, height * pixels // 64) for channels, height in RESNET50]
    kind = {"device": device, "dtype": case.torch_dtype}
    weights = [torch.randn(classes, channels).div(channels**0.5).to(**kind) for channels, _ in shapes]
    biases = [torch.randn(classes).to(**kind) for _ in shapes]
    heads = [baselines.ExitHead(weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def mean(features: list[Tensor]) -> Tensor:
        return baselines.head_mean(features, weights, biases)

    values = sum(rows * channels * height**2 for channels, height in shapes)
    return Comparison(
        fused=lambda features: ops.multi_exit_linear_head(features, weights, biases),
        baselines={"naive": lambda features: baselines.head_naive(features, heads), "mean": mean},
        make=lambda: ([feature_map(rows, channels, height, case, device) for channels, height in shapes],),
        reference=lambda features: reference.multi_exit_linear_head(features, weights, biases),
        compiled=mean,
        bytes_moved=values * case.torch_dtype.itemsize,
        **case.tolerance,
    )


@pytest.mark.parametrize(
    "case",
    cases(
        [(1, 64), (16, 64), (64, 64), (1, 224), (8, 224), (64, 224)],
        layouts=("contiguous", "channels_last", "strided"),
        goal=("1x64", "1x64-channels_last", "64x224", "64x224-channels_last"),
        quick=("1x64", "1x64-channels_last", "16x64", "16x64-channels_last", "16x64-bfloat16", "8x224-channels_last"),
    ),
)
def test_multi_exit_linear_head(paired_timing, case):
    paired_timing(multi_exit_linear_head(case, "cpu"))
