"""The published experiment's data sets: sizes of the splits, normalisation, class weighting (arXiv 2301.12168,
published code)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from aep_ext.training.splits import PUBLISHED_SEED, seeded_split

_CIFAR = ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))


@dataclass(frozen=True)
class PublishedData:
    """One data set as the paper used it.

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
