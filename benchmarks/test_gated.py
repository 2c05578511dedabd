"""Gated networks: what the gates cost where nobody leaves, and what leaving saves. One thread unless asked otherwise.

    pytest benchmarks/test_gated.py --benchmark-only --full --case-seconds 20 --result RESULT.json

The networks are not trained: what is timed depends on how many leave, and that the thresholds settle. "Ungated" is
the same network with all of its heads and the ensemble, on the same backend. Names that end in ``_prepared`` are
networks on the fastest backend of ``aep_ext.inference.compile``.

``overhead_percent`` is the time of the gated network beyond the ungated one's, the median over rounds in which both
took their turn; ``overhead_interval`` the notch around it, 1.57 * (quartile range) / sqrt(rounds) to each side, which
is about a 95 % interval of a median (McGill, Tukey and Larsen, The American Statistician 32, 1978).
``goal_percent`` stands where there is a goal. benchmarks/tables.py makes a table of it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.inference import CompiledNet, ExitPolicy, GatedNet, compile
from aep_ext.inference.backends import missing
from aep_ext.surgery import networks
from benchmarks.paired_timing import Comparison

ON_ENGINE = "_prepared"  # as it stands in the names of the result files
PIXELS = {"resnet_small": 32, "resnet50": 224, "mobilenet_v3_small": 224}
GOALS = {("resnet50", 1): 1.0, (f"mobilenet_v3_small{ON_ENGINE}", 1): 3.0}  # percent, where nobody leaves
SIZES = (1, 8, 64)
NEVER = 2.0  # no confidence reaches it
Net = MultiExitNet | CompiledNet


def case(name: str, rows: int) -> Any:
    marks = [pytest.mark.quick] if name.startswith("resnet_small") and rows != 8 else []
    if name.startswith("resnet50") and rows == 64:
        marks.append(pytest.mark.full)  # seconds for each call
    return pytest.param(name, rows, marks=marks, id=f"cpu-{name}-{rows}")


CASES = [case(name, rows) for name in ("resnet_small", "resnet50") for rows in SIZES]
CASES += [case(name + ON_ENGINE, rows) for name in ("resnet_small", "mobilenet_v3_small") for rows in SIZES]
BATCHES = [entry for entry in CASES if entry.values[1] > 1]


@functools.cache  # compiling takes seconds
def _network(name: str, rows: int) -> tuple[Net, Tensor]:
    backbone = name.removesuffix(ON_ENGINE)
    if name.endswith(ON_ENGINE) and missing("openvino") and missing("onnxruntime"):
        pytest.skip(f"{missing('openvino')}; {missing('onnxruntime')}")
    if backbone != "resnet_small":
        pytest.importorskip("torchvision", reason="its backbone is torchvision's")
    net = networks.build(backbone, 10, weights=None)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    pixels = PIXELS[backbone]
    net, x = net.eval(), torch.randn(rows, 3, pixels, pixels)
    return (compile(net, x) if name.endswith(ON_ENGINE) else net), x


def _gated(net: Net, threshold: float, *, only_first: bool = False) -> GatedNet:
    """Gates by confidence, at all exits or at the first only."""
    weights = net.output_weights.tolist()
    enabled = [e == 0 or not only_first for e in range(len(weights) - 1)]
    return GatedNet(net, ExitPolicy(output_weights=weights, thresholds=threshold, enabled=enabled))


def _for_its_cost(function: Callable[[], object], answer: Tensor) -> Callable[[], Tensor]:
    """Calls ``function`` and returns ``answer``: for one that answers otherwise, since nobody leaves it early."""

    def call() -> Tensor:
        function()
        return answer

    return call


def _threshold(net: Net, x: Tensor, leaving: int) -> float:
    """That the first exit's ``leaving`` largest confidences reach: midway to the next, so that no rounding decides."""
    values = torch.softmax(net.exit_logits(x)[0], -1).amax(-1).sort().values
    middle = len(values) - leaving
    return float(values[middle - 1 : middle + 1].mean())


class _ByHand:
    """The stages and heads of a network as a user calls them."""

    def __init__(self, net: MultiExitNet) -> None:
        self.net = net

    def __call__(self, e: int, features: Tensor) -> tuple[Tensor, Tensor]:
        features = self.net.stages[e](features)
        return features, self.net.exits[e](features)

    def take(self, features: Tensor, positions: Tensor) -> Tensor:
        return features[positions]

    def close(self) -> None:
        pass


def _stages(net: Net) -> contextlib.closing:
    """Runs single stages without gates: ``run(e, features)`` gives features and logits."""
    return contextlib.closing(net.begin() if isinstance(net, CompiledNet) else _ByHand(net))


