"""The pooling tap of an exit: global average pool whose backward joins the trunk's own gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks.cases import cases, feature_map, input_sets

SIZES = [(64, 256, 16), (64, 512, 8), (16, 256, 56)]  # rows, channels, height


def _tapped(pool: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Forward and backward of a feature map that goes on through the trunk and is tapped by ``pool``."""

    def step(x: Tensor, pooled_grad: Tensor, trunk_grad: Tensor) -> tuple[Tensor, Tensor]:
        pooled = pool(x)
        (grad,) = torch.autograd.grad((pooled, x.view_as(x)), x, (pooled_grad, trunk_grad))
        return pooled.detach(), grad

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
def test_global_avg_pool(race, device, case):
    size = case.size[0] * case.size[1] * case.size[2] ** 2 * case.torch_dtype.itemsize
    inputs = []
    for _ in range(input_sets(size)):
        x, trunk_grad = (feature_map(*case.size, case, device) for _ in range(2))
        pooled_grad = torch.randn(case.size[:2]).to(device, case.torch_dtype)
        inputs.append((x.requires_grad_(), pooled_grad, trunk_grad))
    race(
        _tapped(ops.global_avg_pool),
        {
            "naive": _tapped(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)),
            "mean": _tapped(lambda x: x.mean((2, 3))),
        },
        inputs=inputs,
        reference=_tapped(reference.global_avg_pool),
        inductor=lambda x: (x.mean((2, 3)), x.view_as(x)),
        around=lambda compiled: lambda x, *grads: _both(compiled(x), x, grads),
        bytes_moved=4 * size,  # read by the pool, read and joined with the trunk's gradient, written
        **case.tolerance,
    )


def _both(outputs: tuple[Tensor, Tensor], x: Tensor, grads: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(outputs, x, grads)
    return outputs[0].detach(), grad
