"""Where images come from: the digits, CIFAR-10 as JPEG files in an .npz, torchvision's data sets, folders of images.

A source is a list of images with labels; it knows nothing of splits, sizes or tensors.
"""

from __future__ import annotations

import inspect
import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from aep_ext._utils import MissingPackage, UserError, require
from aep_ext.export.preprocessing import IMAGE_SUFFIXES, Preprocessing, image_errors, open_image

if TYPE_CHECKING:
    from PIL import Image

MEMBER_LIMIT = 1 << 30
"""So many bytes a member of an archive may hold; more only if they were stored in a hundredth of that."""
_GREY = ("1", "L", "LA", "La", "F")


@dataclass(frozen=True)
class Source:
    """Images with labels.

    Attributes:
        image: gives the i-th image as a Pillow image, of any mode.
        labels: int64 (N,).
        classes: names of the classes; label = index.
        name: what the i-th image is called in messages.
    """

    image: Callable[[int], Image.Image]
    labels: Tensor
    classes: tuple[str, ...]
    name: Callable[[int], str] = "image {}".format

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int, preprocessing: Preprocessing) -> Tensor:
        """The i-th image as uint8 (C, S, S).

        Raises:
            ImageError: it cannot be read, or has a mode or values that are no image's.
        """
        remedy = "; --skip-bad-images leaves such images out"
        with image_errors(self.name(index), remedy), self.image(index) as image:
            return preprocessing.pixels(image)

    def size_and_greyness(self, index: int) -> tuple[int, bool]:
        """The shorter side of the i-th image in pixels, and whether it is grey; of a file only the header is read.

        Raises:
            ImageError: it cannot be read.
        """
        with image_errors(self.name(index)), self.image(index) as image:
            return min(image.size), image.mode in _GREY or image.mode.startswith("I")


def _from_pixels(pixels: np.ndarray, index: int) -> Image.Image:
    """An image of one uint8 array (N, H, W)."""
    return require("PIL.Image", "train", "reading images").fromarray(pixels[index])


def _from_bytes(data: np.ndarray, offsets: np.ndarray, index: int) -> Image.Image:
    """An image of encoded files, one after another in one uint8 array."""
    return open_image(io.BytesIO(data[offsets[index] : offsets[index + 1]].tobytes()))


def _from_files(paths: Sequence[Path], index: int) -> Image.Image:
    return open_image(paths[index])


def _from_items(dataset: Any, index: int) -> Image.Image:
    """The first entry of an item of a torchvision data set."""
    return dataset[index][0]


def _file_name(paths: Sequence[Path], index: int) -> str:
    return str(paths[index])


def _numbered(of: str, index: int) -> str:
    return f"image {index} of {of}"


def _checked_labels(values: Any, classes: int) -> Tensor:
    """Labels as int64 (N,).

    Raises:
        ValueError: there are none, they are no integers, or one is negative or not below ``classes``.
    """
    labels = np.asarray(values)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels must be a list of at least one, got shape {list(labels.shape)}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels[:1].tolist()} of type {labels.dtype}")
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise ValueError(f"labels must be within 0..{classes - 1} ({classes} classes), got {label}")
    return torch.from_numpy(labels.astype(np.int64))


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
        with zipfile.ZipFile(path) as members:
            classes = tuple(str(name) for name in _member(members, "classes"))
            return {split: _split_of(members, split, classes, path) for split in ("train", "test")}
    except MissingPackage:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise errors of a dozen kinds for files that are damaged
        raise UserError(f"no such data: {path} is not an archive of image files ({_one_line(error)})") from error


