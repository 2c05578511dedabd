"""Networks and compiled networks that several tests share: compiling takes seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from aep_ext import MultiExitNet
from aep_ext.inference import CompiledNet, compile
from aep_ext.inference.backends import missing
from aep_ext.surgery.networks import build

ENGINES = ("openvino", "onnxruntime")
FAST = (*ENGINES, "eager")


def livened(net: MultiExitNet, spread: float = 8.0) -> MultiExitNet:
    """BatchNorm statistics of its own, and logits far enough apart for gates to have something to decide."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.mul_(spread)
    return net


def make_net() -> MultiExitNet:
    torch.manual_seed(3)
    net = livened(build("resnet_small", 5))
    net.output_weights.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return net.eval()


@pytest.fixture
def net() -> MultiExitNet:
    return make_net()


@pytest.fixture(scope="session")
def compiled_on() -> Callable[[str], CompiledNet]:
    """The network above, compiled for batches of 1 and 7 (and any other); each backend once in a session."""
    made: dict[str, CompiledNet] = {}

    def get(backend: str) -> CompiledNet:
        reason = missing(backend)
        if reason:
            pytest.skip(reason)
        if backend not in made:
            made[backend] = compile(make_net(), torch.randn(7, 3, 16, 16), backend, threads=1)
        return made[backend]

    return get


@pytest.fixture(params=FAST)
def compiled(request: pytest.FixtureRequest, compiled_on: Callable[[str], CompiledNet]) -> CompiledNet:
    return compiled_on(request.param)
