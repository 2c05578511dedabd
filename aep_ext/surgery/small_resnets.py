"""Residual networks that two CPU cores can train. They need torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["resnet_cifar", "resnet_small"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut (a 1x1 convolution where the shape changes).

    Shapes: (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def _convolution(in_channels: int, out_channels: int, *, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, 2x2 max pooling, BatchNorm, ReLU; the pooling comes first since it makes the rest cheaper."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, *[nn.MaxPool2d(2)] * pool, nn.BatchNorm2d(out_channels), nn.ReLU())


class PooledBlock(nn.Module):
    """A 3x3 convolution to the new width, at half the resolution where it pools, and a residual one.

    Shapes: (N, in_channels, H, W) -> (N, out_channels, H, W), or (N, out_channels, H // 2, W // 2).
    """

    def __init__(self, in_channels: int, out_channels: int, *, pool: bool) -> None:
        super().__init__()
        self.down = _convolution(in_channels, out_channels, pool=pool)
        self.residual = _convolution(out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.residual(x)


def _network(
    name: str,
    widths: Sequence[int],
    block: Callable[[int, int, int], nn.Module],
    num_classes: int,
    in_channels: int,
    weights: str | None,
    width: float,
    *,
    initialise: Callable[[Tensor], object] | None = None,
) -> MultiExitNet:
    """``widths``: channels of the stem and of each stage. ``block``: from channels before, after, and the number of the
    stage from 1. ``initialise``: of the convolutions' weights; None: torch's."""
    if weights is not None:
        raise ValueError(f"{name}: has no pretrained weights, weights must be None, got {weights!r}")
    if not 0 < width <= 8:
        raise ValueError(f"{name}: width must be within (0, 8], got {width}")
    widths = [max(1, round(channels * width)) for channels in widths]
    stages = [nn.Sequential() for _ in widths[1:]]
    stages[0].add_module("stem", _convolution(in_channels, widths[0]))
    for number, (stage, (before, channels)) in enumerate(zip(stages, pairwise(widths), strict=True), start=1):
        stage.add_module(f"layer{number}", block(before, channels, number))
    for module in (m for stage in stages for m in stage.modules()):
        if initialise is not None and isinstance(module, nn.Conv2d):
            initialise(module.weight)
    return MultiExitNet(
        stages,
        [PooledLinearHead(channels, num_classes) for channels in widths[1:]],
        num_classes=num_classes,
        origin={
            "kind": "network",
            "name": name if width == 1 else f"{name}@{width}",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "head_keys": [["linear.", "fc."]],
        },
    )


def resnet_small(
    num_classes: int, in_channels: int = 3, weights: str | None = None, *, width: float = 1.0
) -> MultiExitNet:
    """Four residual stages of 16, 32, 64 and 128 channels, one block each, each followed by an exit (pool and linear).

    The 3x3 stem keeps the resolution, stages 2 to 4 halve it: 32 x 32 pixels become 4 x 4, and 8 x 8 pixels suffice.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        weights: must be None; there are no pretrained weights.
        width: factor on the channels of all stages, within (0, 8]; they are rounded and at least 1.

    Raises:
        ValueError: ``weights`` given, or the width is out of its range.
    """

    def block(before: int, channels: int, number: int) -> nn.Module:
        return ResidualBlock(before, channels, stride=1 if number == 1 else 2)

    initialise = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    widths = (16, 16, 32, 64, 128)
    return _network("resnet_small", widths, block, num_classes, in_channels, weights, width, initialise=initialise)


def resnet_cifar(
    num_classes: int, in_channels: int = 3, weights: str | None = None, *, width: float = 1.0
) -> MultiExitNet:
    """Four stages of 32, 96, 192 and 256 channels, each followed by an exit (pool and linear): 54.9 M multiply-adds at
    32 x 32 pixels, of which 18, 41, 70 and 100 % lie in front of the exits.

    A stem of 24 channels; every stage is a convolution and a residual one, and the first three halve the resolution by
    max pooling: 32 x 32 pixels become 4 x 4, and 8 x 8 pixels suffice. See :func:`resnet_small` for the arguments.
    """

    def block(before: int, channels: int, number: int) -> nn.Module:
        return PooledBlock(before, channels, pool=number < 4)

    return _network("resnet_cifar", (24, 32, 96, 192, 256), block, num_classes, in_channels, weights, width)
