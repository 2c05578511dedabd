"""The joint loss, forward and backward, in its memory modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks import rivals
from benchmarks.cases import cases, logits_sets
from benchmarks.memory import Peak, peak

HUGE = (4, 1024, 21841)
SIZES = [(4, 64, 10), (4, 64, 100), (4, 256, 1000), (7, 256, 200)]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Made(torch.autograd.Function):
    """The logits as a network's head would hand them over: no leaf, and no view of one, so they may be overwritten."""

    @staticmethod
    def forward(ctx: object, logits: Tensor) -> Tensor:
        return logits.data

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def _fused(variant: str) -> Loss:
    if variant == "plain":
        return lambda logits, target, weights: ops.joint_cross_entropy(logits, target, weights).loss
    if variant == "in_place":
        return lambda logits, target, weights: (
            ops.joint_cross_entropy(_Made.apply(logits), target, weights, memory="in_place").loss
        )
    return lambda logits, target, weights: ops.joint_cross_entropy(logits, target, weights, memory=variant).loss


def _peaks(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Peak, Peak]:
    """Of forward and backward together, and of the forward alone (whose ``held`` the backward needs)."""
    step = rivals.graded(loss)
    return peak(lambda: step(*inputs)), peak(lambda: loss(*inputs))


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
def test_joint_cross_entropy(race, device, case):
    """Forward and backward. ``in_place`` overwrites its logits, so it works on copies of its own."""
    loss = _fused(case.variant)
    inputs = [(logits.requires_grad_(), target, weights) for logits, weights, target in logits_sets(case, device)]
    rows, values = case.size[1], inputs[0][2].tolist()
    size = inputs[0][0].numel() * inputs[0][0].element_size()
    info = race.benchmark.extra_info
    if case.size == HUGE and device == "cpu":
        both, forward = _peaks(loss, inputs[0] if case.variant != "in_place" else _copied(inputs[0]))
        info["peak_over_logits"], info["held_over_logits"] = both.peak / size, forward.held / size
        info["peak_over_logits_eager"] = _peaks(rivals.loss_flat, inputs[0])[0].peak / size
    step = rivals.graded(loss)
    fused = step
    if case.variant == "in_place":
        # Overwritten logits (by now gradients) cost what logits cost: the time depends on no value. For the comparison
        # before the timing, they must be fresh.
        copies = {id(arguments[0]): _copied(arguments) for arguments in inputs}

        def fused(logits: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            return step(*copies[id(logits)])

    race(
        fused,
        {
            "summed": rivals.graded(lambda logits, target, _: rivals.loss_summed(logits, target, values)),
            "flat": rivals.graded(rivals.loss_flat),
        },
        inputs=inputs,
        reference=rivals.graded(lambda *arguments: reference.joint_cross_entropy(*arguments).loss),
        inductor=rivals.loss_flat,
        around=rivals.graded,
        # Gradients are of the order of 1 / rows: without the scale, the absolute tolerance would pass anything.
        comparable=lambda result: (result[0].float(), result[1] * rows),
        bytes_moved=2 * size,
        **case.tolerance,
    )


def _copied(arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    logits, target, weights = arguments
    return logits.detach().clone().requires_grad_(), target, weights
