"""Exit logits of an imagined network: easy samples are clear early, the others become clear later, or never."""

from __future__ import annotations

import torch
from torch import Tensor

from aep_ext.calibration import CachedLogits


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


def cached_logits(exits: int, samples: int, classes: int = 5, seed: int = 0, role: str = "val") -> CachedLogits:
    """The same as :class:`CachedLogits`."""
    return CachedLogits(*logits_and_labels(exits, samples, classes, seed), role=role)


def ascending(exits: int) -> list[float]:
    """Output weights 1, 2, ... divided by their sum."""
    total = exits * (exits + 1) / 2
    return [(e + 1) / total for e in range(exits)]


def subset_macs(exits: int) -> list[float]:
    """Cost of every subset, by mask: the backbone up to its last exit, and 10,000 for each head."""
    masks = [[e for e in range(exits) if mask >> e & 1] for mask in range(1, 1 << exits)]
    return [1e6 * (1 + 0.7 * max(kept)) + 1e4 * len(kept) for kept in masks]
