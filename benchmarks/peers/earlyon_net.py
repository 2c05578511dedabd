"""A trained :class:`MultiExitNet` as a model of earlyon 0.3, by its public names.

The stages become the children of an ``nn.Sequential``, the form that earlyon can both wrap and cut into stages; the
last exit's head is its last child and so earlyon's final classifier. The other heads go to ``EarlyExitWrapper`` as they
are: it takes any module. (``custom_ee`` would put heads of two linear layers in their place, which the trained ones do
not fit.) All parts are copies: earlyon hangs hooks on them.

earlyon has three ways to answer:

- ``wrapper(x)``, batch 1: hooks on the backbone, left by an exception;
- ``staged_model(wrapper).infer(x)``, batch 1: stage after stage;
- ``wrapper.forward_inference_batched(x)``: a batch leaves as one, where its least sure sample may.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from aep_ext import MultiExitNet
from aep_ext.pruning.cost import subset_costs

BATCH = 256
FINE_GRID = tuple(round(1 - k / 400, 4) for k in range(1, 281))  # 0.9975 down to 0.3: its own has nine values


def wrap(net: MultiExitNet, shape: tuple[int, int, int]) -> Any:
    """An ``EarlyExitWrapper`` of copies of a network's stages and heads, in eval mode.

    Args:
        net: two exits at least.
        shape: (C, H, W) of an image.

    Raises:
        ValueError: one exit alone.
        ImportError: earlyon is not installed.
    """
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    if net.num_exits < 2:
        raise ValueError(f"wrap: net must have at least two exits, got {net.num_exits}")
    stages, heads = copy.deepcopy(net.stages), copy.deepcopy(net.exits)
    children = OrderedDict((f"stage{number}", stage) for number, stage in enumerate(stages))
    children["head"] = heads[-1]
    backbone = nn.Sequential(children)
    points = []
    with torch.no_grad():
        features = net.eval().features(torch.zeros(1, *shape))
    for e, stage in enumerate(net.exit_stages[:-1]):
        points.append(ExitPoint(f"exit{e}", f"stage{stage}", features[e].shape[1]))
    config = EarlyExitConfig(backbone="aep_ext", num_classes=net.num_classes, exit_points=points)
    early = {point.name: head for point, head in zip(points, heads, strict=False)}
    return EarlyExitWrapper(backbone, early, nn.Identity(), config, input_shape=(1, *shape)).eval()


def staged(wrapper: Any) -> Any:
    """earlyon's own cut into stages; it compares the two itself on an image of zeros."""
    from earlyon.staged import staged_model

    return staged_model(wrapper).eval()


def loader(x: Tensor, y: Tensor) -> DataLoader:
    """(x, y) batches, in order."""
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def check_logits(net: MultiExitNet, wrapper: Any, x: Tensor) -> float:
    """All exits' logits of both, on the same images: equal bit for bit where the network runs its heads as modules.

    Returns:
        The largest difference to the network's fused heads, whose pooling sums in another order.

    Raises:
        AssertionError: they are not equal.
    """
    with torch.inference_mode():
        theirs = torch.stack(wrapper(x, mode="training"))
        ours = net.exit_logits(x)
        fused, net.fused = net.fused, False
        try:
            plain = net.exit_logits(x)
        finally:
            net.fused = fused
    if not torch.equal(theirs, plain):
        raise AssertionError(f"earlyon's exit logits are not the network's: {float((theirs - plain).abs().max()):g}")
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    return float((theirs - ours).abs().max())


def check_paths(wrapper: Any, stages: Any, x: Tensor) -> list[int]:
    """The exits taken by its two ways at batch 1, which must be the same, as must the logits; the last exit is -1."""
    exits = []
    for one in x.split(1):
        a, b = wrapper(one, mode="inference"), stages.infer(one)
        if a.exit_taken != b.exit_taken or not torch.equal(a.prediction, b.prediction):
            raise AssertionError(f"earlyon's two ways differ: exits {a.exit_taken} and {b.exit_taken}")
        exits.append(a.exit_taken)
    return exits


