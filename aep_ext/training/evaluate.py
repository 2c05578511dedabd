"""What stored exit logits and live networks say of a model: right answers, accuracy, latency beside the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext.pruning import subset_correctness
from aep_ext.training.timing import Key, device_wait, draw_batches, latency, ratio_of_sums, time_in_turn

SECONDS_A_NETWORK = 1.0
LATENCY_IMAGES = 256


def torch_device(name: str) -> torch.device:
    """The device behind ``auto``, ``cpu``, ``cuda`` or ``cuda:1``."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def right_answers(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each row of ``logits`` (N, K) is right at top-1: bool (N,)."""
    return subset_correctness(logits[None], [1.0], target)[0]


def accuracy(logits: Tensor, target: Tensor) -> dict[str, Any]:
    """Counts and fractions right at top-1 and top-min(5, K) of ``logits`` (N, K)."""
    correct1, correct5 = ops.subset_correct(logits[None].contiguous(), torch.ones(1), target)[0].tolist()
    n = len(target)
    return {"n": n, "correct1": correct1, "correct5": correct5, "top1": correct1 / n, "top5": correct5 / n}


def latency_beside(nets: Mapping[Key, nn.Module], images: Tensor, device: torch.device) -> dict[Key, dict[str, float]]:
    """Latency at batch 1 over the images, the networks taking turns.

    Args:
        nets: by name, in eval mode; the first is the one that the others are compared with.
        images: (n, C, H, W); 256 of them are used.

    Returns:
        For each name ``mean``, ``median`` and ``p95`` in milliseconds, and ``ratio``, its time for all images over that
        of the first network.
    """
    calls = {name: net.to(device).eval() for name, net in nets.items()}
    order = torch.cat(draw_batches(len(images), 1))[:LATENCY_IMAGES]
    batches = [images[row : row + 1].to(device) for row in order.tolist()]
    with torch.inference_mode():
        times = time_in_turn(calls, batches, SECONDS_A_NETWORK * len(calls), wait=device_wait(device))
    for net in nets.values():
        net.cpu()
    first = times[next(iter(nets))].typical()
    calls_ms = {name: latency(taken, 1) for name, taken in times.items()}
    return {
        name: {
            "mean": 1e3 * float(taken.typical().mean()),
            "median": calls_ms[name]["p50_ms"],
            "p95": calls_ms[name]["p95_ms"],
            "ratio": ratio_of_sums(taken.typical(), first)[0],
        }
        for name, taken in times.items()
    }
