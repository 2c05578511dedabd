"""Where images come from: the digits, CIFAR-10 as JPEG files in an .npz, torchvision's data sets, folders of images.

A source is a list of images with labels; it knows nothing of splits, sizes or tensors.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aep_ext._utils import UserError, require

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Source:
    """Images with labels.

    Attributes:
        image: gives the i-th image as a Pillow image, of any mode.
        labels: int64 (N,).
        classes: names of the classes; label = index.
    """

    image: Callable[[int], Image.Image]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def _from_pixels(pixels: np.ndarray, index: int) -> Image.Image:
    """An image of one uint8 array (N, H, W)."""
    return require("PIL.Image", "train", "reading images").fromarray(pixels[index])


def _opened(file: Path | io.BytesIO, name: str) -> Image.Image:
    """An image file, read.

    Raises:
        UserError: it is no image, or cut off.
    """
    try:
        with require("PIL.Image", "train", "reading images").open(file) as image:
            image.load()
            return image
    except (OSError, SyntaxError) as error:  # Pillow's word for a broken PNG is SyntaxError
        raise UserError(f"no such data: {name} cannot be read as an image ({_one_line(error)})") from error


def _from_bytes(data: np.ndarray, offsets: np.ndarray, index: int) -> Image.Image:
    """An image of encoded files, one after another in one uint8 array."""
    return _opened(io.BytesIO(data[offsets[index] : offsets[index + 1]].tobytes()), f"file {index} of the archive")


def _from_files(paths: Sequence[Path], index: int) -> Image.Image:
    return _opened(paths[index], str(paths[index]))


def _from_items(dataset: Any, index: int) -> Image.Image:
    """The first entry of an item of a torchvision data set."""
    return dataset[index][0]


def digits() -> Source:
    """The 1,797 handwritten digits that ship with scikit-learn: 8 x 8 pixels, 17 grey levels, 10 classes."""
    bunch = require("sklearn.datasets", "train", "the digits").load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return Source(
        partial(_from_pixels, pixels),
        torch.from_numpy(bunch.target.astype(np.int64)),
        tuple(str(n) for n in bunch.target_names),
    )


def jpeg_archive(path: Path) -> dict[str, Source]:
    """The splits ``train`` and ``test`` of an ``.npz`` that holds encoded image files.

    Layout, for each split: ``<split>_bytes`` (uint8, all files one after another), ``<split>_offsets`` (int64, N + 1:
    file i is ``bytes[offsets[i]:offsets[i + 1]]``), ``<split>_labels`` (integers, N); and ``classes`` (names, label =
    index).

    Raises:
        UserError: the file is not there, or does not have this layout.
    """
    if not path.is_file():
        raise UserError(f"no such data: {path} is not a file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            classes = tuple(str(name) for name in archive["classes"])
            result = {}
            for split in ("train", "test"):
                data, offsets, labels = (archive[f"{split}_{part}"] for part in ("bytes", "offsets", "labels"))
                if len(offsets) != len(labels) + 1 or offsets[-1] > len(data):
                    raise ValueError(f"{split}_offsets do not fit {split}_labels and {split}_bytes")
                result[split] = Source(
                    partial(_from_bytes, data, offsets), torch.from_numpy(labels.astype(np.int64)), classes
                )
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"no such data: {path} is not an archive of image files ({error})") from error
    return result


def image_folder(path: Path) -> dict[str, Source]:
    """A folder of images: ``path/<class>/*.png``, or ``path/{train,val,test}/<class>/*.png``.

    Returns:
        ``{"all": source}`` for the first layout; for the second a source for each of ``train``, ``val``, ``test`` that
        is there (``valid`` and ``validation`` are read as ``val``). Classes are the sub-folders' names, sorted; those
        of all splits together are numbered once, so that a class missing in one split shifts no label.

    Raises:
        UserError: there are no images, or splits without ``train``.
    """
    if not path.is_dir():
        raise UserError(f"no such data: {path} is not a folder")
    roles = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    children = sorted(child for child in path.iterdir() if child.is_dir())
    folders = {roles[child.name.lower()]: child for child in children if child.name.lower() in roles}
    if not folders:
        folders = {"all": path}
    elif "train" not in folders:
        raise UserError(f"no such data: {path} has {', '.join(sorted(folders))} but no sub-folder train")
    classes = sorted({child.name for folder in folders.values() for child in folder.iterdir() if child.is_dir()})
    result = {}
    for role, folder in folders.items():
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not found:
            raise UserError(f"no such data: {folder} has no images in class sub-folders")
        labels = torch.tensor([label for _, label in found], dtype=torch.int64)
        result[role] = Source(partial(_from_files, [file for file, _ in found]), labels, tuple(classes))
    return result


def _dataset_class(module: Any, name: str) -> Any | None:
    for candidate in module.__all__:
        found = getattr(module, candidate)
        if candidate.lower() == name.lower() and inspect.isclass(found) and issubclass(found, module.VisionDataset):
            return found
    return None


def torchvision_dataset(name: str, root: Path) -> dict[str, Source]:
    """A data set of ``torchvision.datasets`` by its class name, in any case; downloaded into ``root`` where it can be.

    Returns:
        Its splits among ``train``, ``val`` and ``test``, or ``{"all": source}`` where it has none.

    Raises:
        UserError: torchvision is not installed, has no such data set, or the data set is not there and cannot be had.
    """
    module = require("torchvision.datasets", "models", f"the data set {name!r}")
    kind = _dataset_class(module, name)
    if kind is None:
        raise UserError(
            f"no such data: {name!r} (digits, a path to an .npz or to a folder of images, or one of torchvision's data "
            "sets: CIFAR10, CIFAR100, FashionMNIST, MNIST, EuroSAT, GTSRB, SVHN, ...)"
        )
    parameters = inspect.signature(kind).parameters
    common: dict[str, Any] = {}
    if "root" in parameters:
        common["root"] = str(root)
    if "download" in parameters:
        root.mkdir(parents=True, exist_ok=True)
        common["download"] = True
    try:
        if "train" in parameters:
            sets = {"train": kind(train=True, **common), "test": kind(train=False, **common)}
        elif "split" in parameters:
            sets = {"train": kind(split="train", **common), "test": kind(split="test", **common)}
            for val in ("val", "valid"):
                try:
                    sets["val"] = kind(split=val, **common)
                    break
                except ValueError:  # this data set's word for it is another, or it has none: val is then cut from train
                    continue
        else:
            sets = {"all": kind(**common)}
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise UserError(f"no such data: torchvision's {kind.__name__} under {root}: {_one_line(error)}") from error
    return {role: _torchvision_source(dataset) for role, dataset in sets.items()}


def _torchvision_source(dataset: Any) -> Source:
    labels = next((getattr(dataset, name) for name in ("targets", "labels", "_labels") if hasattr(dataset, name)), None)
    if labels is None:
        labels = [dataset[index][1] for index in range(len(dataset))]
    try:
        labels = torch.as_tensor(np.asarray(labels).astype(np.int64, casting="same_kind"))
        if labels.dim() != 1:
            raise TypeError(f"labels of shape {list(labels.shape)}")
    except (TypeError, ValueError) as error:
        raise UserError(
            f"no such data: {type(dataset).__name__} is not a classification data set: {_one_line(error)}"
        ) from error
    names = getattr(dataset, "classes", None) or [str(label) for label in range(int(labels.max()) + 1)]
    return Source(
        partial(_from_items, dataset), labels, tuple(" / ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
