"""The joint loss of linear exits, forward and backward, without their logits.

Liger-Kernel has such a loss for one layer, on GPUs only: no rival here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aep_ext import ops
from aep_ext.ops import reference
from benchmarks.cases import Case, cases, input_sets
from benchmarks.memory import peak

CHANNELS = 128
HUGE = (4, 1024, 21841)
Loss = Callable[..., Tensor]


def _inputs(case: Case, device: str) -> list[tuple[Tensor, ...]]:
    """Sets of (target, pooled features, weights, biases): flat, all but the target with a gradient."""
    exits, rows, classes = case.size
    sets = []
    for _ in range(input_sets(exits * classes * CHANNELS * case.torch_dtype.itemsize)):
        shapes = [(rows, CHANNELS)] * exits + [(classes, CHANNELS)] * exits + [(classes,)] * exits
        floats = [torch.randn(shape).div(CHANNELS**0.25) for shape in shapes]
        leaves = [t.to(device, case.torch_dtype).requires_grad_() for t in floats]
        sets.append((torch.randint(classes, (rows,)).to(device), *leaves))
    return sets


def _parts(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    exits = len(tensors) // 3
    return [tensors[:exits], tensors[exits : 2 * exits], tensors[2 * exits :]]


def _weights(exits: int, like: Tensor) -> Tensor:
    return torch.arange(1.0, exits + 1, device=like.device).div_(sum(range(1, exits + 1)))


def _fused(target: Tensor, *tensors: Tensor) -> Tensor:
    parts = _parts(tensors)
    return ops.linear_joint_cross_entropy(*parts, target, _weights(len(parts[0]), target)).loss


def _reference(target: Tensor, *tensors: Tensor) -> Tensor:
    parts = _parts(tensors)
    return reference.linear_joint_cross_entropy(*parts, target, _weights(len(parts[0]), target)).loss


def _of_logits(target: Tensor, *tensors: Tensor) -> Tensor:
    """The other fused operator, on logits."""
    layers = zip(*_parts(tensors), strict=True)
    logits = torch.stack([F.linear(x, w, b) for x, w, b in layers])
    return ops.joint_cross_entropy(logits, target, _weights(len(logits), target)).loss


def _summed(target: Tensor, *tensors: Tensor) -> Tensor:
    """Linear layer and cross entropy, exit by exit."""
    layers = list(zip(*_parts(tensors), strict=True))
    total = sum(range(1, len(layers) + 1))
    losses = [F.cross_entropy(F.linear(x, w, b), target) for x, w, b in layers]
    return sum((e + 1) / total * loss for e, loss in enumerate(losses))


def _flat(target: Tensor, *tensors: Tensor) -> Tensor:
    """All logits in one tensor, one cross entropy."""
    logits = torch.stack([F.linear(x, w, b) for x, w, b in zip(*_parts(tensors), strict=True)])
    exits, rows, _ = logits.shape
    losses = F.cross_entropy(logits.flatten(0, 1), target.repeat(exits), reduction="none")
    return _weights(exits, target).to(losses.dtype) @ losses.view(exits, rows).mean(1)


def _graded(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    def step(target: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        value = loss(target, *tensors)
        return (value.detach(), *torch.autograd.grad(value, tensors))

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
)  # fmt: skip
def test_linear_joint_cross_entropy(race, device, case):
    """Heads of 128 channels; gradients of features, weights and biases."""
    inputs = _inputs(case, device)
    rows = case.size[1]
    info = race.benchmark.extra_info
    if device == "cpu":
        steps = {name: _graded(loss) for name, loss in _LOSSES.items()}
        least = {name: peak(lambda step=step: step(*inputs[0])).peak for name, step in steps.items()}
        fused = least.pop("fused")
        info["peak_mib"] = fused / 2**20
        info.update({f"peak_over_{name}": fused / bytes_at_most for name, bytes_at_most in least.items()})
        info["peak_over_eager"] = fused / min(least["summed"], least["flat"])  # whichever needs less
    race(
        _graded(_fused),
        {"summed": _graded(_summed), "flat": _graded(_flat)},
        inputs=inputs,
        reference=_graded(_reference),
        inductor=_flat,
        around=_graded,
        # Gradients are of the order of 1 / rows: without the scale, the absolute tolerance would pass anything.
        comparable=lambda result: (result[0].float(), *(grad.float() * rows for grad in result[1:])),
        **case.tolerance,
    )


_LOSSES = {"fused": _fused, "summed": _summed, "flat": _flat, "of_logits": _of_logits}
