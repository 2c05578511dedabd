"""Images as tensors: resized once, kept in memory as bytes, normalised batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aep_ext._utils import require
from aep_ext.training.sources import Source

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 2 << 30


def decode(image: Image.Image, size: int, channels: int) -> Tensor:
    """One image as uint8 (channels, size, size).

    Resized by Pillow's bicubic filter, which is antialiased: exactly what
    ``torchvision.transforms.Resize(interpolation=BICUBIC)`` does to a Pillow image, so that dividing the bytes by 255
    afterwards equals the published transforms.
    """
    pillow = require("PIL.Image", "train", "reading images")
    image = image.convert("L" if channels == 1 else "RGB").resize((size, size), pillow.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()


class ImageDataset(Dataset):
    """Some images of a source, as normalised float32 tensors (C, H, W) with int64 labels.

    Args:
        source: the images.
        indices: which of them, int64 (n,).
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean, std: one number per channel, of values within 0..1.
        cache_bytes: decoded images are kept in memory as bytes if they fit into so many; else every access decodes
            anew.

    Whole batches are made at once (``__getitems__``), so that a loader over cached images costs no Python per sample.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        *,
        size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"ImageDataset: mean and std must have {channels} entries, got {len(mean)} and {len(std)}")
        self.source, self.indices, self.size, self.channels = source, indices, size, channels
        self.labels = source.labels[indices]
        self.mean = torch.tensor(list(mean), dtype=torch.float32).view(1, channels, 1, 1)
        self.std = torch.tensor(list(std), dtype=torch.float32).view(1, channels, 1, 1)
        self._cache: Tensor | None = None
        if len(indices) * channels * size * size <= cache_bytes:
            self._cache = torch.empty((len(indices), channels, size, size), dtype=torch.uint8)
            for row, index in enumerate(indices.tolist()):
                self._cache[row] = decode(source.image(index), size, channels)

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Raw images, uint8 (len(rows), C, H, W)."""
        if self._cache is not None:
            return self._cache[torch.as_tensor(rows, dtype=torch.int64)]
        images = [decode(self.source.image(int(self.indices[row])), self.size, self.channels) for row in rows]
        return (
            torch.stack(images) if images else torch.empty((0, self.channels, self.size, self.size), dtype=torch.uint8)
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        images = self.pixels(rows).float().div_(255).sub_(self.mean).div_(self.std)
        return images, self.labels[torch.as_tensor(rows, dtype=torch.int64)]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]


def measured_normalisation(dataset: ImageDataset, limit: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over (at most ``limit`` of) a data set's images, of values in 0..1."""
    count = min(len(dataset), limit)
    rows = [index * len(dataset) // count for index in range(count)]
    values = dataset.pixels(rows).double().div_(255).transpose(0, 1).flatten(1)
    return tuple(values.mean(1).tolist()), tuple(values.std(1, correction=0).clamp_min(1e-3).tolist())


class EpochSampler(Sampler[int]):
    """A random order for every epoch, drawn from (seed, epoch) alone: a run that resumes sees what it would have
    seen."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next (Lightning calls this)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % (1 << 63))
        return iter(torch.randperm(self.length, generator=generator).tolist())


def _ready_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def batches(
    dataset: ImageDataset, batch_size: int, *, sampler: Sampler[int] | None = None, workers: int = 0
) -> DataLoader:
    """A loader of (images (n, C, H, W) float32, labels (n,) int64).

    A last batch of one sample is left out when a sampler shuffles: batch normalisation cannot learn from it.
    """
    lone = sampler is not None and len(dataset) > batch_size and len(dataset) % batch_size == 1
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_ready_batch,  # type: ignore[arg-type]  # the stub does not know __getitems__
        drop_last=lone,
        persistent_workers=workers > 0,
    )
