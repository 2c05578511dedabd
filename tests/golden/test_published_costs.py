from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aep_ext import MultiExitNet
from aep_ext._utils import eval_mode
from aep_ext.pruning import count_macs, count_parameters, subset_costs
from aep_ext.surgery import networks

pytest.importorskip("torchvision", reason="the paper's networks are cut from torchvision's")

NAMES = {
    "resnet50": "resnet50",
    "vgg16": "vgg16",
    "vgg16full": "vgg16_full",
    "densenet169": "densenet169",
    "mobilenetv3small": "mobilenet_v3_small",
    "mobilenetv3smallfull": "mobilenet_v3_small_full",
    "efficientnetB5": "efficientnet_b5",
    "efficientnetB5full": "efficientnet_b5_full",
}


class _Elementwise(TorchDispatchMode):
    """What torchprofile counts beyond convolutions and matrix products: one per output element of these operators."""

    names = ("batch_norm", "aten.mul.Tensor", "avg_pool2d", "aten.mean")

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in self.names):
            self.total += (out[0] if isinstance(out, (tuple, list)) else out).numel()
        return out


def _elementwise(net: MultiExitNet, size: int) -> tuple[list[int], list[int]]:
    """Of the backbone up to every exit, and of every head."""
    prefix, heads, x = [], [], torch.empty(1, 3, size, size, device="meta")
    with eval_mode(net), torch.no_grad():
        for stage, head in zip(net.stages, net.exits, strict=True):
            with _Elementwise() as counter:
                x = stage(x)
            prefix.append(counter.total + sum(prefix[-1:]))
            with _Elementwise() as counter:
                head(x)
            heads.append(counter.total)
    return prefix, heads


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_are_the_published_ones_exactly(published, name):
    figures = published["networks"][name]["K10_ch3"]
    with torch.device("meta"):  # counting needs shapes alone
        net = networks.build(NAMES[name], 10)
    net.fused = False
    last = (1 << (net.num_exits - 1)) - 1  # the row of the last exit alone: the single-exit network
    for size in (64, 224):
        costs, (prefix, heads) = subset_costs(net, (3, size, size)), _elementwise(net, size)
        assert costs.parameters[-1] == figures["me"]["params"] and costs.parameters[last] == figures["se"]["params"]
        assert costs.macs[-1] + prefix[-1] + sum(heads) == figures["me"][f"macs_{size}"]
        assert costs.macs[last] + prefix[-1] + heads[-1] == figures["se"][f"macs_{size}"]
        for key, figure in figures.get("subsets", {}).items():
            exits = [e for e, bit in enumerate(key) if bit == "1"]  # the key's leftmost bit is exit 1
            row = sum(1 << e for e in exits) - 1
            assert costs.parameters[row] == figure["params"], key
            if size == 64:
                assert costs.macs[row] + prefix[exits[-1]] + sum(heads[e] for e in exits) == figure["macs_64"], key
    assert count_parameters(net) == costs.parameters[-1] and count_macs(net, (3, 224, 224)) == costs.macs[-1]
