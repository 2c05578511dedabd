"""A whole multi-exit network: heads, loss and ensemble fused against the same network in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aep_ext import ExitWeights, JointCrossEntropy
from aep_ext.surgery import networks
from benchmarks.cases import cases
from benchmarks.paired_timing import Comparison

PIXELS, CLASSES = 32, 10
ONLY = {"dtypes": ("float32",), "layouts": ("contiguous",)}


def plain_logits(net: nn.Module, x: Tensor) -> list[Tensor]:
    """All exits' logits as a user writes it: stage by stage, head by head."""
    logits = []
    for stage, head in zip(net.stages, net.exits, strict=True):
        x = stage(x)
        logits.append(head(x))
    return logits


def _network(training: bool) -> nn.Module:
    net = networks.resnet_small(CLASSES)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    return net.train(training)


@pytest.mark.parametrize("case", cases([(1,), (8,), (64,)], quick=("1", "64"), **ONLY))
def test_network_inference(paired_timing, case):
    """resnet_small, 32 pixels: the ensemble's logits; the size is the batch."""
    net = _network(training=False)
    plain, weights = copy.deepcopy(net), net.output_weights.tolist()

    def ensemble(x: Tensor) -> Tensor:
        return sum(w * logits for w, logits in zip(weights, plain_logits(plain, x), strict=True))

    paired_timing(
        Comparison(
            fused=torch.inference_mode()(lambda x: net(x)),
            baselines={"naive": torch.inference_mode()(ensemble)},
            make=lambda: (torch.randn(case.size[0], 3, PIXELS, PIXELS),),
            sets=2,
            compiled=torch.no_grad()(ensemble),
            rtol=1e-3,
            atol=1e-4,
        )
    )


@pytest.mark.parametrize("case", cases([(8,), (64,)], quick=("64",), **ONLY))
def test_network_training_step(paired_timing, case):
    """resnet_small, 32 pixels: forward, joint loss, backward; the size is the batch."""
    net, rows = _network(training=True), case.size[0]
    plain, loss, values = copy.deepcopy(net), JointCrossEntropy(net.loss_weights), net.loss_weights.tolist()

    def gradients(value: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
        return value.detach(), *torch.autograd.grad(value, list(model.parameters()))

    def summed(x: Tensor, target: Tensor) -> Tensor:
        return sum(w * F.cross_entropy(o, target) for w, o in zip(values, plain_logits(plain, x), strict=True))

    paired_timing(
        Comparison(
            fused=lambda x, target: gradients(loss(net(x), target), net),
            baselines={"naive": lambda x, target: gradients(summed(x, target), plain)},
            make=lambda: (torch.randn(rows, 3, PIXELS, PIXELS), torch.randint(CLASSES, (rows,))),
            sets=2,
            compiled=summed,
            around=lambda compiled: lambda x, target: gradients(compiled(x, target), plain),
            comparable=lambda result: torch.stack([result[0], *(grad.norm() for grad in result[1:])]),
            rtol=1e-2,
            atol=1e-3,
        )
    )
