"""Gated networks: what the gates cost where nobody leaves, and what leaving saves. One thread unless asked otherwise.

The networks are not trained: what is timed depends on how many leave, and that the thresholds settle.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.surgery import networks
from aep_ext.termination import GatedNet

QUICK = pytest.mark.quick
PIXELS = {"resnet_small": 32, "resnet50": 224}


def case(name: str, rows: int) -> object:
    quick = name == "resnet_small"
    return pytest.param(name, rows, marks=QUICK if quick else (), id=f"{name}-{rows}")


CASES = [case("resnet_small", 1), case("resnet_small", 64), case("resnet50", 1), case("resnet50", 64)]


def _network(name: str, rows: int, device: str) -> tuple[MultiExitNet, Tensor]:
    if name == "resnet50":
        pytest.importorskip("torchvision", reason="its backbone is torchvision's")
    net = networks.build(name, 10, weights=None)
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    pixels = PIXELS[name]
    return net.eval().to(device), torch.randn(rows, 3, pixels, pixels, device=device)


def _for_its_cost(function: Callable[[], object], answer: Tensor) -> Callable[[], Tensor]:
    """Calls ``function`` and returns ``answer``: for one that answers otherwise, since nobody leaves it early."""

    def call() -> Tensor:
        function()
        return answer

    return call


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_nobody_leaves(race, device, name, rows):
    """The cost of the gates: every sample goes to the last exit. ratio_ungated is 1 / (1 + overhead)."""
    net, x = _network(name, rows, device)
    gated = GatedNet(net, "confidence", 2.0)
    race(lambda: gated(x).logits, {"ungated": lambda: net(x)})


@pytest.mark.parametrize("name, rows", CASES)
@torch.no_grad()
def test_gated_all_leave_at_the_first_exit(race, device, name, rows):
    """Against the bare stage and head, which decide nothing, and for comparison the whole network."""
    net, x = _network(name, rows, device)
    gated, weight = GatedNet(net, "confidence", 0.0), float(net.output_weights[0])
    answer = gated(x).logits
    race(
        lambda: gated(x).logits,
        {
            "stage_and_head": lambda: net.exits[0](net.stages[0](x)) * weight,
            "ungated": _for_its_cost(lambda: net(x), answer),
        },
    )


@pytest.mark.parametrize("name, rows", [entry for entry in CASES if entry.values[1] > 1])
@torch.no_grad()
def test_gated_half_leave_at_the_first_exit(race, device, name, rows):
    """Compacted, against carrying all on, a loop as a user writes it, and for comparison the whole network."""
    net, x = _network(name, rows, device)
    first = torch.softmax(net.exit_logits(x)[0], -1).amax(-1).sort().values
    threshold = float(first[rows // 2 - 1 : rows // 2 + 1].mean())  # between two rows: no rounding decides
    only_first = [e == 0 for e in range(net.num_exits - 1)]
    compact, mask = (GatedNet(net, "confidence", threshold, enabled=only_first, mode=m) for m in ("compact", "mask"))
    weights = net.output_weights.tolist()

    def naive() -> Tensor:
        answers = torch.empty(rows, 10, device=device)
        features, running, there = x, 0.0, torch.arange(rows, device=device)
        for e, (stage, head) in enumerate(zip(net.stages, net.exits, strict=True)):
            features = stage(features)
            running = running + weights[e] * head(features)
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
