"""The losses that the fused one is held against are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from aep_ext import JointCrossEntropy
from benchmarks.external.plain_losses import SummedCrossEntropy, WrittenOutCrossEntropy

WEIGHTS = (0.125, 0.25, 0.625)


def value_and_gradient(loss: torch.nn.Module, logits: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, target)
    value.backward()
    return [value.detach(), logits.grad]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_four_ways_give_one_value_and_gradient(smoothing):
    logits, target = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (5,))
    expected = value_and_gradient(SummedCrossEntropy(WEIGHTS, smoothing), logits, target)
    for loss in (
        WrittenOutCrossEntropy(WEIGHTS, smoothing),
        SummedCrossEntropy(WEIGHTS, smoothing, dtype=torch.float64),
        JointCrossEntropy(WEIGHTS, label_smoothing=smoothing),
    ):
        torch.testing.assert_close(value_and_gradient(loss, logits, target), expected, rtol=1e-12, atol=1e-12)


def test_the_yardsticks_are_rounded_differently():
    logits, target = 3 * torch.randn(3, 64, 10), torch.randint(10, (64,))
    plain = value_and_gradient(SummedCrossEntropy(WEIGHTS), logits, target)[1]
    for loss in (WrittenOutCrossEntropy(WEIGHTS), SummedCrossEntropy(WEIGHTS, dtype=torch.float64)):
        other = value_and_gradient(loss, logits, target)[1]
        assert other.dtype == torch.float32
        assert not torch.equal(other, plain)
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-8)


def test_autocast_does_not_touch_the_arithmetic():
    logits, target = torch.randn(3, 5, 7, dtype=torch.bfloat16), torch.randint(7, (5,))
    expected = SummedCrossEntropy(WEIGHTS)(logits.float(), target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(SummedCrossEntropy(WEIGHTS)(logits, target), expected)
        assert SummedCrossEntropy(WEIGHTS, dtype=torch.float64)(logits, target).dtype == torch.float64
