"""Data modules: a data set by name, in the three roles fit, select and report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aep_ext._utils import UserError, require
from aep_ext.training import sources
from aep_ext.training.dataset import EpochSampler, ImageDataset, batches, measured_normalisation
from aep_ext.training.published import PUBLISHED, PublishedData
from aep_ext.training.splits import class_counts, class_weights, seeded_split, split_sha256

pl = require("lightning.pytorch", "train", "aep_ext.training")

SCORING_BATCH = 256
DIGITS_SPLIT = (897, 360, 540)
ROLES = ("fit", "select", "report")


@dataclass(frozen=True)
class Roles:
    """A data set cut into its three roles, not yet turned into tensors.

    Attributes:
        title: for the report.
        classes: names of the K classes.
        parts: per role (fit, select, report) a source and the int64 indices of its images.
        channels: 1 or 3.
        counts: images per class, int64 (K,), from which class weights are made.
        normalisation: mean and std per channel, or None to measure them on the images to fit.
        weighted: whether the published experiment weights the classes of this data set; None: it is not among its sets.
    """

    title: str
    classes: tuple[str, ...]
    parts: dict[str, tuple[sources.Source, Tensor]]
    channels: int
    counts: Tensor
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    weighted: bool | None = None


def load_roles(spec: str, data_root: str | Path = "data") -> Roles:
    """Find a data set and split it.

    Args:
        spec: ``digits``; ``PATH.npz`` or ``cifar10-jpeg:PATH`` (CIFAR-10 as JPEG files); a folder or ``folder:PATH``
            (images in class sub-folders, with or without ``train``, ``val``, ``test`` above them); or the name of a
            torchvision data set.
        data_root: where torchvision's data sets lie or are downloaded to.

    The published experiment's data sets get its splits (seed 420) and normalisation. Else a tenth of the training
    images is cut off as ``val`` where there is none, and 15 % and 20 % of all images as ``val`` and ``test`` where
    there is no split at all.

    Raises:
        UserError: there is no such data.
    """
    kind, _, rest = spec.partition(":")
    path = Path(rest if rest and kind in ("cifar10-jpeg", "folder") else spec).expanduser()
    if spec == "digits":
        source = sources.digits()
        parts = dict(zip(ROLES, ((source, part) for part in seeded_split(len(source), DIGITS_SPLIT)), strict=True))
        return Roles("handwritten digits (scikit-learn)", source.classes, parts, 1, class_counts(source.labels, 10))
    if kind == "cifar10-jpeg" and rest or spec.endswith(".npz"):
        return _from_splits("CIFAR-10 (JPEG copy)", sources.jpeg_archive(path), PUBLISHED["cifar10"])
    if kind == "folder" and rest or path.is_dir():
        found = sources.image_folder(path)
        tiny = PUBLISHED["tiny_imagenet"] if "tiny" in path.name.lower() and "imagenet" in path.name.lower() else None
        return _from_splits(f"images in {path.name}", found, tiny)
    if "/" in spec or "\\" in spec:
        raise UserError(f"no such data: {spec} is neither a file nor a folder")
    return _from_splits(spec, sources.torchvision_dataset(spec, Path(data_root)), PUBLISHED.get(spec.lower()))


def _from_splits(title: str, found: dict[str, sources.Source], published: PublishedData | None) -> Roles:
    base = found.get("train") or found["all"]
    if published is not None and (
        len(base) != published.total or "val" in found or ("test" in found) != published.official_test
    ):
        published = None  # another set under the same name: its own split then
    if published is not None:
        parts_of_base = published.split()
    elif "all" in found:
        fit, select = round(0.65 * len(base)), round(0.15 * len(base))
        parts_of_base = seeded_split(len(base), (fit, select, len(base) - fit - select))
    else:
        held_out = sum(round(share * len(base)) for role, share in (("val", 0.1), ("test", 0.15)) if role not in found)
        cuts = [round(share * len(base)) for role, share in (("val", 0.1), ("test", 0.15)) if role not in found]
        parts_of_base = seeded_split(len(base), (len(base) - held_out, *cuts))
    rest = iter(parts_of_base)
    parts = {"fit": (base, next(rest))}
    for role, split in (("select", "val"), ("report", "test")):
        parts[role] = (found[split], torch.arange(len(found[split]))) if split in found else (base, next(rest))
    if published is not None:
        normalisation, channels, weighted = (published.mean, published.std), published.channels, published.weighted
    else:
        normalisation, channels, weighted = None, 1 if base.image(0).mode in ("L", "1", "I;16") else 3, None
    return Roles(
        title, base.classes, parts, channels, class_counts(base.labels, len(base.classes)), normalisation, weighted
    )


def _limited(roles: Roles, train_samples: int | None) -> Roles:
    if train_samples is None:
        return roles
    source, indices = roles.parts["fit"]
    return replace(roles, parts={**roles.parts, "fit": (source, indices[:train_samples])})


class ImageDataModule(pl.LightningDataModule):
    """A data set in three roles for Lightning: ``fit`` learns weights, ``select`` chooses, ``report`` judges.

    Args:
        spec: the data set, as :func:`load_roles` reads it.
        image_size: side in pixels to which images are resized (bicubic, antialiased).
        batch_size: of the training.
        seed: of the training's order; splits do not depend on it.
        data_root: for torchvision's data sets.
        train_samples: learn from so many images only (the first of the split's random order).
        workers: processes that load batches; cached images need none.
        channels: 1 or 3; None: as the data has them.
        num_classes: K; None: as many as the data has.

    ``train_dataloader`` and ``val_dataloader`` serve ``fit`` and ``select``. ``report_dataloader(model)`` hands out the
    test images once for every name of a model and refuses a second time; ``test_dataloader``, which Lightning calls,
    counts as the model "test". ``spare`` is a source and the int64 indices of the images that ``train_samples`` leaves
    aside: nothing is learned or chosen on them.

    Raises:
        UserError: no such data, too few images for the three roles, or fewer classes asked for than the data has
            labels.
    """

    def __init__(
        self,
        spec: str = "digits",
        *,
        image_size: int = 16,
        batch_size: int = 64,
        seed: int = 0,
        data_root: str | Path = "data",
        train_samples: int | None = None,
        workers: int = 0,
        channels: int | None = None,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        roles = load_roles(spec, data_root)
        self.roles = _limited(roles, train_samples)
        source, indices = roles.parts["fit"]
        self.spare = source, indices[len(self.roles.parts["fit"][1]) :]
        self.spec, self.image_size, self.batch_size, self.seed, self.workers = (
            spec,
            image_size,
            batch_size,
            seed,
            workers,
        )
        for role, (_, indices) in self.roles.parts.items():
            least = 2 if role == "fit" else 1  # batch normalisation cannot learn from one image
            if len(indices) < least:
                raise UserError(
                    f"too few images: {self.roles.title} leaves {len(indices)} to {role} "
                    f"(there must be at least {least})"
                )
        self.channels = channels or self.roles.channels
        largest = max(int(source.labels.max()) for source, _ in self.roles.parts.values())
        self.num_classes = num_classes or max(len(self.roles.classes), largest + 1)
        if largest >= self.num_classes:
            raise UserError(
                f"fewer classes than labels: {self.num_classes} classes asked for, "
                f"but {self.roles.title} has the label {largest}"
            )
        self._datasets: dict[str, ImageDataset] = {}
        self._reported: set[str] = set()
        self.mean, self.std = self._normalisation()

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.roles.normalisation is None:
            source, indices = self.roles.parts["fit"]
            plain = ImageDataset(
                source,
                indices[:2000],
                size=self.image_size,
                channels=self.channels,
                mean=[0.0] * self.channels,
                std=[1.0] * self.channels,
            )
            return measured_normalisation(plain)
        mean, std = self.roles.normalisation
        repeat = self.channels // len(mean) if self.channels > len(mean) else 1
        return (mean * repeat)[: self.channels], (std * repeat)[: self.channels]

    def dataset(self, role: str) -> ImageDataset:
        """The images of a role (``fit``, ``select`` or ``report``), or those that ``train_samples`` leaves aside
        (``spare``), decoded at the first call."""
        if role not in self._datasets:
            source, indices = self.spare if role == "spare" else self.roles.parts[role]
            self._datasets[role] = ImageDataset(
                source, indices, size=self.image_size, channels=self.channels, mean=self.mean, std=self.std
            )
        return self._datasets[role]

    def class_weights(self) -> Tensor:
        """n / (K * count) over the images from which the training was drawn: float32 (K,)."""
        return class_weights(self.roles.counts)

    @property
    def unbalanced(self) -> bool:
        """Whether the training loss should weight the classes: as published, else where one class has 1.25 times
        another's images."""
        counts = self.roles.counts
        if self.num_classes != len(counts) or bool((counts == 0).any()):
            return False
        return bool(counts.max() >= 1.25 * counts.min()) if self.roles.weighted is None else self.roles.weighted

    def train_dataloader(self) -> DataLoader:
        """The images to fit, in an order drawn from (seed, epoch)."""
        data = self.dataset("fit")
        return batches(data, self.batch_size, sampler=EpochSampler(len(data), self.seed), workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        """The images to select on, in their order."""
        return batches(self.dataset("select"), SCORING_BATCH, workers=self.workers)

    def report_dataloader(self, model: str) -> DataLoader:
        """The images to report on: once for every model.

        Raises:
            RuntimeError: this model was judged before.
        """
        if model in self._reported:
            raise RuntimeError(
                f"ImageDataModule.report_dataloader: the test images judge a model once, got {model!r} a second time"
            )
        self._reported.add(model)
        return batches(self.dataset("report"), SCORING_BATCH, workers=self.workers)

    def test_dataloader(self) -> DataLoader:
        """The images to report on, for ``Trainer.test``: once."""
        return self.report_dataloader("test")

    def describe(self) -> dict[str, Any]:
        """What a report says of the data: plain values."""
        return {
            "spec": self.spec,
            "title": self.roles.title,
            "classes": list(self.roles.classes),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "channels": self.channels,
            "normalisation": {"mean": list(self.mean), "std": list(self.std)},
            "roles": {
                role: {"samples": len(indices), "sha256": split_sha256(indices)}
                for role, (_, indices) in self.roles.parts.items()
            },
        }
