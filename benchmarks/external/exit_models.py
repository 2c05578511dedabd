"""A multi-exit network that a timm script builds by its own ``--model`` option."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aep_ext import MultiExitNet, anticipate
from aep_ext._utils import require

__all__ = ["EXITS", "MODEL", "register"]

MODEL = "aep_resnet18"  # its name in timm's registry
EXITS = 4


def aep_resnet18(
    pretrained: bool = False, img_size: int = 32, smooth: bool = False, dtype: str = "float32", **kwargs: Any
) -> MultiExitNet:
    """timm's resnet18 with four exits: logits (4, N, K) in training mode, the ensemble's (N, K) in eval mode.

    Args:
        pretrained: must be False: the exits have no published weights.
        img_size: pixels of the images, by which the exits are spread over the network.
        smooth: SiLU for ReLU and average for max pooling. With kinks a difference in the last bit now and then
            sends a gradient another way, and two trainings part in a jump; without them differences grow evenly.
        dtype: "float32" or "float64": of parameters and arithmetic. Images may be float32 in either.
        kwargs: timm's, for the resnet18.
    """
    if pretrained:
        raise ValueError("aep_resnet18: there are no pretrained weights, got pretrained=True")
    if dtype not in ("float32", "float64"):
        raise ValueError(f"aep_resnet18: dtype must be 'float32' or 'float64', got {dtype!r}")
    timm = require("timm", "models", "the multi-exit resnet18")
    if smooth:
        kwargs["act_layer"] = nn.SiLU
    backbone = timm.create_model("resnet18", **kwargs)
    if smooth:
        backbone.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    net = anticipate(backbone, exits=EXITS, example=(kwargs.get("in_chans", 3), img_size, img_size))
    net.pretrained_cfg = backbone.pretrained_cfg  # from here scripts take the images' mean and deviation
    if dtype == "float64":
        net.double()
        net.register_forward_pre_hook(lambda module, inputs: tuple(x.to(torch.float64) for x in inputs))
    return net


def register() -> None:
    """Put :data:`MODEL` into timm's registry, once."""
    models = require("timm.models", "models", "the multi-exit resnet18")
    if not models.is_model(MODEL):
        models.register_model(aep_resnet18)