@pytest.fixture
def about(benchmark: Any) -> Callable[[str, int, Net], None]:
    """Writes down what a case is of: the table in benchmarks/tables.py has a row for each."""

    def write(name: str, rows: int, net: Net) -> None:
        backbone = name.removesuffix(ON_ENGINE)
        benchmark.extra_info.update(network=backbone, pixels=PIXELS[backbone], batch=rows)
        benchmark.extra_info["engine"] = "eager" if isinstance(net, MultiExitNet) else net.backend

    return write


def _overhead(info: dict[str, Any], goal: float | None = None) -> None:
    """The time of the gated network beyond the ungated one's."""
    if "paired_ratio_ungated" not in info:  # --benchmark-disable
        return
    ratio = info["paired_ratio_ungated"]
    notch = 1.57 * info["iqr_ungated"] / math.sqrt(info["rounds"])
    info["overhead_percent"] = 100 * (1 / ratio - 1)
    upper = 100 * (1 / (ratio - notch) - 1) if ratio > notch else None  # None: the rounds say nothing
    info["overhead_interval"] = [100 * (1 / (ratio + notch) - 1), upper]
    if goal is not None:
        info["goal_percent"], info["goal_met"] = goal, bool(info["overhead_percent"] <= goal)


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_nobody_leaves(paired_timing, benchmark, about, name, rows):
    """The cost of the gates: every sample goes to the last exit. ratio_ungated is 1 / (1 + overhead)."""
    net, x = _network(name, rows)
    about(name, rows, net)
    gated = _gated(net, NEVER)
    paired_timing(Comparison(lambda: gated(x).logits, {"ungated": lambda: net(x)}))
    _overhead(benchmark.extra_info, GOALS.get((name, rows)))


@pytest.mark.parametrize("name, rows", BATCHES)
@torch.no_grad()
def test_gated_few_leave(paired_timing, benchmark, about, name, rows):
    """One of eight, or one of 64, leaves at the first exit: measured ("auto"), and gated always ("compact").

    Where gates do not pay, "auto" must cost no more beyond the ungated network than the gates alone, the
    baseline ``nobody``.
    """
    net, x = _network(name, rows)
    about(name, rows, net)
    threshold = _threshold(net, x, 1)
    auto, compact = (_gated(net, threshold, only_first=True) for _ in range(2))
    nobody = _gated(net, NEVER, only_first=True)
    auto.measure(x)
    opened = auto.gates_at(rows)
    benchmark.extra_info["auto_gates"] = opened
    answer = auto(x).logits
    others = {
        "compact": (lambda: compact(x).logits) if opened else _for_its_cost(lambda: compact(x), answer),
        "nobody": _for_its_cost(lambda: nobody(x), answer),
        "ungated": _for_its_cost(lambda: net(x), answer),
    }
    paired_timing(Comparison(lambda: auto(x).logits, others))
    _overhead(benchmark.extra_info)


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_all_leave_at_the_first_exit(paired_timing, about, name, rows):
    """Against the bare stage and head, which decide nothing, and for comparison the whole network."""
    net, x = _network(name, rows)
    about(name, rows, net)
    gated = _gated(net, 0.0)
    answer = gated(x).logits

    def bare() -> Tensor:
        with _stages(net) as run:
            return run(0, x)[1].clone()  # an engine's logits lie in memory that the next call overwrites

    others = {"stage_and_head": bare, "ungated": _for_its_cost(lambda: net(x), answer)}
    paired_timing(Comparison(lambda: gated(x).logits, others))


@pytest.mark.parametrize("name, rows", BATCHES)
@torch.no_grad()
def test_gated_half_leave_at_the_first_exit(paired_timing, about, name, rows):
    """Compacted, against a loop as a user writes it, and for comparison the whole network."""
    net, x = _network(name, rows)
    about(name, rows, net)
    threshold = _threshold(net, x, rows // 2)
    compact = _gated(net, threshold, only_first=True)
    weights = net.output_weights.tolist()

    def naive() -> Tensor:
        answers = torch.empty(rows, 10)
        features, running, there = x, 0.0, torch.arange(rows)
        with _stages(net) as run:
            for e, weight in enumerate(weights):
                features, logits = run(e, features)
                running = running + weight * logits
                if e == 0:
                    leaves = torch.softmax(running / weight, -1).amax(-1) >= threshold
                    answers[there[leaves]] = running[leaves] / weight
                    stay = (~leaves).nonzero().flatten()
                    features, running, there = run.take(features, stay), running[stay], there[stay]
        answers[there] = running / sum(weights)
        return answers

    answer = compact(x).logits
    others = {"naive": naive, "ungated": _for_its_cost(lambda: net(x), answer)}
    paired_timing(Comparison(lambda: compact(x).logits, others))
