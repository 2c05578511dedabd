"""What is measured on a GPU: the operators' cases, and networks as a user runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.inference import ExitPolicy, GatedNet
from aep_ext.surgery import networks
from benchmarks.cases import Case
from benchmarks.gpu.measure import captured
from benchmarks.paired_timing import Comparison
from benchmarks.test_ensemble import ensemble, ensemble_stats
from benchmarks.test_gate import gate
from benchmarks.test_head import multi_exit_linear_head
from benchmarks.test_linear_loss import linear_joint_cross_entropy
from benchmarks.test_loss import joint_cross_entropy
from benchmarks.test_pool import global_avg_pool
from benchmarks.test_subsets import subset_correct

COMPARISONS: dict[str, Callable[[Case, str], Comparison]] = {
    "global_avg_pool": global_avg_pool,
    "multi_exit_linear_head": multi_exit_linear_head,
    "ensemble": ensemble,
    "ensemble_stats": ensemble_stats,
    "joint_cross_entropy": joint_cross_entropy,
    "linear_joint_cross_entropy": linear_joint_cross_entropy,
    "gate": gate,
    "subset_correct": subset_correct,
}
PIXELS, CLASSES, SETS = 224, 1000, 8
NEVER = 2.0


@dataclass(frozen=True)
class OperatorCase:
    """A case of an operator."""

    operator: str
    case: Case

    @property
    def id(self) -> str:
        """``ensemble_stats-4x64x1000-bfloat16``."""
        return f"{self.operator}-{self.case.id}"

    def comparison(self, device: str) -> Comparison:
        """The operator and what it is compared with."""
        return COMPARISONS[self.operator](self.case, device)


def operator_cases() -> Iterator[OperatorCase]:
    """All of them."""
    logits = ((4, 1, 10), (4, 64, 1000), (4, 4096, 1000), (4, 1024, 21841))
    for dtype in ("float32", "bfloat16"):
        for size in ((1, 2048, 7), (64, 2048, 7), (64, 256, 56), (256, 512, 28)):
            for layout in ("contiguous", "channels_last"):
                yield OperatorCase("global_avg_pool", Case(size, "forward", dtype, layout))
        plain = {
            "multi_exit_linear_head": ((1, 224, 1000), (64, 224, 1000)),
            "ensemble": logits,
            "ensemble_stats": logits,
            "joint_cross_entropy": ((4, 64, 100), (4, 256, 1000), (4, 4096, 1000), (4, 1024, 21841)),
            "linear_joint_cross_entropy": ((4, 1024, 21841),),
            "gate": ((1, 1000), (64, 1000), (256, 1000)),
        }
        for operator, sizes in plain.items():
            for size in sizes:
                yield OperatorCase(operator, Case(size, dtype=dtype))
        for size in ((4, 256, 1000), (4, 1024, 21841)):
            yield OperatorCase("linear_joint_cross_entropy", Case(size, "wide", dtype))
    for size in ((4, 10000, 100), (7, 10000, 200), (10, 10000, 100)):
        yield OperatorCase("subset_correct", Case(size))


@dataclass(frozen=True)
class NetworkCase:
    """A network at a batch size."""

    network: str
    batch: int

    @property
    def id(self) -> str:
        """``resnet50-1``."""
        return f"{self.network}-{self.batch}"


def network_cases() -> Iterator[NetworkCase]:
    """ResNet-50 and MobileNetV3-Small at batch 1, 8 and 64."""
    for network in ("resnet50", "mobilenet_v3_small"):
        for batch in (1, 8, 64):
            yield NetworkCase(network, batch)


def build(case: NetworkCase, device: str) -> tuple[MultiExitNet, list[Tensor]]:
    """The network with all its exits, and :data:`SETS` batches of noise.

    It is not trained, but its statistics are those of noise and its exits' answers differ in confidence, so that
    thresholds can part the samples.
    """
    torch.manual_seed(0)
    net = networks.build(case.network, CLASSES, weights=None)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    net = net.to(device)
    xs = [torch.randn(case.batch, 3, PIXELS, PIXELS, device=device) for _ in range(SETS)]
    _fit_statistics(net, torch.randn(16, 3, PIXELS, PIXELS, device=device))
    return net, xs


@torch.no_grad()
def _fit_statistics(net: MultiExitNet, x: Tensor) -> None:
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


def gated(net: MultiExitNet, thresholds: float | list[float] = NEVER) -> GatedNet:
    """The network with gates by confidence."""
    return GatedNet(net, ExitPolicy(output_weights=net.output_weights.tolist(), thresholds=thresholds))


def leaving(net: MultiExitNet, xs: list[Tensor], e: int, share: float) -> list[float]:
    """Thresholds by which this share of all samples leaves at exit e, and nobody at another but the last."""
    thresholds = [NEVER] * (net.num_exits - 1)
    if share in (0, 1):
        thresholds[e] = NEVER if share == 0 else 0.0
        return thresholds
    weights = net.output_weights[: e + 1].float()
    found = []
    with torch.no_grad():
        for x in xs:
            logits = net.exit_logits(x)[: e + 1].float()
            mean = (logits * weights[:, None, None]).sum(0) / weights.sum()
            found.append(torch.softmax(mean, -1).amax(-1))
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
        self.function, self.input = function, torch.empty_like(example).copy_(example)
        with torch.no_grad():
            self.graph = captured(self._run)

    def _run(self) -> None:
        self.output = self.function(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output


def assert_simulated(net: GatedNet, answer: Any, x: Tensor) -> None:
    """The graph's answers are the simulator's, but near thresholds.

    Raises:
        AssertionError: they are not.
    """
    with torch.no_grad():
        logits = net.net.exit_logits(x)
    simulated, sure = net.simulate(logits), ~net.near_threshold(logits, 1e-4)
    assert torch.equal(answer.exit[sure], simulated.exit[sure]), "another exit than the simulator's"
    assert_near(answer.logits[sure], simulated.logits[sure], "graphed")


def assert_near(result: Tensor, expected: Tensor, who: str) -> None:
    """Equal to a hundredth of the largest value: convolutions may run in TF32.

    Raises:
        AssertionError: they are not; it names ``who``.
    """
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-2 * scale, msg=lambda text: f"{who}: {text}")
