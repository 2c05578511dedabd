"""Gated networks: what the gates cost where nobody leaves, and what leaving saves. One thread unless asked otherwise.

    python benchmarks/matrix.py --folder benchmarks/test_gated.py --output RESULT.json -- --case-seconds 20

The networks are not trained: what is timed depends on how many leave, and that the thresholds settle. "Ungated" is
the same network with all of its heads and the ensemble, on the same backend. Names that end in ``_prepared`` are
networks on the fastest backend of ``deploy.prepare``; where nobody leaves they are gated in two ways, by a GatedNet
over the prepared network and by its own method ``gated``.

``overhead_percent`` is the time of the gated network beyond the ungated one's, the median over rounds in which both
took their turn; ``overhead_interval`` the notch around it, 1.57 * (quartile range) / sqrt(rounds) to each side, which
is about a 95 % interval of a median (McGill, Tukey and Larsen, The American Statistician 32, 1978).
``goal_percent`` stands where there is a goal. benchmarks/gated_tables.py makes a table of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.deploy import PreparedNet, prepare
from aep_ext.inference.backends import missing
from aep_ext.surgery import networks
from aep_ext.termination import GatedNet

PREPARED = "_prepared"
PIXELS = {"resnet_small": 32, "resnet50": 224, "mobilenet_v3_small": 224}
GOALS = {("resnet50", 1): 1.0, (f"mobilenet_v3_small{PREPARED}", 1): 3.0}  # percent, where nobody leaves
SIZES = (1, 8, 64)


def case(name: str, rows: int) -> Any:
    marks = [pytest.mark.quick] if name.startswith("resnet_small") and rows != 8 else []
    if name.startswith("resnet50") and rows == 64:
        marks.append(pytest.mark.matrix)  # seconds for each call
    return pytest.param(name, rows, marks=marks, id=f"{name}-{rows}")


CASES = [case(name, rows) for name in ("resnet_small", "resnet50") for rows in SIZES]
CASES += [case(name + PREPARED, rows) for name in ("resnet_small", "mobilenet_v3_small") for rows in SIZES]
BATCHES = [entry for entry in CASES if entry.values[1] > 1]


@functools.cache  # preparing takes seconds
def _network(name: str, rows: int, device: str) -> tuple[MultiExitNet | PreparedNet, Tensor]:
    backbone = name.removesuffix(PREPARED)
    if name.endswith(PREPARED) and device != "cpu":
        pytest.skip("the engines run on the CPU")
    if name.endswith(PREPARED) and missing("openvino") and missing("onnxruntime"):
        pytest.skip(f"{missing('openvino')}; {missing('onnxruntime')}")
    if backbone != "resnet_small":
        pytest.importorskip("torchvision", reason="its backbone is torchvision's")
    net = networks.build(backbone, 10, weights=None)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    pixels = PIXELS[backbone]
    net, x = net.eval().to(device), torch.randn(rows, 3, pixels, pixels, device=device)
    return (prepare(net, x) if name.endswith(PREPARED) else net), x


def _for_its_cost(function: Callable[[], object], answer: Tensor) -> Callable[[], Tensor]:
    """Calls ``function`` and returns ``answer``: for one that answers otherwise, since nobody leaves it early."""

    def call() -> Tensor:
        function()
        return answer

    return call


def _first_confidences(net: MultiExitNet | PreparedNet, x: Tensor) -> Tensor:
    """Sorted, of all samples at the first exit."""
    return torch.softmax(net.exit_logits(x)[0], -1).amax(-1).sort().values


def _between(values: Tensor, leaving: int) -> float:
    """A threshold that the ``leaving`` largest of the sorted values reach, midway: no rounding decides."""
    middle = len(values) - leaving
    return float(values[middle - 1 : middle + 1].mean())


def _about(info: dict[str, Any], name: str, rows: int, net: MultiExitNet | PreparedNet) -> None:
    """What the case is of: the table in benchmarks/gated_tables.py has a row for each."""
    backbone = name.removesuffix(PREPARED)
    info |= {"network": backbone, "pixels": PIXELS[backbone], "batch": rows}
    info["engine"] = "eager" if isinstance(net, MultiExitNet) else net.backend


def _overhead(info: dict[str, Any], goal: float | None = None) -> None:
    """What the race says of the gated network against the ungated one."""
    if "paired_ratio_ungated" not in info:  # --benchmark-disable
        return
    ratio = info["paired_ratio_ungated"]
    notch = 1.57 * info["iqr_ungated"] / math.sqrt(info["rounds"])
    info["overhead_percent"] = 100 * (1 / ratio - 1)
    upper = 100 * (1 / (ratio - notch) - 1) if ratio > notch else None  # None: the rounds say nothing
    info["overhead_interval"] = [100 * (1 / (ratio + notch) - 1), upper]
    if goal is not None:
        info["goal_percent"] = goal
        info["goal_met"] = bool(info["overhead_percent"] <= goal)


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_nobody_leaves(race, benchmark, device, name, rows):
    """The cost of the gates: every sample goes to the last exit. ratio_ungated is 1 / (1 + overhead)."""
    net, x = _network(name, rows, device)
    _about(benchmark.extra_info, name, rows, net)
    gated = GatedNet(net, "confidence", 2.0)
    race(lambda: gated(x).logits, {"ungated": lambda: net(x)})
    _overhead(benchmark.extra_info, GOALS.get((name, rows)))


@pytest.mark.parametrize("name, rows", [entry for entry in CASES if entry.values[0].endswith(PREPARED)])
@torch.no_grad()
def test_gated_nobody_leaves_by_method(race, benchmark, name, rows):
    """The same by the prepared network's own method, its gates being checked beforehand."""
    net, x = _network(name, rows, "cpu")
    _about(benchmark.extra_info, name, rows, net)
    gates = net.gates("confidence", 2.0)
    race(lambda: net.gated(x, gates).logits, {"ungated": lambda: net(x)})
    _overhead(benchmark.extra_info, GOALS.get((name, rows)))


