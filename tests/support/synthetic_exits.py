"""Exit logits of an imagined network: easy samples are clear early, the others become clear later, or never."""

from __future__ import annotations

import torch
from torch import Tensor

from aep_ext.termination import ExitCache


def logits_and_labels(exits: int, samples: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(E, N, K) float32 and (N,) int64."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (samples,), generator=generator)
    hardness = torch.rand(samples, generator=generator)
    shared = torch.randn(samples, classes, generator=generator)
    rows = []
    for e in range(exits):
        z = 0.8 * shared + 0.7 * torch.randn(samples, classes, generator=generator)
        z[torch.arange(samples), target] += (1.0 + 3.5 * (e + 1) / exits) * (1.6 - 1.7 * hardness)
        rows.append(1.5 * z)
    return torch.stack(rows), target


def cache_of(exits: int, samples: int, classes: int = 5, seed: int = 0, role: str = "calibration") -> ExitCache:
    """A cache of them, with ascending weights."""
    logits, target = logits_and_labels(exits, samples, classes, seed)
    return ExitCache.from_logits(logits, target, torch.arange(1.0, exits + 1) / exits, role=role)
