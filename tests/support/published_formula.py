"""The data that the published figures were computed on: numbers made by a formula (tests/golden/published.json)."""

from __future__ import annotations

import numpy as np
import torch


def fmix(h: np.ndarray) -> np.ndarray:
    """murmur3's 32-bit finaliser, elementwise."""
    h = h.astype(np.uint32)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def uniform(seed: int, i: np.ndarray) -> np.ndarray:
    """u(seed, i) within [-2, 2), a multiple of 2^-20."""
    key = (i.astype(np.uint64) * np.uint64(2654435761) + np.uint64(seed) * np.uint64(40503)) % np.uint64(1 << 32)
    return (fmix(key) >> np.uint32(10)).astype(np.float64) * 2.0**-20 - 2.0


def formula_data(exits: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (E, N, K) float32, exact (every value is a small multiple of 2^-20), and labels (N,) int64."""
    n = np.arange(samples, dtype=np.uint64)
    label = (fmix(n + np.uint64(12345)) % np.uint32(classes)).astype(np.int64)
    logits = np.empty((exits, samples, classes))
    for e in range(exits):
        logits[e] = uniform(1000 + e, np.arange(samples * classes)).reshape(samples, classes)
        lifted = fmix(n * np.uint64(131) + np.uint64(7 * e + 99)) % np.uint32(100) < 40 + 8 * e
        logits[e, lifted, label[lifted]] += 1 + 0.25 * e
    return torch.from_numpy(logits.astype(np.float32)), torch.from_numpy(label)
