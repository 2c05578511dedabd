"""Heads, and which of them the fused operator can run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import aep_ext
from aep_ext import MultiExitNet, anticipate, prune
from aep_ext.surgery.heads import (
    AUTO_SHARE,
    ConvPooledLinearHead,
    ConvPooledMLPHead,
    FeatureMap,
    FusedPlan,
    PooledLinearHead,
    fused_plan,
    head_by_name,
    head_names,
)
from aep_ext.surgery.measure import MacCounter
from aep_ext.surgery.networks import build


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("channels", "count"), [(24, 10264), (40, 27660), (48, 39526), (96, 155074)])
def test_mobilenet_head(channels: int, count: int) -> None:
    head = ConvPooledMLPHead(channels, 10)
    assert parameters(head) == count
    assert head(torch.randn(2, channels, 5, 3)).shape == (2, 10)
    assert fused_plan(head) is None


def test_efficientnet_head_runs_its_parameters_in_order() -> None:
    head = ConvPooledLinearHead(8, 10)
    assert [name for name, _ in head.named_parameters()] == [
        "pre.0.weight",
        "pre.1.weight",
        "pre.1.bias",
        "linear.weight",
        "linear.bias",
    ]
    assert head(torch.randn(2, 8, 5, 3)).shape == (2, 10)
    assert fused_plan(head) == FusedPlan("linear", "pre", ("dropout",))


def test_pooled_linear_head() -> None:
    head, x = PooledLinearHead(4, 3, pre=nn.ReLU()), torch.randn(2, 4, 5, 3)
    torch.testing.assert_close(head(x), x.relu().mean((2, 3)) @ head.linear.weight.T + head.linear.bias)
    assert fused_plan(head) == FusedPlan("linear", "pre")
    assert fused_plan(PooledLinearHead(4, 3)) == FusedPlan("linear")


def test_a_subclass_with_its_own_forward_is_not_fused() -> None:
    class Scaled(PooledLinearHead):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert fused_plan(Scaled(4, 3)) is None


class Written(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.pool, self.flatten = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()
        self.max, self.wide = nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(2)
        self.drop, self.act, self.same = nn.Dropout(0.2), nn.ReLU(), nn.Identity()
        self.fc, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


FUSED = {
    "modules": lambda m, x: m.fc(m.flatten(m.pool(x))),
    "mean": lambda m, x: m.fc(x.mean([2, 3])),
    "negative dims": lambda m, x: m.fc(torch.mean(x, (-1, -2))),
    "dim by name": lambda m, x: m.fc(x.mean(dim=(2, 3))),
    "keepdim": lambda m, x: m.fc(x.mean((2, 3), keepdim=True).flatten(1)),
    "functional": lambda m, x: m.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)),
    "view": lambda m, x: (lambda y: m.fc(y.view(y.size(0), -1)))(m.pool(x)),
    "identity": lambda m, x: m.same(m.fc(m.same(m.flatten(m.pool(x))))),
}

NOT_FUSED = {
    "max pool": lambda m, x: m.fc(m.flatten(m.max(x))),
    "not global": lambda m, x: m.fc(m.flatten(m.wide(x))),
    "not flat": lambda m, x: m.fc(m.pool(x)),
    "over channels": lambda m, x: m.fc(x.mean([1, 3])),
    "two layers": lambda m, x: m.fc2(m.fc(x.mean([2, 3]))),
    "activation": lambda m, x: m.fc(m.act(x.mean([2, 3]))),
    "arithmetic": lambda m, x: m.fc(x.mean([2, 3])) + 1,
    "branch": lambda m, x: m.fc(x.mean([2, 3])) + x.mean([2, 3]),
    "no linear": lambda m, x: x.mean([2, 3]),
    "norm first": lambda m, x: m.fc(m.flatten(m.pool(m.act(x)))),
    "flatten all": lambda m, x: m.fc(torch.flatten(m.pool(x))),
}


@pytest.mark.parametrize("name", FUSED)
def test_traced_heads_that_are_fused(name: str) -> None:
    assert fused_plan(fx.symbolic_trace(Written(FUSED[name]))) == FusedPlan("fc")


@pytest.mark.parametrize("name", NOT_FUSED)
def test_traced_heads_that_are_not_fused(name: str) -> None:
    assert fused_plan(fx.symbolic_trace(Written(NOT_FUSED[name]))) is None


def test_dropout_of_a_traced_head_is_noted() -> None:
    head = fx.symbolic_trace(Written(lambda m, x: m.fc(m.drop(m.flatten(m.pool(x))))))
    assert fused_plan(head) == FusedPlan("fc", None, ("drop",))
    assert fused_plan(nn.Linear(3, 3)) is None


MAP = FeatureMap(12, (16, 10), 2_000_000)


def test_names_of_heads() -> None:
    small = FeatureMap(40, (3, 9), 50_000_000)
    assert head_names("f", "auto", [MAP, small]) == ["conv@128", "linear"]  # too small a map
    cheap = MAP._replace(macs=100_000)  # a tenth of it do not pay for half of the channels
    assert head_names("f", ["auto", "conv", "pooled4"], [cheap, MAP, MAP]) == ["linear", "conv@24", "pooled4"]
    assert head_names("f", "conv@5", [MAP]) == ["conv@5"]


@pytest.mark.parametrize("macs", [500_000, 2_000_000, 4_000_000])
def test_an_automatic_head_costs_its_share_at_most(macs: int) -> None:
    found = FeatureMap(24, (16, 16), macs)
    (name,) = head_names("f", "auto", [found])
    head, x = head_by_name(name, found, 10).eval(), torch.zeros(1, 24, 16, 16)
    with MacCounter() as counter:
        head.pre(x)
    assert name.startswith("conv@") and 0.02 * macs < counter.macs <= AUTO_SHARE * macs or name == "linear"
    assert (name == "linear") == (macs == 500_000)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            "convolution",
            "f: head must be one of copy, linear, conv, pooled4, auto, or conv@<channels>, got 'convolution'",
        ),
        ("linear@3", "got 'linear@3'"),
        ("conv@0", "got 'conv@0'"),
        (["conv", 3], "got 3"),
        (["conv"], "f: head must be one name, or 2 for the early exits, got 1"),
    ],
)
def test_unknown_heads_are_refused(head: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        head_names("f", head, [MAP, MAP])


def plain_linear(head: nn.Module, x: Tensor) -> Tensor:
    return head.linear(x.mean((2, 3)))


def plain_pooled4(head: nn.Module, x: Tensor) -> Tensor:
    return head.linear(F.adaptive_avg_pool2d(x, 4).flatten(1))


def plain_conv(head: nn.Module, x: Tensor) -> Tensor:
    depthwise, pointwise, norm = (m for m in head.pre if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))
    x = F.conv2d(F.conv2d(x, depthwise.weight, stride=2, padding=1, groups=3), pointwise.weight)
    x = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return head.linear(torch.cat([x.mean((2, 3)), x.flatten(2).max(2).values], 1))


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize(
    ("name", "plain"), [("linear", plain_linear), ("pooled4", plain_pooled4), ("conv@5", plain_conv)]
)
def test_heads_by_name_against_plain_formulas_on_both_paths(name: str, plain: object, axis: int) -> None:
    """Alone, and run by the fused operator: the convolution's average and maximum are no plain global average pool."""
    head = head_by_name(name, MAP._replace(channel_axis=axis), 7)
    maps = torch.randn(3, 12, 16, 10)
    given = maps if axis == 1 else maps.permute(0, 2, 3, 1).contiguous()
    head(given)  # BatchNorm statistics other than the initial ones
    head.eval()
    assert fused_plan(head) is not None
    expected = plain(head, maps)
    assert expected.shape == (3, 7)
    torch.testing.assert_close(head(given), expected)
    net = MultiExitNet([nn.Identity()], [head], num_classes=7).eval()
    assert net._fusable_linears() is not None
    torch.testing.assert_close(net.exit_logits(given)[0], expected)
    pooled, weights, biases = net.pooled_exits(given)
    torch.testing.assert_close(F.linear(pooled[0], weights[0], biases[0]), expected)


