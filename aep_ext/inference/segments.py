"""What a unit is: everything between two exits together with the later exit's head, as one module to be compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["Segment", "cut", "frozen_copy", "unit_inputs"]


class Segment(nn.Module):
    """One unit: ``features -> (features, logits)``, the last one ``features -> (logits,)``.

    Shapes: (N, C, H, W) -> (N, C', H', W'), (N, K). Without a head (``exit`` None): ``features -> (features,)``.
    """

    def __init__(self, stages: Iterable[nn.Module], exit: nn.Module | None, last: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*stages)
        self.exit = exit
        self.last = last

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.body(x)
        if self.exit is None:
            return (x,)
        logits = self.exit(x)
        return (logits,) if self.last else (x, logits)


def cut(net: MultiExitNet, *, heads: bool = True) -> list[Segment]:
    """The units of ``net``, one for each exit, on its own modules; to be run and compiled, not to be changed.

    Args:
        net: in eval mode.
        heads: False leaves out every head but the last (the trunk alone, for measurements).
    """
    segments: list[Segment] = []
    start = 0
    for position, (end, head) in enumerate(zip(net.exit_stages, net.exits, strict=True)):
        last = position == net.num_exits - 1
        segments.append(Segment(net.stages[start : end + 1], head if heads or last else None, last).eval())
        start = end + 1
    return segments


def frozen_copy(net: MultiExitNet) -> MultiExitNet:
    """A copy of ``net`` in eval mode, without gradients: whatever becomes of ``net`` later, it stays as it is."""
    gradients = {parameter: parameter.grad for parameter in net.parameters()}
    try:
        for parameter in gradients:
            parameter.grad = None  # not to be copied: they may be as large as the weights
        copied = copy.deepcopy(net)
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    return copied.eval().requires_grad_(False)


def unit_inputs(segments: Iterable[Segment], x: Tensor) -> list[Tensor]:
    """The input of every unit when the first one is given ``x``, by plain eager calls."""
    inputs = []
    with torch.no_grad():
        for segment in segments:
            inputs.append(x)
            x = segment(x)[0]
    return inputs
