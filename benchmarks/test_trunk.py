"""The trunk on inference engines: cut into units against the whole network on the same engine.

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
from aep_ext.inference.backends import BACKENDS, Settings, engine_class, missing
from aep_ext.inference.backends.inductor import no_compiler
from aep_ext.inference.segments import Segment, cut, frozen_copy, unit_inputs
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.surgery.networks import build

ENGINES = ("openvino", "onnxruntime")
NETWORKS = ("resnet50", "mobilenet_v3_small", "efficientnet_b0")
CLASSES = 10
# The network on which the calls between units weigh most.
QUICK = {("mobilenet_v3_small", 64, 1, name) for name in ENGINES}


def _cases() -> list[Any]:
    return [
        pytest.param(
            *case,
            id="{}-{}px-batch{}-{}".format(*case),
            marks=pytest.mark.quick if case in QUICK else pytest.mark.matrix,
        )
        for case in product(NETWORKS, (64, 224), (1, 8), BACKENDS)
    ]


def _network(name: str, pixels: int) -> MultiExitNet:
    """Four exits; BatchNorm statistics other than the initial ones, so that folding them is real work."""
    models = pytest.importorskip("torchvision.models", reason="the networks are torchvision's")
    if name == "efficientnet_b0":
        model = models.efficientnet_b0(weights=None, num_classes=CLASSES)
        net = anticipate(model, exits=4, example=(3, pixels, pixels))
    else:
        net = build(name, CLASSES)
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
    return frozen_copy(net)


def _runner(backend: str, segments: Sequence[Segment], x: Tensor) -> Callable[[], Tensor]:
    """All units on ``x``: (E, n, K), rows of units without a head being empty."""
    inputs = unit_inputs(segments, x)
    chain = engine_class(backend)(segments, inputs, Settings(torch.get_num_threads(), batches=(len(x),))).chain(len(x))
    last = len(segments) - 1

    def run() -> Tensor:
        chain.load(0, x)
        for unit in range(last):
            chain.run(unit)
        return chain.run(last)

    return run


def _with_heads(backend: str, net: MultiExitNet, x: Tensor) -> Callable[[], Tensor]:
    segments = cut(net)
    inputs = unit_inputs(segments, x)
    chain = engine_class(backend)(segments, inputs, Settings(torch.get_num_threads(), batches=(len(x),))).chain(len(x))

    def run() -> Tensor:
        chain.load(0, x)
        logits = chain.run_all()
        ops.ensemble(logits, net.output_weights)
        return logits[-1]

    return run


@pytest.mark.parametrize(("network", "pixels", "batch", "backend"), _cases())
def test_trunk(network: str, pixels: int, batch: int, backend: str, race: Callable[..., None], benchmark: Any) -> None:
    reason = missing(backend) or (no_compiler(torch.device("cpu")) if backend == "inductor" else None)
    if reason:
        pytest.skip(reason)
    net = _network(network, pixels)
    x = torch.randn(batch, 3, pixels, pixels)
    trunk = cut(net, heads=False)
    whole = [Segment([part for segment in trunk for part in segment.body], net.exits[-1], last=True).eval()]

    def eager() -> Tensor:
        with torch.no_grad():
            return whole[0](x)[0]

    rivals = {"whole": _runner(backend, whole, x), "with_heads": _with_heads(backend, net, x), "eager": eager}
    for other in ENGINES:
        if other != backend and missing(other) is None:
            rivals[f"whole_{other}"] = _runner(other, whole, x)
    race(_runner(backend, trunk, x), rivals)

    info = benchmark.extra_info
    if "fused_median_us" not in info:  # --benchmark-disable
        return
    cuts = len(trunk) - 1
    info.update(network=network, pixels=pixels, batch=batch, backend=backend, boundaries=cuts)
    staged = info["fused_median_us"]
    # Differences are from the paired ratios: the machine's moods meet both halves of a round alike.
    info["boundary_us"] = info["whole_median_us"] * (1 / info["paired_ratio_whole"] - 1) / cuts
    info["heads_us"] = info["with_heads_median_us"] - staged
    of_engines = {name: info.get(f"whole_{name}_median_us") for name in ENGINES}
    if backend in ENGINES:
        of_engines[backend] = info["whole_median_us"]
    known = {name: value for name, value in of_engines.items() if value is not None}
    if len(known) == len(ENGINES):  # the goal speaks of the faster of both
        best = min(known, key=known.__getitem__)
        excess = 1 / info["paired_ratio_whole" if best == backend else f"paired_ratio_whole_{best}"] - 1
        info["best_engine"], info["best_engine_us"] = best, known[best]
        info["excess_per_boundary_us"] = excess * known[best] / cuts
        info["excess_percent"] = 100 * excess
        info["goal_met"] = bool(excess * known[best] <= max(0.03 * known[best], 30.0 * cuts))
