"""Data modules: a data set by name, split into train, val and test images."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aep_ext._config import RunConfig
from aep_ext._utils import UserError, require
from aep_ext.export.preprocessing import ImageError, Preprocessing
from aep_ext.surgery import networks
from aep_ext.training import sources
from aep_ext.training.dataset import EpochSampler, ImageDataset, TransformedDataset, batches, measured_normalisation
from aep_ext.training.splits import (
    CIFAR10_CLASSES,
    PUBLISHED,
    PublishedData,
    class_counts,
    class_weights,
    seeded_split,
    split_sha256,
)

pl: Any = require("lightning.pytorch", "train", "aep_ext.training")

SCORING_BATCH = 256
DIGITS_SPLIT = (897, 360, 540)
SPLITS = ("train", "val", "test")
CALIBRATION_LIMIT = 20_000
"""So many held-out images are used."""
DIGITS_SIZE = 16
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LARGEST_SIZE = 224
LOOKED_AT = 100
"""So many images say how large a data set's images are, and whether they are grey."""


@dataclass(frozen=True)
class Splits:
    """A data set cut into its splits, not yet turned into tensors.

    Attributes:
        title: for the report.
        classes: names of the K classes.
        parts: per split (train, val, test) a source and the int64 indices of its images.
        channels: 1 or 3.
        image_size: side in pixels where nobody names another.
        counts: images per class, int64 (K,), from which class weights are made.
        normalisation: mean and std per channel, or None to measure them on the training images.
        resize: "crop", or "squash" as the published experiment does.
        weighted: whether the published experiment weights the classes of this data set; None: it is not among its sets.
    """

    title: str
    classes: tuple[str, ...]
    parts: dict[str, tuple[sources.Source, Tensor]]
    channels: int
    image_size: int
    counts: Tensor
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    resize: str = "crop"
    weighted: bool | None = None


def load_splits(spec: str, data_root: str | Path = "data") -> Splits:
    """Find a data set and split it.

    Args:
        spec: ``digits``; ``PATH.npz`` or ``cifar10-jpeg:PATH`` (CIFAR-10 as JPEG files); a folder or ``folder:PATH``
            (images in class sub-folders, with or without ``train``, ``val``, ``test`` above them); or the name of a
            torchvision data set.
        data_root: where torchvision's data sets lie or are downloaded to.

    The published experiment's data sets get its splits (seed 420), normalisation and resizing. Else a tenth of the
    training images is cut off as ``val`` where there is none, and 15 % and 20 % of all images as ``val`` and ``test``
    where there is no split at all.

    Raises:
        UserError: there is no such data.
    """
    kind, _, rest = spec.partition(":")
    path = _path(spec)
    try:
        if spec == "digits":
            source = sources.digits()
            parts = dict(zip(SPLITS, ((source, part) for part in seeded_split(len(source), DIGITS_SPLIT)), strict=True))
            title, counts = "handwritten digits (scikit-learn)", class_counts(source.labels, 10)
            return Splits(title, source.classes, parts, 1, DIGITS_SIZE, counts)
        if kind == "cifar10-jpeg" and rest or spec.endswith(".npz"):
            found = sources.jpeg_archive(path)
            cifar = found["train"].classes == CIFAR10_CLASSES and [*map(len, found.values())] == [50000, 10000]
            if cifar:
                return _from_splits("CIFAR-10 (JPEG copy)", found, PUBLISHED["cifar10"])
            return _from_splits(path.name, found, None)
        if kind == "folder" and rest or path.is_dir():
            found = sources.image_folder(path)
            name = path.absolute().name.lower()
            tiny = PUBLISHED["tiny_imagenet"] if "tiny" in name and "imagenet" in name else None
            return _from_splits(f"images in {path.absolute().name}", found, tiny)
    except OSError as error:
        raise UserError(f"no such data: {error.filename or path}: {error.strerror or error}") from error
    if "/" in spec or "\\" in spec:
        raise UserError(f"no such data: {spec} is neither a file nor a folder")
    return _from_splits(spec, sources.torchvision_dataset(spec, Path(data_root)), PUBLISHED.get(spec.lower()))


