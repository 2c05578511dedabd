"""Pool and linear layer of all exits at once."""

from __future__ import annotations

import pytest
import torch

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import rivals
from benchmarks.cases import cases, feature_map, input_sets

# Channels and, at 64 pixels, heights of ResNet-50's four exits; sizes are (rows, pixels).
RESNET50_64 = [(256, 16), (512, 8), (1024, 4), (2048, 2)]
LAYOUTS = ("contiguous", "channels_last", "strided")
LARGE = (64, 224)


@pytest.mark.parametrize(
    "case",
    cases(
        [(1, 64), (16, 64), (64, 64), (1, 224), (8, 224), LARGE],
        layouts=LAYOUTS,
        goal=("1x64", "1x64-channels_last", "64x224", "64x224-channels_last"),
        quick=("1x64", "1x64-channels_last", "16x64", "16x64-channels_last", "16x64-bfloat16", "8x224-channels_last"),
    ),
)
def test_multi_exit_linear_head(race, device, case):
    """Heads of ResNet-50 for ten classes, inference."""
    rows, pixels = case.size
    shapes = [(channels, height * pixels // 64) for channels, height in RESNET50_64]
    size = sum(rows * channels * height**2 for channels, height in shapes) * case.torch_dtype.itemsize
    kind = {"device": device, "dtype": case.torch_dtype}
    weights = [torch.randn(10, channels).div(channels**0.5).to(**kind) for channels, _ in shapes]
    biases = [torch.randn(10).to(**kind) for _ in shapes]
    heads = [rivals.ExitHead(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    inputs = [
        ([feature_map(rows, channels, height, case, device) for channels, height in shapes],)
        for _ in range(input_sets(size))
    ]
    race(
        lambda features: ops.multi_exit_linear_head(features, weights, biases),
        {
            "naive": lambda features: rivals.head_naive(features, heads),
            "mean": lambda features: rivals.head_mean(features, weights, biases),
        },
        inputs=inputs,
        reference=lambda features: reference.multi_exit_linear_head(features, weights, biases),
        inductor=lambda features: rivals.head_mean(features, weights, biases),
        bytes_moved=size,
        **case.tolerance,
    )
