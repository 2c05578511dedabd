"""Seeded splits into train, val and test images, and class weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

PUBLISHED_SEED = 420


def seeded_split(total: int, sizes: Sequence[int], seed: int = PUBLISHED_SEED) -> list[Tensor]:
    """Cut one random permutation of ``range(total)`` into consecutive parts.

    Args:
        total: number of samples.
        sizes: length of every part, in order (train, val, test); they need not use up all samples.
        seed: of a generator of its own; the global random state is neither read nor changed.

    Returns:
        One int64 index tensor per size.

    Raises:
        ValueError: a size is negative, or together they exceed ``total``.

    Equivalent to ``torch.randperm(total, generator=torch.Generator().manual_seed(seed)).split(sizes)``. With seed 420
    it gives the published experiment's splits (arXiv 2301.12168, published code).
    """
    if any(size < 0 for size in sizes) or sum(sizes) > total:
        raise ValueError(f"seeded_split: sizes must be non-negative and sum to at most {total}, got {list(sizes)}")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return [part.clone() for part in order[: sum(sizes)].split(list(sizes))]


def split_sha256(indices: Tensor) -> str:
    """SHA-256 of an index tensor's int64 numbers, in order: two splits with the same hash are the same split."""
    return hashlib.sha256(indices.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """How many samples each class has: int64 (K,) from int64 labels (N,)."""
    return torch.bincount(labels, minlength=num_classes)


def class_weights(counts: Sequence[int] | Tensor) -> Tensor:
    """Weights that let every class count the same: ``n / (K * count)``, as float32 (K,).

    Args:
        counts: how many samples each of the K classes has.

    Raises:
        ValueError: a class has no sample.
    """
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.dim() != 1 or len(counts) == 0 or bool((counts <= 0).any()):
        raise ValueError(f"class_weights: every class must have at least one sample, got counts {counts.tolist()}")
    return (counts.sum() / (len(counts) * counts)).float()
