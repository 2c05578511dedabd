"""Networks as a user runs them: ungated, compiled, as one CUDA graph, gated, and gated in one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.surgery import networks
from aep_ext.termination import GatedNet

PIXELS, CLASSES, SETS = 224, 1000, 8
NEVER = 2.0


@dataclass(frozen=True)
class Case:
    """A network at a batch size."""

    network: str
    batch: int

    @property
    def id(self) -> str:
        return f"{self.network}-{self.batch}"


def all_cases() -> Iterator[Case]:
    """ResNet-50 and MobileNetV3-Small at batch 1, 8 and 64."""
    for network in ("resnet50", "mobilenet_v3_small"):
        for batch in (1, 8, 64):
            yield Case(network, batch)


def build(case: Case, device: str, pixels: int = PIXELS, classes: int = CLASSES) -> tuple[MultiExitNet, list[Tensor]]:
    """The network with all its exits, and several batches of noise.

    It is not trained, but its statistics are those of noise and its exits' answers differ in confidence, so that
    thresholds can part the samples.
    """
    torch.manual_seed(0)
    net = networks.build(case.network, classes, weights=None)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    net = net.to(device)
    xs = [torch.randn(case.batch, 3, pixels, pixels, device=device) for _ in range(SETS)]
    _liven(net, torch.randn(16, 3, pixels, pixels, device=device))
    return net, xs


@torch.no_grad()
def _liven(net: MultiExitNet, x: Tensor) -> None:
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the statistics of this batch, whole
    net.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()
    for head, logits in zip(net.exits, net.exit_logits(x), strict=True):
        last = [module for module in head.modules() if isinstance(module, nn.Linear)][-1]
        last.weight.mul_(3 / logits.std())


def leaving(net: MultiExitNet, xs: list[Tensor], e: int, share: float) -> list[float]:
    """Thresholds by which this share of all samples leaves at exit e, and nobody at another but the last."""
    thresholds = [NEVER] * (net.num_exits - 1)
    if share == 0:
        return thresholds
    if share == 1:
        thresholds[e] = 0.0
        return thresholds
    weights = net.output_weights[: e + 1].float()
    found = []
    with torch.no_grad():
        for x in xs:
            logits = net.exit_logits(x)[: e + 1].float()
            judged = (logits * weights[:, None, None]).sum(0) / weights.sum()
            found.append(torch.softmax(judged, -1).amax(-1))
    confidence = torch.cat(found).double().sort().values
    last_to_stay = len(confidence) - round(share * len(confidence))
    thresholds[e] = float(confidence[last_to_stay - 1 : last_to_stay + 1].mean())
    return thresholds


def scenarios(exits: int) -> Iterator[tuple[str, int, float]]:
    """Name, exit and share: nobody leaves; half and all leave at each exit but the last."""
    yield "0%", 0, 0.0
    for e in range(exits - 1):
        yield f"50% at exit {e}", e, 0.5
        yield f"100% at exit {e}", e, 1.0


def prefix(net: MultiExitNet, e: int) -> Callable[[Tensor], Tensor]:
    """Stages up to exit e with the head there alone: what is left of the network where all leave there."""

    def forward(x: Tensor) -> Tensor:
        for stage in list(net.stages)[: net.exit_stages[e] + 1]:
            x = stage(x)
        return net.exits[e](x)

    return forward


class PlainGraph:
    """A function as one CUDA graph: called like it, copies its input in, as a gated graph does."""

    def __init__(self, function: Callable[[Tensor], Tensor], example: Tensor) -> None:
        self.input = torch.empty_like(example).copy_(example)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                function(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output = function(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def agree(gated: GatedNet, answer: Any, x: Tensor) -> None:
    """The graph's answers are the simulator's, but near thresholds.

    Raises:
        AssertionError: they are not.
    """
    with torch.no_grad():
        logits = gated.net.exit_logits(x)
    simulated, sure = gated.simulate(logits), ~gated.near_threshold(logits, 1e-4)
    assert torch.equal(answer.exit[sure], simulated.exits[sure]), "another exit than the simulator's"
    close(answer.logits[sure], simulated.logits[sure], "graphed")


def close(got: Tensor, expected: Tensor, who: str) -> None:
    """Equal to a hundredth of the largest value: convolutions may run in TF32.

    Raises:
        AssertionError: they are not; it names ``who``.
    """
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-2 * scale, msg=lambda text: f"{who}: {text}")
