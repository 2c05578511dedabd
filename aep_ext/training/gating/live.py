"""The gated network itself: made from a run's files, and held against the simulator on the test images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aep_ext.ensemble import ExitWeights
from aep_ext.pruning import prune
from aep_ext.surgery.multi_exit import MultiExitNet
from aep_ext.termination import ExitCache, GatedNet, GatedOutput, Simulation
from aep_ext.training.gating.figures import Gate

TOLERANCE = 1e-5
SINGLES = 256
"""So many test images are also answered one by one."""


def gated_network(full: MultiExitNet, gate: Gate) -> GatedNet:
    """The network of the gate's exits behind the gate, in eval mode; ``full`` is left as it is."""
    net = prune(full, gate.exits)
    net.set_exit_weights(ExitWeights(net.loss_weights, gate.weights))
    return GatedNet(net, gate.policy, gate.thresholds, gate.temperatures, gate.enabled).eval()


def _compared(live: GatedOutput, outcome: Simulation, near: Tensor) -> dict[str, Any]:
    """How often the two part, and where."""
    n = len(live.exit)
    exits, confidence = live.exit.cpu(), live.confidence.cpu().double()
    same = exits == outcome.exits[:n]
    differing = ~same | (live.logits.cpu().argmax(1) != outcome.predictions[:n])
    apart = (confidence - outcome.confidences[:n].double()).abs()[same]
    return {
        "n": n,
        "differing": int(differing.sum()),
        "near_threshold": int(near[:n].sum()),
        "differing_elsewhere": int((differing & ~near[:n]).sum()),
        "tolerance": TOLERANCE,
        "max_confidence_difference": float(apart.max()) if len(apart) else 0.0,
    }


def agreement(
    gated: GatedNet, loader: Iterable[Any], cache: ExitCache, outcome: Simulation, device: torch.device
) -> dict[str, Any]:
    """Executor against simulator, in the loader's batches, and on the first images one by one (under ``single``).

    ``near_threshold`` counts the samples that pass within the tolerance of a threshold: batches of another shape, or
    another device, round the last bits otherwise, and there, but nowhere else, the two may part.

    Args:
        loader: batches of the test images, in the order of ``cache``.
        cache: exit logits of the gate's exits, from the run.
        outcome: the simulator's answers on it.
    """
    near = gated.near_threshold(cache.logits, TOLERANCE)
    gated.to(device)
    outputs, first, held = [], [], 0
    with torch.inference_mode():
        for images, _ in loader:
            if held < SINGLES:
                first.append(images[: SINGLES - held])
                held += len(first[-1])
            outputs.append(gated(images.to(device)))
        singles = [gated(image[None].to(device)) for images in first for image in images]
    gated.cpu()
    joined, alone = (
        GatedOutput(*(torch.cat(column) for column in zip(*some, strict=True))) for some in (outputs, singles)
    )
    return {**_compared(joined, outcome, near), "single": _compared(alone, outcome, near)}
