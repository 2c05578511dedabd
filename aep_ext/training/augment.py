"""Augmentation of whole batches of training images, without Python per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def augmented(images: Tensor, names: Sequence[str], generator: Generator | None = None) -> Tensor:
    """Images after augmentation, each with its own random parameters.

    Args:
        images: (N, C, H, W), float or uint8, on any device.
        names: of :class:`~aep_ext.training.Recipe`'s augmentations, done in this order.
        generator: on the CPU, of which the parameters are drawn; None: torch's own.

    Returns:
        (N, C, H, W) of the same dtype; ``images`` itself where there are no names.
    """
    for name in names:
        images = _AUGMENTATIONS[name](images, generator)
    return images


def each_transformed(
    images: Sequence[Tensor] | Tensor, transform: Callable[[Tensor], Tensor], seed: int
) -> list[Tensor]:
    """Each image by itself through a transform; its draws from torch's generator depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [transform(image) for image in images]


def mixed(images: Tensor, target: Tensor, alpha: float, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
    """Each image and its label mixed with the one before it in the batch (mixup, arXiv 1710.09412).

    Args:
        images: (N, C, H, W), floating.
        target: (N, K), floating, probabilities.
        alpha: greater than 0: the share of the image itself is drawn, once, from Beta(alpha, alpha).
        generator: as for :func:`augmented`.

    Returns:
        ``share * images + (1 - share) * images.roll(1, 0)``, and so the targets.
    """
    seed = int(torch.randint(1 << 62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    return images.roll(1, 0).lerp(images, share), target.roll(1, 0).lerp(target, share)


def _flip(images: Tensor, generator: Generator | None) -> Tensor:
    """Half of the images, left and right changed."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen.to(images.device), images.flip(-1), images)


def _shifted(images: Tensor, generator: Generator | None, share: int, mode: str) -> Tensor:
    """Images moved by up to a share of the shorter side in both directions."""
    height, width = images.shape[-2:]
    most = max(1, round(min(height, width) / share))
    down, right = torch.randint(2 * most + 1, (2, len(images)), generator=generator).to(images.device)
    windows = F.pad(images, (most,) * 4, mode=mode).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


def _cutout(images: Tensor, generator: Generator | None) -> Tensor:
    """A square of half the shorter side set to 0, its centre anywhere in the image (arXiv 1708.04552)."""
    height, width = images.shape[-2:]
    side = max(1, min(height, width) // 2)
    inside = []
    for length in (height, width):
        first = torch.randint(length, (len(images), 1), generator=generator) - side // 2
        place = torch.arange(length)
        inside.append((place >= first) & (place < first + side))
    cut = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)
    return images.masked_fill(cut, 0)


_AUGMENTATIONS: dict[str, Callable[[Tensor, Generator | None], Tensor]] = {
    "flip": _flip,
    "translate": lambda images, generator: _shifted(images, generator, 16, "reflect"),
    "crop": lambda images, generator: _shifted(images, generator, 8, "constant"),
    "cutout": _cutout,
}
