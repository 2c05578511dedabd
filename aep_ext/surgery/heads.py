"""Exit heads: the forms the paper's networks use, those that early exits can be given by name, and how an exit tells
the fused operator what it is.

A head turns one feature map ``(N, C, H, W)`` into logits ``(N, K)``. Heads of the form *something, global average pool,
(dropout,) linear* can be run together by :func:`aep_ext.ops.multi_exit_linear_head`; :func:`fused_plan` finds out which
can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = [
    "HEADS",
    "ConvPooledLinearHead",
    "ConvPooledMLPHead",
    "FeatureMap",
    "FusedPlan",
    "PooledLinearHead",
    "fused_plan",
    "head_by_name",
    "head_names",
]

HEADS = ("copy", "linear", "conv", "pooled4", "auto")
AUTO_SHARE = 0.1
"""What a convolution head may cost under "auto", of the multiply-adds of the network up to it."""


class PooledLinearHead(nn.Module):
    """``[pre ->] global average pool -> [dropout ->] linear``.

    Args:
        in_channels: channels C of the feature map.
        num_classes: K.
        pre: applied to the feature map before the pooling (DenseNet's ReLU); its output must have ``linear_features``
            channels.
        dropout: probability of the dropout between pooling and linear layer.
        linear_features: input width of the linear layer; ``in_channels`` unless ``pre`` changes the channels.

    Shapes: (N, C, H, W) -> (N, K), in the input's dtype.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        pre: nn.Module | None = None,
        dropout: float = 0.0,
        linear_features: int | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        # Registered in the order in which they run: the parameters' order is part of the published numbers.
        self.pre = pre if pre is not None else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = nn.Linear(linear_features or in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(torch.flatten(self.pool(self.pre(x)), 1)))


def _pointwise(in_channels: int, out_channels: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """1x1 convolution, BatchNorm and activation, with the BatchNorm constants of torchvision's mobile networks."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels, eps=0.001, momentum=0.01),
        activation(),
    )


class ConvPooledLinearHead(PooledLinearHead):
    """EfficientNet's head: ``1x1 conv C -> 4C + BatchNorm + SiLU -> pool -> dropout -> linear``.

    Shapes: (N, C, H, W) -> (N, K), in the input's dtype.
    """

    def __init__(self, in_channels: int, num_classes: int, *, expansion: int = 4, dropout: float = 0.4) -> None:
        width = expansion * in_channels
        super().__init__(
            in_channels,
            num_classes,
            pre=_pointwise(in_channels, width, lambda: nn.SiLU(inplace=True)),
            dropout=dropout,
            linear_features=width,
        )


class ConvPooledMLPHead(nn.Module):
    """MobileNetV3's head: ``1x1 conv C -> 6C + BatchNorm + hardswish -> pool -> linear 6C -> int(1.75 C) -> hardswish
    -> dropout -> linear``.

    Shapes: (N, C, H, W) -> (N, K), in the input's dtype.
    """

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float = 0.2) -> None:
        super().__init__()
        width, hidden = 6 * in_channels, int(1.75 * in_channels)
        self.in_channels = in_channels
        self.pre = _pointwise(in_channels, width, lambda: nn.Hardswish(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(width, hidden),
            nn.Hardswish(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.pre(x)), 1))


class FeatureMap(NamedTuple):
    """What an exit is given: (N, C, H, W), or (N, H, W, C) where ``channel_axis`` is 3, and the multiply-adds of one
    image up to there."""

    channels: int
    size: tuple[int, int]
    macs: int
    channel_axis: int = 1


class _AverageAndMaximum(nn.Module):
    """(N, C, H, W) -> (N, 2 C, 1, 1): the mean and the maximum of every channel.

    The global average pool of :class:`PooledLinearHead` leaves it as it is, so the fused operator can run such heads.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)], 1)


