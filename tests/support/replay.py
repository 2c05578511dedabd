"""A network that replays cached exit logits, whatever rows it is asked for, and notes how many rows each stage sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aep_ext import ExitPolicy, GatedNet, MultiExitNet
from aep_ext.inference import CompiledNet


class Pass(nn.Module):
    """A stage: features are sample numbers, (n, 1, 1, 1), and go on as a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return x.clone()


class Replay(nn.Module):
    """A head: looks its logits up, (N, K), by the sample numbers that reach it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


def replay_net(exit_logits: Tensor, weights: list[float]) -> MultiExitNet:
    """Its exit logits for the inputs of :func:`numbered` are ``exit_logits``, (E, N, K)."""
    exits, _, classes = exit_logits.shape
    heads = [Replay(logits) for logits in exit_logits]
    return MultiExitNet([Pass() for _ in range(exits)], heads, num_classes=classes, output_weights=weights).eval()


def numbered(first: int, end: int) -> Tensor:
    """The inputs of samples first..end-1: (n, 1, 1, 1) float64."""
    return torch.arange(first, end, dtype=torch.float64)[:, None, None, None]


def gate(net: MultiExitNet | CompiledNet, criterion, thresholds, **options) -> GatedNet:
    """A GatedNet with the network's own output weights."""
    policy = ExitPolicy(output_weights=net.output_weights, criterion=criterion, thresholds=thresholds, **options)
    return GatedNet(net, policy)