@pytest.mark.parametrize("name, rows", BATCHES)
@torch.no_grad()
def test_gated_few_leave(race, benchmark, device, name, rows):
    """One of eight, or one of 64, leaves at the first exit: mode "auto" by measured costs, and cut down always.

    Where cutting down does not pay, "auto" must cost no more beyond the ungated network than the gates alone, the rival
    ``nobody``.
    """
    net, x = _network(name, rows, device)
    _about(benchmark.extra_info, name, rows, net)
    threshold = _between(_first_confidences(net, x), 1)
    only_first = [e == 0 for e in range(net.num_exits - 1)]
    auto, compact = (GatedNet(net, "confidence", threshold, enabled=only_first, mode=m) for m in ("auto", "compact"))
    nobody = GatedNet(net, "confidence", 2.0, enabled=only_first, mode="mask")
    costs = auto.measure(x)
    opened = auto.live[0] and auto.gates_at(rows)
    benchmark.extra_info["auto_gates"] = opened
    benchmark.extra_info["auto_cuts_down"] = opened and costs.compacts(0, rows, rows - 1)
    answer = auto(x).logits
    race(
        lambda: auto(x).logits,
        {
            "compact": (lambda: compact(x).logits) if opened else _for_its_cost(lambda: compact(x), answer),
            "nobody": _for_its_cost(lambda: nobody(x), answer),
            "ungated": _for_its_cost(lambda: net(x), answer),
        },
    )
    _overhead(benchmark.extra_info)


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_all_leave_at_the_first_exit(race, benchmark, device, name, rows):
    """Against the bare stage and head, which decide nothing, and for comparison the whole network."""
    net, x = _network(name, rows, device)
    _about(benchmark.extra_info, name, rows, net)
    gated, weight = GatedNet(net, "confidence", 0.0), float(net.output_weights[0])
    answer = gated(x).logits

    def bare() -> Tensor:
        if isinstance(net, PreparedNet):
            return net.stages[0](x)[1] * weight  # copies the features, which the walk does not
        return net.exits[0](net.stages[0](x)) * weight

    race(
        lambda: gated(x).logits,
        {"stage_and_head": bare, "ungated": _for_its_cost(lambda: net(x), answer)},
    )


@pytest.mark.parametrize("name, rows", BATCHES)
@torch.no_grad()
def test_gated_half_leave_at_the_first_exit(race, benchmark, device, name, rows):
    """Compacted, against carrying all on, a loop as a user writes it, and for comparison the whole network."""
    net, x = _network(name, rows, device)
    _about(benchmark.extra_info, name, rows, net)
    threshold = _between(_first_confidences(net, x), rows // 2)
    only_first = [e == 0 for e in range(net.num_exits - 1)]
    compact, mask = (GatedNet(net, "confidence", threshold, enabled=only_first, mode=m) for m in ("compact", "mask"))
    weights = net.output_weights.tolist()

    def unit(e: int, features: Tensor) -> tuple[Tensor | None, Tensor]:
        if isinstance(net, PreparedNet):
            return net.stages[e](features)
        features = net.stages[e](features)
        return features, net.exits[e](features)

    def naive() -> Tensor:
        answers = torch.empty(rows, 10, device=device)
        features, running, there = x, 0.0, torch.arange(rows, device=device)
        for e in range(net.num_exits):
            features, logits = unit(e, features)
            running = running + weights[e] * logits
            if e == 0:
                leaves = torch.softmax(running / weights[0], -1).amax(-1) >= threshold
                answers[there[leaves]] = running[leaves]
                features, running, there = features[~leaves], running[~leaves], there[~leaves]
        answers[there] = running
        return answers

    answer = compact(x).logits
    race(
        lambda: compact(x).logits,
        {"mask": lambda: mask(x).logits, "naive": naive, "ungated": _for_its_cost(lambda: net(x), answer)},
    )
