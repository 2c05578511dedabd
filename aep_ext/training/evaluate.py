"""Score a trained network on one of the data roles, and time networks against one another."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext.pruning import measure_latency, subset_correctness
from aep_ext.surgery.multi_exit import MultiExitNet

LATENCY_ROUNDS = 7
LATENCY_REPEATS = 20


def torch_device(name: str) -> torch.device:
    """The device behind ``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def collect(net: MultiExitNet, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Exit logits (E, N, K) float32 and labels (N,) int64 of all images of a loader, on the CPU; the network in eval
    mode."""
    logits, labels = [], []
    net.to(device).eval()
    with torch.inference_mode():
        for images, target in loader:
            logits.append(net.exit_logits(images.to(device)).float().cpu())
            labels.append(target)
    net.cpu()
    return torch.cat(logits, dim=1).clone(), torch.cat(labels).clone()


def right_answers(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each row of ``logits`` (N, K) is right at top-1: bool (N,)."""
    return subset_correctness(logits[None], [1.0], target)[0]


def accuracy(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """Counts and fractions right at top-1 and top-min(5, K) of ``logits`` (N, K)."""
    correct1, correct5 = ops.subset_correct(logits[None].contiguous(), torch.ones(1), target)[0].tolist()
    n = len(target)
    return {"n": n, "correct1": correct1, "correct5": correct5, "top1": correct1 / n, "top5": correct5 / n}


def ensemble_of(net: MultiExitNet, exit_logits: Tensor) -> Tensor:
    """What ``net`` answers from its exit logits: (N, K)."""
    return ops.ensemble(exit_logits, net.output_weights)


def latency_in_turn(
    nets: dict[str, MultiExitNet],
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    rounds: int = LATENCY_ROUNDS,
    repeats: int = LATENCY_REPEATS,
) -> dict[str, dict[str, float]]:
    """Latency at batch 1 in milliseconds, the networks taking turns, so that a machine's mood strikes all of them
    alike.

    Returns:
        For each name ``median`` and ``p95`` (medians over the rounds), ``ratio`` (the median over the rounds of this
        network's median over the first one's in the same round) and the number of ``rounds`` and ``repeats``.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
    for net in nets.values():
        net.to(device).eval()
    for _ in range(rounds):
        for name, net in nets.items():
            latency = measure_latency(net, shape, warmup=3, repeats=repeats)
            times[name].append((latency.median, latency.p95))
    first = next(iter(nets))
    return {
        name: {
            "median": statistics.median(m for m, _ in taken),
            "p95": statistics.median(p for _, p in taken),
            "ratio": statistics.median(m / base for (m, _), (base, _) in zip(taken, times[first], strict=True)),
            "rounds": rounds,
            "repeats": repeats,
        }
        for name, taken in times.items()
    }