def _split_of(members: zipfile.ZipFile, split: str, classes: tuple[str, ...], path: Path) -> Source:
    data, offsets, values = (_member(members, f"{split}_{part}") for part in ("bytes", "offsets", "labels"))
    try:
        labels = _checked_labels(values, len(classes))
    except ValueError as error:
        raise ValueError(f"{split}_{error}") from error
    if data.dtype != np.uint8 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{split}_bytes must be uint8 and {split}_offsets integers, got {data.dtype}, {offsets.dtype}")
    if len(offsets) != len(labels) + 1:
        raise ValueError(f"{split}_offsets must be one more than the {len(labels)} labels, got {len(offsets)}")
    if not (offsets[0] >= 0 and (offsets[1:] >= offsets[:-1]).all() and offsets[-1] <= len(data)):
        raise ValueError(f"{split}_offsets must ascend within 0..{len(data)}, the length of {split}_bytes")
    return Source(partial(_from_bytes, data, offsets), labels, classes, partial(_numbered, f"{split} in {path}"))


def _member(members: zipfile.ZipFile, name: str) -> np.ndarray:
    """A one-dimensional array of an ``.npz``; what its header promises is compared with what is there before anything
    is allocated."""
    info = members.getinfo(f"{name}.npy")
    with members.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is not an array of numbers or names")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        held = info.file_size - file.tell()
        if len(shape) != 1 or dtype.hasobject or math.prod(shape) * dtype.itemsize != held:
            raise ValueError(f"{name} holds {held} bytes, which are no array of shape {list(shape)} and type {dtype}")
        if info.file_size > max(MEMBER_LIMIT, 100 * info.compress_size):
            raise ValueError(f"{name} is a decompression bomb: {info.compress_size} bytes become {info.file_size}")
        return np.frombuffer(file.read(), dtype)


def image_folder(path: Path) -> dict[str, Source]:
    """A folder of images: ``path/<class>/*.png``, or ``path/{train,val,test}/<class>/*.png``.

    Returns:
        ``{"all": source}`` for the first layout; for the second a source for each of ``train``, ``val``, ``test`` that
        is there (``valid`` and ``validation`` are read as ``val``). Classes are the sub-folders' names, sorted; those
        of all splits together are numbered once, so that a class missing in one split shifts no label.

    What begins with a dot is left out.

    Raises:
        UserError: there are no images, or splits without ``train``.
    """
    if not path.is_dir():
        raise UserError(f"no such data: {path} is not a folder")
    roles = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    children = _folders_in(path)
    folders = {roles[child.name.lower()]: child for child in children if child.name.lower() in roles}
    if not folders:
        folders = {"all": path}
    elif "train" not in folders:
        raise UserError(f"no such data: {path} has {', '.join(sorted(folders))} but no sub-folder train")
    classes = sorted({child.name for folder in folders.values() for child in _folders_in(folder)})
    result = {}
    for role, folder in folders.items():
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not found:
            raise UserError(f"no such data: {folder} has no images in class sub-folders")
        files, labels = [file for file, _ in found], torch.tensor([label for _, label in found], dtype=torch.int64)
        result[role] = Source(partial(_from_files, files), labels, tuple(classes), partial(_file_name, files))
    return result


def _folders_in(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


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
    try:
        return _torchvision_sources(sets, kind.__name__)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"no such data: {kind.__name__} is not a classification data set: {_one_line(error)}"
        ) from error


def _torchvision_sources(sets: dict[str, Any], name: str) -> dict[str, Source]:
    labels: dict[str, Any] = {}
    names: list[Any] = []
    for role, dataset in sets.items():
        fields = (getattr(dataset, field) for field in ("targets", "labels", "_labels") if hasattr(dataset, field))
        found = next(fields, None)
        labels[role] = [dataset[index][1] for index in range(len(dataset))] if found is None else found
        names = names or list(getattr(dataset, "classes", None) or [])
    most = len(names) or sum(len(values) for values in labels.values())  # without names: no more classes than images
    checked = {role: _checked_labels(values, most) for role, values in labels.items()}
    names = names or list(range(1 + max(int(values.max()) for values in checked.values())))
    classes = tuple(" / ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    return {
        role: Source(partial(_from_items, sets[role]), values, classes, partial(_numbered, f"{role} in {name}"))
        for role, values in checked.items()
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
