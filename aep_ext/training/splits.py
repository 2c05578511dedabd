"""Seeded splits into train, val and test images, class weights, and the published experiment's data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PUBLISHED_SEED = 420
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))


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


@dataclass(frozen=True)
class PublishedData:
    """One data set as the paper used it (arXiv 2301.12168, published code).

    ``total`` images are permuted under seed 420 and cut into ``train`` and ``val``, and into ``test`` too where the set
    has no official test images. ``mean`` and ``std`` are per channel, of values within 0..1. ``weighted``: the training
    loss weights the classes by n / (K * count), counted over all ``total`` images.
    """

    name: str
    num_classes: int
    channels: int
    total: int
    train: int
    val: int
    test: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weighted: bool = False

    @property
    def official_test(self) -> bool:
        """True where the test images are a set of their own."""
        return self.train + self.val + self.test > self.total

    def split(self) -> list[Tensor]:
        """The index tensors of train and val, and of test where it is cut from the same images."""
        sizes = [self.train, self.val] if self.official_test else [self.train, self.val, self.test]
        return seeded_split(self.total, sizes, PUBLISHED_SEED)


PUBLISHED: dict[str, PublishedData] = {
    data.name: data
    for data in (
        PublishedData("cifar10", 10, 3, 50000, 45000, 5000, 10000, *_CIFAR),
        PublishedData("cifar100", 100, 3, 50000, 45000, 5000, 10000, *_CIFAR),
        PublishedData(
            "tiny_imagenet", 200, 3, 100000, 90000, 10000, 10000, (0.4802, 0.4481, 0.3975), (0.277, 0.2691, 0.2821)
        ),
        PublishedData("fashionmnist", 10, 1, 60000, 51000, 9000, 10000, (0.5,), (0.5,)),
        PublishedData("eurosat", 10, 3, 27000, 17500, 4000, 5500, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), weighted=True),
        PublishedData(
            "gtsrb", 43, 3, 26640, 20640, 6000, 12630, (0.3337, 0.3064, 0.3171), (0.2672, 0.2564, 0.2629), weighted=True
        ),
    )
}