def calibrate(wrapper: Any, temperatures: DataLoader, thresholds: DataLoader, drop: float) -> Any:
    """Its own calibration for an accuracy budget, by its own nine thresholds and by a fine grid of 280.

    The one of the two that needs less computation on the calibration images stays in ``wrapper.config``.

    Args:
        wrapper: changed.
        temperatures: images that its temperatures are fitted on.
        thresholds: images that its thresholds are searched on.
        drop: points of accuracy that may be lost against its final classifier.

    Returns:
        Its ``CalibrationResult``.
    """
    from earlyon.core.thresholds import calibrate_thresholds

    def found(grid: tuple[float, ...] | None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return calibrate_thresholds(
                wrapper,
                thresholds,
                target_accuracy_drop=drop / 100,
                grid=grid,
                fit_temperature=True,
                temperature_loader=temperatures,
            )

    coarse, fine = found(None), found(FINE_GRID)
    best = coarse if coarse.avg_computation_used < fine.avg_computation_used else fine
    config = wrapper.config
    config.confidence_thresholds, config.enabled_exits = list(best.thresholds), list(best.enabled_exits)
    config.temperatures = dict(best.temperatures)
    config.validate()
    return best


def exit_macs(net: MultiExitNet, shape: tuple[int, int, int], enabled: list[bool]) -> list[int]:
    """Multiply-adds of a sample that earlyon answers at each exit, by aep_ext's counter: E numbers.

    The backbone up to there with the heads of the enabled exits on the way: it runs no head of a disabled one.
    """
    macs = subset_costs(net, shape).macs
    masks = [sum(1 << i for i in range(e) if enabled[i]) | 1 << e for e in range(net.num_exits)]
    return [macs[mask - 1] for mask in masks]


@dataclass(frozen=True)
class Judged:
    """What earlyon's rule gives on some images.

    Attributes:
        top1: fraction right.
        final_top1: of its final classifier alone, that is of the backbone without exits.
        mean_macs, final_macs: multiply-adds of a sample, with exits and of the backbone with its classifier.
        exit_shares: E fractions of the images, by exit.
    """

    top1: float
    final_top1: float
    mean_macs: float
    final_macs: int
    exit_shares: list[float]


def judge(net: MultiExitNet, wrapper: Any, images: DataLoader, shape: tuple[int, int, int]) -> Judged:
    """Its rule on other images, by its own simulator.

    Args:
        net: what ``wrapper`` was made of.
        images: to report on.
        shape: (C, H, W).
    """
    from earlyon.core.thresholds import collect_head_logits, simulate_policy

    cache = collect_head_logits(wrapper, images, "cpu")
    found = simulate_policy(cache, wrapper)
    shares = shares_of(found.exit_distribution, net.num_exits)
    macs = exit_macs(net, shape, wrapper.config.enabled_exits)
    final = float((cache.logits[-1].argmax(-1) == cache.targets).double().mean())
    alone = exit_macs(net, shape, [False] * (net.num_exits - 1))[-1]
    mean = sum(share * cost for share, cost in zip(shares, macs, strict=True))
    return Judged(found.accuracy, final, mean, alone, shares)


def shares_of(distribution: dict[str, float], exits: int) -> list[float]:
    """earlyon's ``{"exit_0": 0.5, "final": 0.5}`` as a list of E fractions."""
    from earlyon.core.types import exit_label

    return [distribution.get(exit_label(e if e < exits - 1 else -1), 0.0) for e in range(exits)]


def judge_batched(
    net: MultiExitNet, wrapper: Any, x: Tensor, y: Tensor, rows: int, shape: tuple[int, int, int]
) -> dict[str, float]:
    """Its way for batches on all images, ``rows`` at a time: top-1 and mean multiply-adds."""
    macs = exit_macs(net, shape, wrapper.config.enabled_exits)
    right, spent = 0, 0
    for images, labels in zip(x.split(rows), y.split(rows), strict=True):
        found = wrapper.forward_inference_batched(images)
        right += int((found.predictions.argmax(-1) == labels).sum())
        spent += macs[found.exit_taken] * len(images)  # -1, its final classifier, is the last
    return {"top1": right / len(x), "mean_macs": spent / len(x)}
