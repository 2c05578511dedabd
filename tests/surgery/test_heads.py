"""Heads, and which of them the fused operator can run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aep_ext.surgery.heads import ConvPooledLinearHead, ConvPooledMLPHead, FusedPlan, PooledLinearHead, fused_plan


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
