"""Images as tensors: resized once, kept in memory as bytes, normalised batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aep_ext.export.preprocessing import ImageError, Preprocessing
from aep_ext.training.augment import each_transformed
from aep_ext.training.sources import Source

CACHE_BYTES = 2 << 30


class ImageDataset(Dataset):
    """Some images of a source, as normalised float32 tensors (C, H, W) with int64 labels.

    Args:
        source: the images.
        indices: which of them, int64 (n,).
        preprocessing: makes tensors of them.
        cache_bytes: decoded images are kept in memory as bytes if they fit into so many; else every access decodes
            anew.
        skip_bad_images: leave out the images that cannot be read; without a cache all are read once to find them.
        progress: called with the number of images read and of all.

    Attributes:
        indices: of the images that are there.
        skipped: names of the images left out.
        hashes: of the images' pixels; None where not all were read.

    Whole batches are made at once (``__getitems__``), so that a loader over cached images costs no Python per sample.

    Raises:
        ImageError: an image cannot be read.
    """

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        preprocessing: Preprocessing,
        *,
        cache_bytes: int = CACHE_BYTES,
        skip_bad_images: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.source, self.indices, self.preprocessing = source, indices, preprocessing
        self._shape = (preprocessing.channels, preprocessing.image_size, preprocessing.image_size)
        self.skipped: list[str] = []
        self.hashes: list[bytes] | None = None
        self._cache: Tensor | None = None
        if len(indices) * preprocessing.channels * preprocessing.image_size**2 <= cache_bytes:
            self._cache = torch.empty((len(indices), *self._shape), dtype=torch.uint8)
        if self._cache is not None or skip_bad_images:
            self._read(skip_bad_images, progress)
        self.labels = source.labels[self.indices]

    def _read(self, skip_bad_images: bool, progress: Callable[[int, int], None] | None) -> None:
        """Decode every image once: into the cache, and to leave out the bad ones."""
        kept: list[int] = []
        self.hashes = []
        for row, index in enumerate(self.indices.tolist()):
            try:
                pixels = self.source.pixels(index, self.preprocessing)
            except ImageError:
                if not skip_bad_images:
                    raise
                self.skipped.append(self.source.name(index))
            else:
                if self._cache is not None:
                    self._cache[len(kept)] = pixels
                self.hashes.append(hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest())
                kept.append(index)
            if progress is not None:
                progress(row + 1, len(self.indices))
        self.indices = torch.tensor(kept, dtype=torch.int64)
        if self._cache is not None:
            self._cache = self._cache[: len(kept)]

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Raw images, uint8 (len(rows), C, H, W)."""
        if self._cache is not None:
            return self._cache[torch.as_tensor(rows, dtype=torch.int64)]
        images = [self.source.pixels(int(self.indices[row]), self.preprocessing) for row in rows]
        return torch.stack(images) if images else torch.empty((0, *self._shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.preprocessing.normalised(self.pixels(rows)), self.labels[torch.as_tensor(rows, dtype=torch.int64)]

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([row])
        return images[0], labels[0]


class TransformedDataset(Dataset):
    """The images of an :class:`ImageDataset`, each through a transform of its own before it is normalised.

    Args:
        dataset: the images.
        transform: makes of an image, uint8 (C, S, S), another: uint8, or floating with values within 0..1. What it
            draws from torch's generator depends on the sampler's seed and epoch and on the batch alone.
        sampler: the order in which the images are read.

    Raises:
        ValueError: at an access: the transform gave something else.
    """

    def __init__(self, dataset: ImageDataset, transform: Callable[[Tensor], Tensor], sampler: EpochSampler) -> None:
        self.dataset, self.transform, self.sampler = dataset, transform, sampler

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        pixels = self.dataset.pixels(rows)
        images = each_transformed(pixels, self.transform, (self.sampler.epoch_seed * len(self) + rows[0]) % (1 << 63))
        for image in images:
            if not isinstance(image, Tensor) or image.shape != pixels.shape[1:] or image.dtype != images[0].dtype:
                found = (
                    f"{image.dtype} of shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                )
                raise ValueError(
                    f"ImageDataModule: transform must give tensors of one dtype and of shape {list(pixels.shape[1:])}, "
                    f"got {found}"
                )
        changed = torch.stack(images)
        labels = self.dataset.labels[torch.as_tensor(rows, dtype=torch.int64)]
        return self.dataset.preprocessing.normalised(changed * 255 if changed.is_floating_point() else changed), labels


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

    @property
    def epoch_seed(self) -> int:
        """Of (seed, epoch)."""
        return self.seed * 1_000_003 + self.epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch_seed % (1 << 63))
        return iter(torch.randperm(self.length, generator=generator).tolist())


def _ready_batch(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def batches(
    dataset: ImageDataset | TransformedDataset,
    batch_size: int,
    *,
    sampler: Sampler[int] | None = None,
    workers: int = 0,
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
        # Workers that stayed would not hear of the sampler's next epoch, of which a transform draws.
        persistent_workers=workers > 0 and isinstance(dataset, ImageDataset),
    )
