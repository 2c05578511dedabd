"""The joint loss of linear exits, forward and backward, without their logits.

Liger-Kernel has such a loss for one layer, on GPUs only: no baseline on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.cases import Case, cases
from benchmarks.memory import peak
from benchmarks.paired_timing import Comparison, Function

CHANNELS = 128
RESNET50_CHANNELS = (256, 512, 1024, 2048)  # variant "wide"
HUGE = (4, 1024, 21841)


def losses(case: Case, device: str) -> dict[str, Function]:
    """By name: ``loss(target, *pooled features, *weights, *biases)``."""
    exits = case.size[0]
    values = [(e + 1) / sum(range(1, exits + 1)) for e in range(exits)]
    as_tensor = torch.tensor(values, device=device)

    def parts(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        return [tensors[:exits], tensors[exits : 2 * exits], tensors[2 * exits :]]

    def logits(tensors: tuple[Tensor, ...]) -> list[Tensor]:
        return [F.linear(x, w, b) for x, w, b in zip(*parts(tensors), strict=True)]

    return {
        "fused": lambda y, *t: ops.linear_joint_cross_entropy(*parts(t), y, as_tensor).loss,
        "reference": lambda y, *t: reference.linear_joint_cross_entropy(*parts(t), y, as_tensor).loss,
        "summed": lambda y, *t: baselines.loss_summed(logits(t), y, values),
        "flat": lambda y, *t: baselines.loss_flat(torch.stack(logits(t)), y, as_tensor.to(t[0].dtype)),
        "of_logits": lambda y, *t: ops.joint_cross_entropy(torch.stack(logits(t)), y, as_tensor).loss,
    }


def linear_joint_cross_entropy(case: Case, device: str) -> Comparison:
    """Gradients of features, weights and biases of E linear exits for N rows and K classes."""
    exits, rows, classes = case.size
    channels = RESNET50_CHANNELS[:exits] if case.variant == "wide" else (CHANNELS,) * exits
    of = losses(case, device)
    shapes = [*((rows, c) for c in channels), *((classes, c) for c in channels), *[(classes,)] * exits]

    def make() -> tuple[Tensor, ...]:
        scales = [*(c**0.25 for c in channels), *(c**0.25 for c in channels), *[1.0] * exits]
        floats = [torch.randn(shape, device=device).div(s) for shape, s in zip(shapes, scales, strict=True)]
        leaves = [x.to(case.torch_dtype).requires_grad_() for x in floats]
        return torch.randint(classes, (rows,), device=device), *leaves

    def liger() -> Function:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        plain, total = LigerFusedLinearCrossEntropyLoss(), sum(range(1, exits + 1))

        def loss(target: Tensor, *t: Tensor) -> Tensor:
            layers = zip(t[:exits], t[exits : 2 * exits], t[2 * exits :], strict=True)
            return sum((e + 1) / total * plain(w, x, target, b) for e, (x, w, b) in enumerate(layers))

        return with_gradients(loss)

    return Comparison(
        fused=with_gradients(of["fused"]),
        baselines={name: with_gradients(of[name]) for name in ("summed", "flat")},
        make=make,
        reference=with_gradients(of["reference"]),
        compiled=of["flat"],
        around=with_gradients,
        liger=liger,
        # Gradients are of the order of 1 / rows: without the scale, the absolute tolerance would pass anything.
        comparable=lambda result: (result[0].float(), *(grad.float() * rows for grad in result[1:])),
        # Every weight is read for the logits and for the features' gradient, and its gradient written.
        bytes_moved=sum(3 * classes * c + 2 * rows * c for c in channels) * case.torch_dtype.itemsize,
        **case.tolerance,
    )


def with_gradients(loss: Callable[..., Tensor]) -> Function:
    """``loss(target, *tensors)`` with its gradients in all tensors."""

    def step(target: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        value = loss(target, *tensors)
        return value.detach(), *torch.autograd.grad(value, tensors)

    return step


@pytest.mark.parametrize(
    "case",
    cases(
        [(4, 64, 1000), (4, 256, 10000)],
        huge=[HUGE],
        layouts=("contiguous",),
        goal=("4x1024x21841",),
        quick=("4x64x1000", "4x64x1000-bfloat16"),
    ),
)
def test_linear_joint_cross_entropy(paired_timing, case):
    """Heads of 128 channels. ``peak_over_eager`` is against whichever baseline needs less memory."""
    comparison, info = linear_joint_cross_entropy(case, "cpu"), paired_timing.benchmark.extra_info
    arguments = comparison.make()
    steps = {name: with_gradients(loss) for name, loss in losses(case, "cpu").items() if name != "reference"}
    peaks = {name: peak(lambda step=step: step(*arguments)).peak for name, step in steps.items()}
    info["peak_mib"] = peaks["fused"] / 2**20
    info.update({f"peak_over_{name}": peaks["fused"] / peaks[name] for name in peaks if name != "fused"})
    info["peak_over_eager"] = peaks["fused"] / min(peaks["summed"], peaks["flat"])
    paired_timing(comparison)
