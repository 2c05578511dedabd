"""One image through gates: aep_ext's and earlyon's, which take the same exits. Then the same of a batch.

The network is not trained and what is timed depends on where images leave, so the thresholds settle that: a third of
them leave at each of the first two exits. Both judge each exit's own answer here (earlyon knows no ensemble), so that
they can be compared image by image. ``python -m benchmarks.peers.earlyon`` compares trained networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aep_ext import ExitWeights, MultiExitNet
from aep_ext.surgery import networks
from aep_ext.termination import Confidence, GatedNet

pytest.importorskip("earlyon", reason="the peer: pip install earlyon")

from benchmarks.peers import earlyon_net as peer

SHAPE, IMAGES = (3, 32, 32), 60


def _middle(values: Tensor, leaving: int) -> float:
    """Between the numbers of which ``leaving`` are larger: no rounding decides."""
    ordered = values.sort(descending=True).values
    return float(ordered[leaving - 1 : leaving + 1].double().mean())


def _network() -> tuple[MultiExitNet, Tensor, list[float]]:
    torch.manual_seed(0)
    net = networks.build("resnet_small", 10, weights=None).eval()
    net.set_exit_weights(ExitWeights.mixed(net.num_exits))
    x = torch.randn(IMAGES, *SHAPE)
    sure = torch.softmax(net.exit_logits(x), -1).amax(-1)
    first = _middle(sure[0], IMAGES // 3)
    stay = sure[0] < first
    return net, x, [first, _middle(sure[1][stay], IMAGES // 3), 1.0]


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.quick), IMAGES])
@torch.no_grad()
def test_earlyon(race, rows):
    """Batch 1: twelve images one by one, by its two ways. All as a batch: by aep_ext, and one by one by earlyon, whose
    way for batches lets a batch leave only as a whole."""
    net, x, thresholds = _network()
    gated = GatedNet(net, Confidence("exit"), thresholds)
    gated.measure(x[:rows])
    wrapper = peer.wrap(net, SHAPE)
    wrapper.config.confidence_thresholds = thresholds
    stages = peer.staged(wrapper)
    peer.check_logits(net, wrapper, x)

    def one_by_one(answer: Callable[[Tensor], object]) -> Callable[[Tensor], list[object]]:
        return lambda images: [answer(one) for one in images.split(1)]

    def exits(result: Any) -> Tensor:
        """Where the images left, from any contestant's answer; earlyon's -1 is the last exit."""
        if isinstance(result, list):
            return torch.cat([exits(one) for one in result])
        taken = getattr(result, "exit_taken", None)
        return result.exit if taken is None else torch.tensor([taken % net.num_exits])

    race(
        gated if rows > 1 else one_by_one(gated),
        {"earlyon_wrapper": one_by_one(wrapper), "earlyon_staged": one_by_one(stages.infer)},
        inputs=[(part,) for part in x.split(rows if rows > 1 else 12)],
        comparable=exits,
    )
