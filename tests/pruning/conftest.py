from __future__ import annotations

import pytest
import torch

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.surgery.networks import build


def trained_like(net: MultiExitNet) -> MultiExitNet:
    """BatchNorm statistics and affine parameters as after some training, not the neutral initial ones."""
    generator = torch.Generator().manual_seed(7)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(shape, generator=generator) + 0.5)
            with torch.no_grad():
                module.weight.copy_(torch.rand(shape, generator=generator) + 0.5)
    return net


@pytest.fixture
def net() -> MultiExitNet:
    net = trained_like(build("resnet_small", 7))
    net.set_exit_weights(ExitWeights.mixed(4))
    return net


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(n, 3, 16, 16), torch.randint(0, 7, (n,))) for n in (13, 13, 5)]
