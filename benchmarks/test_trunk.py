"""The trunk on inference engines: cut into stages against the whole network on the same engine.

    pytest benchmarks/test_trunk.py --benchmark-only --full -k "mobilenet and 64px and batch1-"

The time shown is the staged trunk's without heads (but for the last one), which is what the cuts cost beside the
single-exit network in one piece (`whole`). Heads come on top in `with_heads`: all exits' logits and the ensemble.
`best_engine_us` is the faster of OpenVINO's and ONNX Runtime's whole network, and `excess_per_boundary_us` what the
staged trunk lacks to that, per cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from aep_ext import anticipate, ops
from aep_ext.inference.backends import BACKENDS, build, missing
from aep_ext.inference.backends.engine import Settings
from aep_ext.inference.segments import Segment, cut, segment_inputs
from aep_ext.surgery import networks
from aep_ext.surgery.multi_exit import MultiExitNet
from benchmarks.paired_timing import Comparison

ENGINES = ("openvino", "onnxruntime")
NETWORKS = ("resnet50", "mobilenet_v3_small", "efficientnet_b0")
CLASSES = 10
GOAL_PERCENT, GOAL_US = 3.0, 30.0  # of the whole network, or for each cut, whichever is larger
# The network on which the calls between stages weigh most.
QUICK = {("mobilenet_v3_small", 64, 1, name) for name in ENGINES}


def _cases() -> list[Any]:
    return [
        pytest.param(
            *case,
            id="{}-{}px-batch{}-{}".format(*case),
            marks=pytest.mark.quick if case in QUICK else pytest.mark.full,
        )
        for case in product(NETWORKS, (64, 224), (1, 8), BACKENDS)
    ]


def _network(name: str, pixels: int) -> MultiExitNet:
    """Four exits; BatchNorm statistics other than the initial ones, so that folding them is real work."""
    models = pytest.importorskip("torchvision.models", reason="the networks are torchvision's")
    if name == "efficientnet_b0":
        model = models.efficientnet_b0(weights=None, num_classes=CLASSES)
        net = anticipate(model, exits=4, placement="stages", example=(3, pixels, pixels))
    else:
        net = networks.build(name, CLASSES)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return net.eval().requires_grad_(False)


class NoHead(nn.Module):
    """Stands for a head that is left out: an output of its shape, (n, K), at next to no cost."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :CLASSES, 0, 0]


def _runner(
    backend: str, segments: Sequence[Segment], x: Tensor, weights: Tensor | None = None
) -> Callable[[], Tensor]:
    """All stages on ``x``, giving the last one's logits; with ``weights`` the ensemble of all is computed too."""
    settings = Settings(torch.get_num_threads(), batches=(len(x),))
    engine = build(backend, segments, segment_inputs(segments, x), settings)
    chain, last = engine.chain(len(x)), len(segments) - 1

    def run() -> Tensor:
        if weights is not None:
            logits = engine.exit_logits(x, len(segments))
            ops.ensemble(logits, weights)
            return logits[-1]
        chain.load(0, x)
        for stage in range(last):
            chain.run(stage)
        return chain.run(last)

    return run


@pytest.mark.parametrize(("network", "pixels", "batch", "backend"), _cases())
def test_trunk(network, pixels, batch, backend, paired_timing, benchmark):
    reason = missing(backend)
    if reason:
        pytest.skip(reason)
    net, x = _network(network, pixels), torch.randn(batch, 3, pixels, pixels)
    full = cut(net)
    trunk = [*(Segment(segment.body, NoHead(), last=False).eval() for segment in full[:-1]), full[-1]]
    whole = [Segment(net.stages, net.exits[-1], last=True).eval()]
    others = {
        "whole": _runner(backend, whole, x),
        "with_heads": _runner(backend, full, x, net.output_weights),
        "eager": torch.no_grad()(lambda: whole[0](x)[0]),
    }
    for other in ENGINES:
        if other != backend and missing(other) is None:
            others[f"whole_{other}"] = _runner(other, whole, x)
    paired_timing(Comparison(_runner(backend, trunk, x), others))
    info = benchmark.extra_info
    if "fused_median_us" in info:  # not with --benchmark-disable
        info.update(network=network, pixels=pixels, batch=batch, backend=backend, boundaries=len(trunk) - 1)
        _against_the_best_engine(info)


def _against_the_best_engine(info: dict[str, Any]) -> None:
    """Differences are from the paired ratios: changes of the machine's speed meet both halves of a round alike."""
    cuts, backend = info["boundaries"], info["backend"]
    info["boundary_us"] = info["whole_median_us"] * (1 / info["paired_ratio_whole"] - 1) / cuts
    info["heads_us"] = info["with_heads_median_us"] - info["fused_median_us"]
    names = {engine: "whole" if engine == backend else f"whole_{engine}" for engine in ENGINES}
    if not all(f"{name}_median_us" in info for name in names.values()):  # the goal speaks of the faster of both
        return
    best = min(names, key=lambda engine: info[f"{names[engine]}_median_us"])
    time, excess = info[f"{names[best]}_median_us"], 1 / info[f"paired_ratio_{names[best]}"] - 1
    info["best_engine"], info["best_engine_us"] = best, time
    info["excess_per_boundary_us"], info["excess_percent"] = excess * time / cuts, 100 * excess
    info["goal_met"] = bool(excess * time <= max(GOAL_PERCENT / 100 * time, GOAL_US * cuts))
