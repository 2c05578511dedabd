"""The losses of (E, N, K) logits, forward and backward: cross entropies in their memory modes, and with all terms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import baselines
from benchmarks.baselines import with_gradient
from benchmarks.cases import Case, cases, make_logits
from benchmarks.memory import peak
from benchmarks.paired_timing import Comparison, Function

HUGE = (4, 1024, 21841)
SIZES = [(4, 64, 10), (4, 64, 100), (4, 256, 1000), (7, 256, 200)]
MEMORY = {"plain": "recompute"}  # by variant; the others are named as the mode is


class _FromHead(torch.autograd.Function):
    """The logits as a network's head would hand them over: no leaf, and no view of one, so they may be overwritten."""

    @staticmethod
    def forward(ctx: object, logits: Tensor) -> Tensor:
        return logits.data

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def fused_loss(variant: str) -> Function:
    """The operator's loss in the memory mode of a variant."""

    def loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        logits = _FromHead.apply(logits) if variant == "in_place" else logits
        return ops.joint_cross_entropy(logits, target, weights, memory=MEMORY.get(variant, variant)).loss

    return loss


def arguments(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that want a gradient, target and weights."""
    logits, weights, target = make_logits(case, device)
    return logits.requires_grad_(), target, weights


def joint_cross_entropy(case: Case, device: str) -> Comparison:
    """Loss and gradient of logits (E, N, K). ``in_place`` overwrites its logits, so it works on copies of its own."""
    exits, rows, classes = case.size
    values = [(e + 1) / sum(range(1, exits + 1)) for e in range(exits)]
    step, copies = with_gradient(fused_loss(case.variant)), {}

    def on_a_copy(logits: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        # Overwritten logits (by now gradients) cost what logits cost: the time depends on no value. The first call,
        # whose result is compared, meets fresh ones.
        if id(logits) not in copies:
            copies[id(logits)] = logits.detach().clone().requires_grad_()
        return step(copies[id(logits)], *rest)

    def liger() -> Function:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        plain = LigerCrossEntropyLoss()
        return with_gradient(  # of a clone: Liger's kernel writes the gradient over what it is given
            lambda logits, target, _: sum(w * plain(x.clone(), target) for w, x in zip(values, logits, strict=True))
        )

    size = exits * rows * classes * case.torch_dtype.itemsize
    return Comparison(
        fused=on_a_copy if case.variant == "in_place" else step,
        baselines={
            "summed": with_gradient(lambda logits, target, _: baselines.loss_summed(logits, target, values)),
            "flat": with_gradient(baselines.loss_flat),
        },
        make=lambda: arguments(case, device),
        reference=with_gradient(lambda *arguments: reference.joint_cross_entropy(*arguments).loss),
        compiled=baselines.loss_flat,
        around=with_gradient,
        liger=liger,
        # Gradients are of the order of 1 / rows: without the scale, the absolute tolerance would pass anything.
        comparable=lambda result: (result[0].float(), result[1] * rows),
        # Read for the loss and the gradient written; the default mode reads the logits a second time for it.
        bytes_moved=(3 if case.variant == "plain" else 2) * size,
        **case.tolerance,
    )


@pytest.mark.parametrize(
    "case",
    cases(
        SIZES,
        huge=[HUGE],
        variants=("plain", "in_forward", "in_place"),
        goal=("4x256x1000", "7x256x200", "4x1024x21841", "4x1024x21841-in_place"),
        quick=(
            "4x64x10", "4x64x100", "4x256x1000", "7x256x200", "4x256x1000-bfloat16", "4x256x1000-strided",
            "4x256x1000-allthreads", "4x256x1000-in_forward", "4x256x1000-in_place",
        ),
    ),
)  # fmt: skip
def test_joint_cross_entropy(paired_timing, case):
    comparison = joint_cross_entropy(case, "cpu")
    if case.size == HUGE:
        arguments, info = comparison.make(), paired_timing.benchmark.extra_info
        size = arguments[0].numel() * arguments[0].element_size()
        for name, loss in (("", fused_loss(case.variant)), ("_eager", baselines.loss_flat)):
            step = with_gradient(loss)
            info[f"peak_over_logits{name}"] = peak(lambda step=step: step(*arguments)).peak / size
            held = peak(lambda loss=loss: loss(*arguments)).held  # what the backward needs
            info[f"held_over_logits{name}"] = held / size
    paired_timing(comparison)


def multi_exit_loss(case: Case, device: str) -> Comparison:
    """Loss and gradient with prefixes and distillation; the weights serve as a, b and c."""

    def of(function: Function) -> Function:
        return with_gradient(lambda x, y, w: function(x, y, w, w, w, distillation=0.2, temperature=3.0).loss)

    return Comparison(
        fused=of(ops.multi_exit_loss),
        baselines={"naive": with_gradient(baselines.terms_naive), "flat": with_gradient(baselines.terms_flat)},
        make=lambda: arguments(case, device),
        reference=of(reference.multi_exit_loss),
        compiled=baselines.terms_flat,
        around=with_gradient,
        comparable=lambda result: (result[0].float(), result[1] * case.size[1]),
        bytes_moved=3 * math.prod(case.size) * case.torch_dtype.itemsize,
        **case.tolerance,
    )


@pytest.mark.parametrize(
    "case",
    cases(
        [(4, 64, 10), (4, 256, 100), (4, 256, 1000), (7, 256, 200)],
        goal=("4x256x100", "4x256x1000", "7x256x200"),
        quick=("4x64x10", "4x256x100", "4x256x100-bfloat16"),
    ),
)
def test_multi_exit_loss(paired_timing, case):
    paired_timing(multi_exit_loss(case, "cpu"))