@pytest.mark.parametrize("name", ["linear", "conv", "pooled4"])
@pytest.mark.parametrize("fused", [True, False])
def test_heads_by_name_learn_on_both_paths(name: str, fused: bool) -> None:
    net = anticipate(LeNet(), cuts=["0"], head=name, fused=fused).train()
    net.exit_logits(torch.randn(4, 3, 12, 12)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.exits[0].parameters())


class LeNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 10, 3, stride=2), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
        )


@pytest.mark.parametrize("head", ["linear", "conv", "pooled4", "auto", ["conv@6", "copy", "linear"]])
def test_our_networks_with_heads_by_name(head: object) -> None:
    torch.manual_seed(3)
    own = build("resnet_small", 10)
    torch.manual_seed(3)
    net = build("resnet_small", 10, head=head).eval()
    assert torch.equal(own.stages[3].layer4.conv1.weight, net.stages[3].layer4.conv1.weight)
    assert torch.equal(own.exits[3].linear.weight, net.exits[3].linear.weight)
    assert net.exit_logits(torch.randn(2, 3, 20, 20)).shape == (4, 2, 10)
    expected = {"conv": ["conv@32", "conv@64", "conv@128"], "auto": ["conv@48", "conv@128", "conv@128"]}
    names = head if isinstance(head, list) else expected.get(head, [head] * 3)
    assert net.origin["heads"] == names and "heads" not in own.origin
    assert isinstance(net.exits[0].pre, nn.Identity) == (head == "linear")
    if head == "auto":
        small = build("resnet_small", 10, head="auto", example=(3, 8, 8))
        assert small.origin["heads"] == [*expected["auto"][:2], "linear"]


@pytest.mark.parametrize("head", ["linear", "conv", "pooled4", "auto", ["pooled4", "copy", "conv@6"]])
def test_saved_networks_keep_their_heads(tmp_path: Path, head: object) -> None:
    pytest.importorskip("safetensors", reason="the files are safetensors")
    net, x = build("resnet_small", 10, head=head), torch.randn(4, 3, 32, 32)
    net(x)
    for kept in (net.eval(), prune(net, [0, 2])):
        aep_ext.save(kept, tmp_path)
        assert torch.equal(aep_ext.load(tmp_path)(x), kept(x))
    model = LeNet()
    given = head if isinstance(head, str) else head[:1]
    net = anticipate(model, cuts=["0"], head=given).eval()
    aep_ext.save(net, tmp_path)
    assert torch.equal(aep_ext.load(tmp_path, model=LeNet())(x), net(x))
