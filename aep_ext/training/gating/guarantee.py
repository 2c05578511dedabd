"""A guaranteed gate: a path fixed on some images, tested on others, against the pruned ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from aep_ext.calibration.table import GateTable
from aep_ext.termination import ExitCache, ThresholdCurve, learn_then_test

STEPS = 100


@dataclass(frozen=True)
class PathTest:
    """What became of the test.

    Attributes:
        step: the curve's entry that is taken, or None where not even the most careful step holds.
        accepted, tested: how many steps hold, how many were tested.
        drop: points lost on the images of the test, at the step.
        cost: mean multiply-adds there.
        n: images of the test.
        epsilon, delta: what was asked.
        text: the promise, or why there is none.
    """

    step: int | None
    accepted: int
    tested: int
    drop: float
    cost: float
    n: int
    epsilon: float
    delta: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "accepted": self.accepted,
            "tested": self.tested,
            "test": {"n": self.n, "drop_points": self.drop, "mean_macs": self.cost},
            "epsilon": self.epsilon,
            "delta": self.delta,
            "text": self.text,
        }


def guaranteed(
    curve: ThresholdCurve,
    cache: ExitCache,
    reference: Tensor,
    costs: Sequence[float],
    epsilon: float,
    delta: float,
) -> PathTest:
    """The cheapest step of a curve whose loss of top-1 against the pruned ensemble is at most ``epsilon``, with
    probability 1 - delta over the images of the test (:func:`aep_ext.termination.learn_then_test`).

    The path leads from the curve's most accurate point to its cheapest. An image's loss is 1 where only the pruned
    ensemble is right, -1 where only the gated network is, else 0.

    Args:
        curve: made from other images.
        cache: exit logits of the curve's exits on the N images of the test.
        reference: (N,) bool, whether the pruned ensemble is right there.
        costs: of a sample answered at each exit.
    """
    path = np.unique(np.linspace(0, len(curve) - 1, STEPS).round().astype(int))[::-1]
    table = GateTable.of(cache.logits, cache.weights, cache.target, curve.policy, curve.temperatures)
    taken = np.stack(
        [table.leaving(curve.thresholds[i].double().numpy(), curve.enabled[i].numpy()) for i in path.tolist()]
    )
    n = len(cache)
    losses = reference.numpy().astype(np.int8) - table.right[taken, np.arange(n)].astype(np.int8)
    test = learn_then_test(losses, epsilon, delta)
    means = np.asarray(costs, dtype=np.float64)[taken].mean(axis=1)
    if not test.accepted:
        text = (
            f"no step of the path can be shown to lose at most {100 * epsilon:g} points against the pruned ensemble "
            f"with {n} images"
        )
        return PathTest(None, 0, test.tested, 100 * float(losses[0].mean()), float(means[0]), n, epsilon, delta, text)
    best = int(np.argmin(means[: test.accepted]))
    text = (
        f"the loss of top-1 accuracy against the pruned ensemble is at most {100 * epsilon:g} points with probability "
        f"{1 - delta:g} over the calibration images (learn-then-test, fixed sequence, {test.method}, {n} images)"
    )
    return PathTest(
        int(path[best]),
        test.accepted,
        test.tested,
        100 * float(losses[best].mean()),
        float(means[best]),
        n,
        epsilon,
        delta,
        text,
    )
