"""Gradient equilibrium: every exit has the same say in the backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ScaleGradient(torch.autograd.Function):
    """Forward the identity, backward the gradient times a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


def split_gradient(x: Tensor, exits_left: int) -> tuple[Tensor, Tensor]:
    """``x`` for an exit's head and ``x`` for the next stage, where so many exits, that one included, are left."""
    if exits_left == 1:
        return x, x
    return _ScaleGradient.apply(x, 1 / exits_left), _ScaleGradient.apply(x, (exits_left - 1) / exits_left)


class GradientEquilibrium(nn.Module):
    """Scales gradients where an exit leaves the backbone (Li et al., ICCV 2019, "Improved Techniques for Training
    Adaptive Deep Networks", section 4.1).

    At exit i = 0..E-1 the gradient from the exit's head is multiplied by 1/(E-i), the one from the rest of the backbone
    by (E-i-1)/(E-i): every exit then reaches the input with factor 1/E, and no feature map before an exit gets a
    gradient that grows with the number of exits behind it. The heads' own parameters keep theirs. The forward is the
    identity, bit for bit. :class:`aep_ext.MultiExitNet` does this itself where its ``gradient_equilibrium`` is True;
    the module is for networks of one's own::

        to_head, x = equilibrium(x, i)

    Args:
        num_exits: E, at least 1.

    Raises:
        ValueError: ``num_exits`` is below 1, or the call names no exit within 0..E-1.
    """

    def __init__(self, num_exits: int) -> None:
        super().__init__()
        if num_exits < 1:
            raise ValueError(f"GradientEquilibrium: num_exits must be at least 1, got {num_exits}")
        self.num_exits = num_exits

    def forward(self, x: Tensor, exit: int) -> tuple[Tensor, Tensor]:
        """``x`` for the head of ``exit`` and ``x`` for the next stage: views, not to be changed in place.

        Args:
            x: floating, any shape.
            exit: i, from 0.
        """
        if not 0 <= exit < self.num_exits:
            raise ValueError(f"GradientEquilibrium: exit must be within 0..{self.num_exits - 1}, got {exit}")
        return split_gradient(x, self.num_exits - exit)

    def extra_repr(self) -> str:
        return f"num_exits={self.num_exits}"