class _ChannelsFirst(nn.Module):
    """(N, H, W, C) -> (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def head_names(function: str, head: str | Sequence[str], maps: Sequence[FeatureMap]) -> list[str]:
    """The head of each early exit by its full name: "auto" is decided, and "conv" says its width.

    Args:
        function: who asks, for the message.
        head: one of :data:`HEADS`, or "conv@64" (64 channels), for all early exits, or one for each.
        maps: what each of them is given.

    Raises:
        ValueError: no such head, or another number of heads than of early exits.
    """
    names = [head] * len(maps) if isinstance(head, str) else list(head)
    if len(names) != len(maps):
        raise ValueError(f"{function}: head must be one name, or {len(maps)} for the early exits, got {len(names)}")
    for name in names or ([head] if isinstance(head, str) else []):
        kind, at, width = str(name).partition("@")
        if kind not in HEADS or (at and (kind != "conv" or not width.isdigit() or not int(width))):
            raise ValueError(f"{function}: head must be one of {', '.join(HEADS)}, or conv@<channels>, got {name!r}")
    return [_full_name(name, found) for name, found in zip(names, maps, strict=True)]


def _full_name(name: str, found: FeatureMap) -> str:
    """Early feature maps are large, cheap heads there weak: "auto" gives them a convolution as wide as its share of the
    cost allows, and those of less than 4 x 4 a linear layer."""
    if name == "conv":
        return f"conv@{2 * found.channels}"
    if name != "auto":
        return name
    pixels = ((found.size[0] + 1) // 2) * ((found.size[1] + 1) // 2)
    affordable = int(AUTO_SHARE * found.macs / (pixels * found.channels)) - 9 * gcd(found.channels, 8)
    width = min(max(2 * found.channels, 128), affordable - affordable % 8)
    return f"conv@{width}" if min(found.size) >= 4 and 2 * width >= found.channels else "linear"


def head_by_name(name: str, found: FeatureMap, num_classes: int) -> nn.Module:
    """A new head, by a full name that :func:`head_names` gave, other than "copy".

    - "linear": global average pool, linear.
    - "conv@W": 3x3 with stride 2 in groups of up to 8 channels, 1x1 to W channels, BatchNorm, ReLU; average and maximum
      pool side by side; linear 2 W -> K.
    - "pooled4": average pool to 4 x 4, linear 16 C -> K.

    Shapes: the feature map -> (N, K), in the input's dtype.
    """
    channels, pre, width = found.channels, list[nn.Module](), found.channels
    if found.channel_axis == 3:
        pre.append(_ChannelsFirst())
    if name == "pooled4":
        width = 16 * channels
        pre += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Unflatten(1, (width, 1, 1))]
    elif name.startswith("conv@"):
        outgoing = int(name.removeprefix("conv@"))
        width = 2 * outgoing
        pre += [
            # Not depthwise: with a stride, and in bfloat16, the CPU's backward of that takes several times as long.
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels // gcd(channels, 8), bias=False),
            nn.Conv2d(channels, outgoing, 1, bias=False),
            nn.BatchNorm2d(outgoing),
            nn.ReLU(),
            _AverageAndMaximum(),
        ]
    return PooledLinearHead(channels, num_classes, pre=nn.Sequential(*pre) if pre else None, linear_features=width)


class FusedPlan(NamedTuple):
    """Where, inside an exit, the parts are that the fused operator needs: qualified names of submodules."""

    linear: str
    prepare: str | None = None
    dropouts: tuple[str, ...] = ()


def fused_plan(head: nn.Module) -> FusedPlan | None:
    """How :func:`aep_ext.ops.multi_exit_linear_head` can run this exit, or None if only its own forward can.

    Understands :class:`PooledLinearHead` and traced heads (``torch.fx.GraphModule``) that consist of a global average
    pool, a flattening, dropouts and one linear layer, and nothing else.
    """
    if isinstance(head, PooledLinearHead):
        if type(head).forward is not PooledLinearHead.forward or type(head.linear) is not nn.Linear:
            return None
        prepare = None if isinstance(head.pre, nn.Identity) else "pre"
        dropouts = ("dropout",) if isinstance(head.dropout, nn.Dropout) else ()
        return FusedPlan("linear", prepare, dropouts)
    if isinstance(head, GraphModule):
        return _plan_of_graph(head)
    return None


def _plan_of_graph(head: GraphModule) -> FusedPlan | None:
    """Of a traced head. The order wanted is pool, then (flatten, dropout)*, then linear, in one unbranched line."""
    previous: Node | None = None
    linear: str | None = None
    pooled = flat = False
    dropouts: list[str] = []
    for node in head.graph.nodes:
        module = head.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "output":
            return FusedPlan(linear, None, tuple(dropouts)) if linear is not None and node.args == (previous,) else None
        if node.op == "placeholder":
            if previous is not None:
                return None
        elif _is_size(node):
            continue  # of the batch, for a view; whoever uses it is looked at on its own
        elif not node.args or node.args[0] is not previous:
            return None
        elif type(module) is nn.Identity:
            pass
        elif linear is not None:
            return None
        elif not pooled:
            kind = _global_pool(head, node)
            if kind is None:
                return None
            pooled, flat = True, kind == "flat"
        elif _is_flatten(node, module):
            flat = True
        elif type(module) is nn.Dropout:
            dropouts.append(node.target)
        elif type(module) is nn.Linear and flat:
            linear = node.target
        else:
            return None
        previous = node
    return None


def _is_size(node: Node) -> bool:
    return node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)


def _argument(node: Node, index: int, name: str, default: object = None) -> object:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _global_pool(head: GraphModule, node: Node) -> str | None:
    """ "flat" if the node is a global average pool to (N, C), "map" if to (N, C, 1, 1), else None."""
    if node.op == "call_module":
        module = head.get_submodule(node.target)
        if type(module) is nn.AdaptiveAvgPool2d:
            return "map" if module.output_size in (1, (1, 1), [1, 1]) else None
        return None
    if node.op == "call_function" and node.target is nn.functional.adaptive_avg_pool2d:
        return "map" if _argument(node, 1, "output_size") in (1, (1, 1), [1, 1]) else None
    mean = (node.op == "call_function" and node.target is torch.mean) or (
        node.op == "call_method" and node.target == "mean"
    )
    if mean:
        dims = _argument(node, 1, "dim")
        dims = sorted(d % 4 for d in dims) if isinstance(dims, (tuple, list)) else dims
        if dims != [2, 3] or set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
            return None
        return "map" if _argument(node, 2, "keepdim", False) is True else "flat"
    return None


def _is_flatten(node: Node, module: nn.Module | None) -> bool:
    """Whether the node makes (N, C) of (N, C, 1, 1); a view (n, -1) does if n is the batch's size."""
    if module is not None:
        return type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1
    if node.op == "call_method" and node.target in ("view", "reshape"):
        return len(node.args) == 3 and isinstance(node.args[1], Node) and _is_size(node.args[1]) and node.args[2] == -1
    flatten = (node.op == "call_function" and node.target is torch.flatten) or (
        node.op == "call_method" and node.target == "flatten"
    )
    return flatten and _argument(node, 1, "start_dim", 0) == 1 and _argument(node, 2, "end_dim", -1) == -1
