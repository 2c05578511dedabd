"""The default network of ``aep run``: a small residual network that two CPU cores can train. Needs torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aep_ext.surgery.heads import PooledLinearHead
from aep_ext.surgery.multi_exit import MultiExitNet

__all__ = ["resnet_small"]

WIDTHS = (16, 32, 64, 128)


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
    if weights is not None:
        raise ValueError(f"resnet_small: has no pretrained weights, weights must be None, got {weights!r}")
    if not 0 < width <= 8:
        raise ValueError(f"resnet_small: width must be within (0, 8], got {width}")
    widths = [max(1, round(channels * width)) for channels in WIDTHS]
    stem = nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    )
    stages: list[nn.Module] = [nn.Sequential()]
    stages[0].add_module("stem", stem)
    stages[0].add_module("layer1", ResidualBlock(widths[0], widths[0], stride=1))
    for number, (before, channels) in enumerate(zip(widths, widths[1:], strict=False), start=2):
        stage = nn.Sequential()
        stage.add_module(f"layer{number}", ResidualBlock(before, channels, stride=2))
        stages.append(stage)
    for module in (m for stage in stages for m in stage.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return MultiExitNet(
        stages,
        [PooledLinearHead(channels, num_classes) for channels in widths],
        num_classes=num_classes,
        origin={
            "kind": "network",
            "name": "resnet_small" if width == 1 else f"resnet_small@{width}",
            "num_classes": num_classes,
            "in_channels": in_channels,
            "head_keys": [["linear.", "fc."]],
        },
    )
