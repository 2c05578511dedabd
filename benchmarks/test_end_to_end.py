"""A whole multi-exit network: heads, loss and ensemble fused against the same network in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aep_ext import ExitWeights, JointCrossEntropy
from aep_ext.surgery import networks
from benchmarks.cases import Case, cases

PIXELS, CLASSES = 32, 10


class Plain(nn.Module):
    """The network as a user writes it: stage by stage, head by head."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.weights = net, net.output_weights.tolist()

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for stage, exit_ in zip(self.net.stages, self.net.exits, strict=True):
            x = stage(x)
            logits.append(exit_(x))
        return logits


def _networks(device: str, training: bool) -> tuple[nn.Module, Plain]:
    net = networks.resnet_small(CLASSES)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    net = net.to(device).train(training)
    return net, Plain(copy.deepcopy(net))


def _images(case: Case, device: str) -> list[Tensor]:
    return [torch.randn(case.size[0], 3, PIXELS, PIXELS, device=device) for _ in range(2)]


ONLY = {"dtypes": ("float32",), "layouts": ("contiguous",)}


@pytest.mark.parametrize("case", cases([(1,), (8,), (64,)], quick=("1", "64"), **ONLY))
def test_network_inference(race, device, case):
    """resnet_small, 32 pixels: the ensemble's logits; the size is the batch."""
    net, plain = _networks(device, training=False)

    @torch.inference_mode()
    def fused(x: Tensor) -> Tensor:
        return net(x)

    def ensemble(x: Tensor) -> Tensor:
        return sum(w * logits for w, logits in zip(plain.weights, plain(x), strict=True))

    race(
        fused,
        {"naive": torch.inference_mode()(ensemble)},
        inputs=[(x,) for x in _images(case, device)],
        inductor=torch.no_grad()(ensemble),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("case", cases([(8,), (64,)], quick=("64",), **ONLY))
def test_network_training_step(race, device, case):
    """resnet_small, 32 pixels: forward, joint loss, backward; the size is the batch."""
    net, plain = _networks(device, training=True)
    loss = JointCrossEntropy(net.loss_weights)
    values = net.loss_weights.tolist()

    def gradients(value: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
        return value.detach(), *torch.autograd.grad(value, list(model.parameters()))

    def fused(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return gradients(loss(net(x), target), net)

    def summed(x: Tensor, target: Tensor) -> Tensor:
        return sum(w * F.cross_entropy(o, target) for w, o in zip(values, plain(x), strict=True))

    race(
        fused,
        {"naive": lambda x, target: gradients(summed(x, target), plain)},
        inputs=[(x, torch.randint(CLASSES, (case.size[0],), device=device)) for x in _images(case, device)],
        inductor=summed,
        around=lambda compiled: lambda x, target: gradients(compiled(x, target), plain),
        # Every gradient by its norm: single entries of a convolution's are noise on a GPU, where algorithms differ.
        comparable=lambda result: torch.stack([result[0], *(g.norm() for g in result[1:])]),
        rtol=1e-2,
        atol=1e-3,
    )
