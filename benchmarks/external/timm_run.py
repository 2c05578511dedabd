"""Runs a timm training script that can build aep_ext's multi-exit network: ``python timm_run.py SCRIPT [ITS OPTIONS]``.

The script itself is not touched: the network is put into timm's registry before it starts. Beside it stand the losses
that the fused one is compared with: cross entropies of all exits, computed one by one by torch and summed.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aep_ext import MultiExitNet, anticipate
from aep_ext._utils import require

MODEL = "aep_resnet18"  # its name in timm's registry
EXITS = 4


def aep_resnet18(pretrained: bool = False, img_size: int = 32, smooth: bool = False, **kwargs: Any) -> MultiExitNet:
    """timm's resnet18 with four exits: logits (4, N, K) in training mode, the ensemble's (N, K) in eval mode.

    Args:
        pretrained: must be False: the exits have no published weights.
        img_size: pixels of the images, by which the exits are spread over the network.
        smooth: SiLU for ReLU and average for max pooling. With kinks a difference in the last bit now and then
            sends a gradient another way, and two trainings part in a jump; without them differences grow evenly.
        kwargs: timm's, for the resnet18.
    """
    if pretrained:
        raise ValueError("aep_resnet18: there are no pretrained weights, got pretrained=True")
    timm = require("timm", "models", "the multi-exit resnet18")
    if smooth:
        kwargs["act_layer"] = nn.SiLU
    backbone = timm.create_model("resnet18", **kwargs)
    if smooth:
        backbone.maxpool = nn.AvgPool2d(3, stride=2, padding=1)
    net = anticipate(backbone, exits=EXITS, placement="stages", example=(kwargs.get("in_chans", 3), img_size, img_size))
    net.pretrained_cfg = backbone.pretrained_cfg  # from here scripts take the images' mean and deviation
    return net


def register() -> None:
    """Put :data:`MODEL` into timm's registry, once."""
    models = require("timm.models", "models", "the multi-exit resnet18")
    if not models.is_model(MODEL):
        models.register_model(aep_resnet18)


class SummedCrossEntropy(nn.Module):
    """``sum_e a_e * F.cross_entropy(logits[e], target)``.

    Args:
        exit_weights: E numbers a_e.
        dtype: the arithmetic's type; the gradient comes back in that of the logits. Default: the logits' type.
    """

    def __init__(self, exit_weights: Sequence[float], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.exit_weights, self.dtype = tuple(exit_weights), dtype

    def forward(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The joint loss, no dimension, of logits (E, N, K) and labels (N,) int64."""
        logits = exit_logits.to(self.dtype or exit_logits.dtype)
        return sum(a * self.cross_entropy(x, target) for a, x in zip(self.exit_weights, logits, strict=True))

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of one exit."""
        return F.cross_entropy(logits, target)


class WrittenOutCrossEntropy(SummedCrossEntropy):
    """The same sum with the cross entropy written out: ``logsumexp(o) - o[y]``.

    The same formula in the same precision, rounded differently in value and gradient: what rounding alone does to a
    training curve. (The order of the exits' sum would not show it: it changes no gradient.)
    """

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Of one exit."""
        own = logits.gather(1, target[:, None]).squeeze(1)
        return (logits.logsumexp(1) - own).mean()


def main(argv: list[str]) -> None:
    """Run ``argv[0]`` as ``__main__`` with the options that follow, on one thread."""
    torch.set_num_threads(1)  # the order of sums is then the same in every run
    register()
    if not torch.cuda.is_available():
        # Versions of timm's train.py of 2023 wait for the GPU after every validation batch, on a CPU too.
        torch.cuda.synchronize = lambda device=None: None
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
