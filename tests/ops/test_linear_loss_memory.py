"""What the joint loss of linear exits takes and holds, by torch's own count of its allocations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from benchmarks.memory import Peak, peak

EXITS, ROWS, CLASSES, CHANNELS = 4, 256, 8192, 32
LOGITS = EXITS * ROWS * CLASSES


@pytest.fixture
def tensors() -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    return (
        [torch.randn(ROWS, CHANNELS, requires_grad=True) for _ in range(EXITS)],
        [torch.randn(CLASSES, CHANNELS, requires_grad=True) for _ in range(EXITS)],
        [torch.randn(CLASSES, requires_grad=True) for _ in range(EXITS)],
        torch.randint(CLASSES, (ROWS,)),
        torch.rand(EXITS) + 0.1,
    )


def eager(pooled, weights, biases, target, exit_weights) -> Tensor:
    """Exit by exit: nothing is stacked, which is the least that eager torch needs."""
    layers = zip(exit_weights, pooled, weights, biases, strict=True)
    return sum(a * F.cross_entropy(F.linear(x, w, b), target) for a, x, w, b in layers)


def both(loss, tensors) -> Peak:
    """Of forward and backward; the gradients, which everyone returns, are part of it."""
    leaves = [t for part in tensors[:3] for t in part]
    return peak(lambda: torch.autograd.grad(loss(*tensors), leaves))


def test_a_fifth_of_eager(native, tensors):
    ours = both(lambda *t: ops.linear_joint_cross_entropy(*t).loss, tensors)
    theirs = both(eager, tensors)
    assert ours.held == theirs.held  # the gradients
    assert ours.peak <= theirs.peak / 5
    assert theirs.peak >= 4 * LOGITS  # eager does hold the logits, or as much


def test_nothing_but_the_buffer_and_the_gradients(native, tensors):
    gradients = sum(4 * t.numel() for part in tensors[:3] for t in part)
    for chunk in (1, 16):
        ours = both(lambda *t, chunk=chunk: ops.linear_joint_cross_entropy(*t, chunk=chunk).loss, tensors)
        buffer, small = 4 * chunk * CLASSES, 4 * CLASSES + 16384  # a row of sums; losses of the rows
        assert gradients + buffer <= ours.peak <= gradients + buffer + small
    held = peak(lambda: ops.linear_joint_cross_entropy(*tensors))  # after the forward
    assert gradients <= held.held <= gradients + 4096


def test_without_gradients_there_is_only_the_buffer(native, tensors):
    with torch.no_grad():
        ours = peak(lambda: ops.linear_joint_cross_entropy(*tensors, chunk=16))
        default = peak(lambda: ops.linear_joint_cross_entropy(*tensors))
    assert ours.peak <= 4 * 16 * CLASSES + 16384 and ours.held <= 4096
    assert default.peak <= max(4 * LOGITS / 16, 4 << 20) + 16384


def test_half_precision(native, tensors):
    """Gradients of weights and biases are held in float32 until the backward has rounded them."""
    half = [[t.detach().bfloat16().requires_grad_() for t in part] for part in tensors[:3]]
    ours = both(lambda *t: ops.linear_joint_cross_entropy(*t, chunk=16).loss, [*half, *tensors[3:]])
    layer = CLASSES * (CHANNELS + 1)
    held = 4 * EXITS * layer + 2 * EXITS * ROWS * CHANNELS
    assert ours.peak <= held + 2 * EXITS * layer + 16384


def test_the_backward_scales_where_the_gradients_lie(native, tensors):
    """Nobody else has them: no copies."""
    loss = ops.linear_joint_cross_entropy(*tensors).loss
    leaves = [t for part in tensors[:3] for t in part]
    losses = [loss, ops.linear_joint_cross_entropy(*tensors).loss]  # one for the warm-up of `peak`
    backward = peak(lambda: torch.autograd.grad(losses.pop(), leaves, torch.tensor(3.0)))
    assert backward.peak <= 16384
