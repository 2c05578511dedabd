"""The pooling tap of an exit: global average pool whose backward joins the trunk's own gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks.cases import Case, cases, feature_map
from benchmarks.paired_timing import Comparison, Function

SIZES = [(64, 256, 16), (64, 512, 8), (16, 256, 56)]  # rows, channels, height


def global_avg_pool(case: Case, device: str) -> Comparison:
    """Forward and backward of a feature map that goes on through the trunk too; variant ``forward``: the pool alone."""
    size = case.size[0] * case.size[1] * case.size[2] ** 2 * case.torch_dtype.itemsize
    forward = case.variant == "forward"

    def make() -> tuple[Tensor, ...]:
        x = feature_map(*case.size, case, device)
        if forward:
            return (x,)
        pooled_grad = torch.randn(case.size[:2], device=device).to(case.torch_dtype)
        return x.requires_grad_(), pooled_grad, feature_map(*case.size, case, device)

    def tapped(pool: Function) -> Function:
        return pool if forward else with_backward(lambda x: (pool(x), x.view_as(x)))

    def mean(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    return Comparison(
        fused=tapped(ops.global_avg_pool),
        baselines={"naive": tapped(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)), "mean": tapped(mean)},
        make=make,
        reference=tapped(reference.global_avg_pool),
        compiled=mean if forward else lambda x: (mean(x), x.view_as(x)),
        around=(lambda compiled: compiled) if forward else with_backward,
        # Read by the pool; then read again, joined with the trunk's gradient, and written.
        bytes_moved=size + size // case.size[2] ** 2 if forward else 4 * size,
        **case.tolerance,
    )


def with_backward(outputs: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Function:
    """``outputs(x)``, pooled features and the map for the trunk, with the gradient of both in x."""

    def step(x: Tensor, *grads: Tensor) -> tuple[Any, ...]:
        found = outputs(x)
        (grad,) = torch.autograd.grad(found, x, grads)
        return found[0].detach(), grad

    return step


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        layouts=("contiguous", "channels_last", "strided"),
        goal=[f"{'x'.join(map(str, size))}{layout}" for size in SIZES for layout in ("", "-channels_last")],
        quick=("64x256x16", "64x256x16-channels_last", "64x512x8"),
    ),
)
def test_global_avg_pool(paired_timing, case):
    paired_timing(global_avg_pool(case, "cpu"))