def _path(spec: str) -> Path:
    """Where a file or a folder of images lies."""
    kind, _, rest = spec.partition(":")
    return Path(rest if rest and kind in ("cifar10-jpeg", "folder") else spec).expanduser()


def _looked_at(source: sources.Source) -> tuple[int, int]:
    """Channels and side in pixels that suit a data set's images, from some of them. Bad ones are told when all are
    read.

    Raises:
        ImageError: none of them can be read.
    """
    count = min(len(source), LOOKED_AT)
    seen = []
    for number in range(count):
        try:
            seen.append(source.size_and_greyness(number * len(source) // count))
        except ImageError:
            if number == count - 1 and not seen:
                raise
    side = statistics.median_low(side for side, _ in seen)
    return 1 if all(grey for _, grey in seen) else 3, min(side, LARGEST_SIZE)


def _from_splits(title: str, found: dict[str, sources.Source], published: PublishedData | None) -> Splits:
    base = found.get("train") or found["all"]
    if published is not None and (
        len(base) != published.total or "val" in found or ("test" in found) != published.official_test
    ):
        published = None  # another set under the same name: its own split then
    if published is not None:
        parts_of_base = published.split()
    elif "all" in found:
        train, val = round(0.65 * len(base)), round(0.15 * len(base))
        parts_of_base = seeded_split(len(base), (train, val, len(base) - train - val))
    else:
        cuts = [round(share * len(base)) for name, share in (("val", 0.1), ("test", 0.15)) if name not in found]
        parts_of_base = seeded_split(len(base), (len(base) - sum(cuts), *cuts))
    rest = iter(parts_of_base)
    parts = {"train": (base, next(rest))}
    for name in ("val", "test"):
        parts[name] = (found[name], torch.arange(len(found[name]))) if name in found else (base, next(rest))
    channels, side = _looked_at(base)
    splits = Splits(title, base.classes, parts, channels, side, class_counts(base.labels, len(base.classes)))
    if published is None:
        return splits
    return replace(
        splits,
        channels=published.channels,
        normalisation=(published.mean, published.std),
        resize="squash",
        weighted=published.weighted,
    )


def _held_out(splits: Splits, train_samples: int | None, calibration_samples: int) -> Splits:
    """The same with the split ``calibration``: training images of which nothing is learned."""
    source, indices = splits.parts["train"]
    left = max(len(indices) - calibration_samples, 0)
    count = left if train_samples is None else min(train_samples, left)
    held_out = indices[count:][:CALIBRATION_LIMIT]
    parts = {**splits.parts, "train": (source, indices[:count]), "calibration": (source, held_out)}
    return replace(splits, parts=parts)


class ImageDataModule(pl.LightningDataModule):
    """A data set for Lightning: ``train`` images are learned from, ``val`` chooses, ``test`` is looked at in the end.

    Args:
        spec: the data set, as :func:`load_splits` reads it.
        image_size: side in pixels to which images are resized; None: the digits' 16, else the median shorter side of
            the images, at most 224.
        resize: see :class:`~aep_ext.export.Preprocessing`; None: "crop", "squash" for the published data sets.
        skip_bad_images: leave out images that cannot be read instead of stopping at the first; they are listed in
            ``describe()["skipped"]``.
        normalize: mean and standard deviation per channel, of values within 0..1: "imagenet", the name of one of the
            published data sets ("cifar10"), numbers ("0.5/0.25" or "0.48,0.45,0.41/0.23,0.22,0.22"), or "measured", on
            the training images; None: as published, else measured.
        transform: called for each training image by itself, uint8 (C, S, S), before it is normalised: any transform of
            torchvision v2. It gives uint8, or floating with values within 0..1, of the same shape.
        batch_size: of the training.
        seed: of the training's order; splits do not depend on it.
        data_root: for torchvision's data sets.
        train_samples: learn from so many images only (the first of the split's random order).
        calibration_samples: hold out so many training images (the last ones of that order).
        workers: processes that load batches; cached images need none.
        channels: 1 or 3; None: as the data has them.
        num_classes: K; None: as many as the data has.

    The split ``calibration`` holds the images that ``calibration_samples`` and ``train_samples`` leave aside, at most
    20,000: nothing is learned or chosen on them before a calibration.

    Raises:
        UserError: no such data, too few images for the splits, or fewer classes asked for than the data has labels.
    """

    def __init__(
        self,
        spec: str = "digits",
        *,
        image_size: int | None = None,
        resize: str | None = None,
        skip_bad_images: bool = False,
        normalize: str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        data_root: str | Path = "data",
        train_samples: int | None = None,
        calibration_samples: int = 0,
        workers: int = 0,
        channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        self.splits = _held_out(load_splits(spec, data_root), train_samples, calibration_samples)
        self.spec, self.batch_size, self.seed, self.workers = spec, batch_size, seed, workers
        self.skip_bad_images, self.transform = skip_bad_images, transform
        for name in SPLITS:
            self._check_count(name)
        held_out = len(self.splits.parts["calibration"][1])
        enough = calibration_samples > 0 or held_out >= len(self.splits.parts["val"][1])
        self.calibration_split = "calibration" if held_out and enough else "val"
        self.channels = channels or self.splits.channels
        largest = max(int(source.labels.max()) for source, _ in self.splits.parts.values())
        self.num_classes = num_classes or len(self.splits.classes)
        if largest >= self.num_classes:
            raise UserError(
                f"fewer classes than labels: {self.num_classes} classes asked for, "
                f"but {self.splits.title} has the label {largest}"
            )
        self._datasets: dict[str, ImageDataset] = {}
        if normalize is not None:
            self.splits = replace(self.splits, normalisation=_normalisation(normalize))
        self.preprocessing = self._preprocessing(image_size or self.splits.image_size, resize or self.splits.resize)

    def _check_count(self, split: str) -> None:
        """An error where a split has too few images: batch normalisation cannot learn from one."""
        count, least = len(self.splits.parts[split][1]), 2 if split == "train" else 1
        if count < least and split in SPLITS:
            raise UserError(
                f"too few images: {self.splits.title} leaves {count} to {split} (there must be at least {least})"
            )

    @classmethod
    def of_config(cls, config: RunConfig) -> ImageDataModule:
        """The data of a run, whose configuration is resolved."""
        recipe = config.training()
        try:
            channels = networks.weight_channels(config.weights)
        except (ValueError, ImportError) as error:
            raise UserError(str(error)) from error
        return cls(
            config.data,
            image_size=recipe.image_size or networks.image_size(config.network, config.weights),
            resize=config.resize,
            skip_bad_images=config.skip_bad_images,
            normalize=config.normalize,
            batch_size=recipe.batch_size,
            data_root=config.data_root,
            train_samples=config.train_samples,
            calibration_samples=config.calibration_samples,
            workers=config.workers,
            channels=channels,
            num_classes=config.classes,
        )

    def _preprocessing(self, size: int, resize: str) -> Preprocessing:
        if self.splits.normalisation is None:
            source, indices = self.splits.parts["train"]
            plain = Preprocessing(size, self.channels, (0.0,) * self.channels, (1.0,) * self.channels, resize)
            some = ImageDataset(source, indices[:2000], plain, skip_bad_images=self.skip_bad_images)
            mean, std = measured_normalisation(some)
        else:
            mean, std = self.splits.normalisation
            repeat = self.channels // len(mean) if self.channels > len(mean) else 1
            mean, std = (mean * repeat)[: self.channels], (std * repeat)[: self.channels]
        try:
            return Preprocessing(size, self.channels, mean, std, resize)
        except ValueError as error:
            raise UserError(str(error).removeprefix("Preprocessing: ")) from error

    def dataset(self, split: str, progress: Callable[[int, int], None] | None = None) -> ImageDataset:
        """The images of a split (``train``, ``val``, ``test`` or ``calibration``), decoded at the first call.

        Args:
            split: which.
            progress: called with the number of images decoded and of all.

        Raises:
            ImageError: an image cannot be read.
            UserError: too few are left where bad ones are skipped.
        """
        if split not in self._datasets:
            source, indices = self.splits.parts[split]
            found = ImageDataset(
                source, indices, self.preprocessing, skip_bad_images=self.skip_bad_images, progress=progress
            )
            self.splits.parts[split] = (source, found.indices)
            self._check_count(split)
            self._datasets[split] = found
        return self._datasets[split]

    def warnings(self) -> list[str]:
        """What is odd about the images, a line each; decodes ``train``, ``val`` and ``test``."""
        data = {split: self.dataset(split) for split in SPLITS}
        lines = []
        skipped = self.skipped()
        if skipped:
            lines.append(f"{len(skipped)} images that cannot be read were left out: {_some(skipped)}")
        counts = {split: class_counts(data[split].labels, self.num_classes) for split in SPLITS}
        names = [*self.splits.classes, *(str(k) for k in range(len(self.splits.classes), self.num_classes))]
        present = torch.stack(list(counts.values())).sum(0) > 0
        if int(present.sum()) == 1:
            lines.append(f"all images are of one class: {names[int(present.int().argmax())]}")
        for split in SPLITS:
            missing = [name for name, count in zip(names, counts[split].tolist(), strict=True) if not count]
            if missing:
                lines.append(f"no {split} images of {len(missing)} of {len(names)} classes: {_some(missing)}")
        hashes = {split: found.hashes for split, found in data.items() if found.hashes is not None}
        if len(set().union(*hashes.values())) == 1 and len(hashes) == len(SPLITS):
            lines.append("all images are identical")
        for one, other in (("test", "train"), ("val", "train"), ("test", "val")):
            known = set(hashes.get(other, ()))
            same = sum(digest in known for digest in hashes.get(one, ()))
            if same:
                lines.append(f"{same} of {len(data[one])} {one} images are also {other} images, pixel for pixel")
        return lines

    def skipped(self) -> list[str]:
        """Names of the images left out of the splits that were decoded, from the data's own folder on."""
        above = f"{_path(self.spec).parent}{os.sep}"
        return sorted({name.replace(above, "") for data in self._datasets.values() for name in data.skipped})

    def class_weights(self) -> Tensor:
        """n / (K * count) over the images from which the training was drawn: float32 (K,)."""
        return class_weights(self.splits.counts)

    @property
    def unbalanced(self) -> bool:
        """Whether the training loss should weight the classes: as published, else where one class has 1.25 times
        another's images."""
        counts = self.splits.counts
        if self.num_classes != len(counts) or bool((counts == 0).any()):
            return False
        return bool(counts.max() >= 1.25 * counts.min()) if self.splits.weighted is None else self.splits.weighted

    def train_dataloader(self) -> DataLoader:
        """The training images, in an order drawn from (seed, epoch)."""
        data = self.dataset("train")
        sampler = EpochSampler(len(data), self.seed)
        if self.trainer is not None:  # workers begin before Lightning tells the sampler in which epoch a run is resumed
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        images = data if self.transform is None else TransformedDataset(data, self.transform, sampler)
        return batches(images, self.batch_size, sampler=sampler, workers=self.workers)

    def loader(self, split: str) -> DataLoader:
        """The images of a split in their order, in batches for scoring."""
        return batches(self.dataset(split), SCORING_BATCH, workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """The validation images, in their order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """The test images, in their order."""
        return self.loader("test")

    def describe(self) -> dict[str, Any]:
        """What a report says of the data: plain values."""
        return {
            "spec": self.spec,
            "title": self.splits.title,
            "classes": list(self.splits.classes),
            "num_classes": self.num_classes,
            "image_size": self.preprocessing.image_size,
            "preprocessing": self.preprocessing.to_dict(),
            "skipped": self.skipped(),
            "splits": {
                name: {"samples": len(indices), "sha256": split_sha256(indices)} if len(indices) else None
                for name, (_, indices) in self.splits.parts.items()
            },
        }


def _normalisation(asked: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std per channel of what ``normalize`` says; None: they are measured."""
    known = {name: (data.mean, data.std) for name, data in PUBLISHED.items()} | {"imagenet": IMAGENET}
    if asked == "measured" or asked in known:
        return known.get(asked)
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in asked.split("/"))
    except ValueError:
        raise UserError(
            f"no such normalize: {asked!r} (there are: measured, {', '.join(sorted(known))}, and numbers: 0.5/0.25)"
        ) from None
    if len(mean) != len(std):
        raise UserError(f"normalize must be as many means as standard deviations, got {asked!r}")
    return mean, std


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
