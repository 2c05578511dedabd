"""How an image file becomes a network's input: the same in a run's training data and in what uses its networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from aep_ext._utils import UserError, per_exit, require

if TYPE_CHECKING:
    from PIL import Image

RESIZES = ("crop", "squash")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".avif", ".tif", ".tiff", ".ppm", ".pgm"}


@dataclass(frozen=True)
class Preprocessing:
    """Turns a Pillow image into a network's input.

    EXIF rotation is applied. Palettes, RGBA, CMYK and the like become RGB (transparency is dropped, as by Pillow's
    ``convert("RGB")``), or grey where ``channels`` is 1. 16-bit images (``I;16``, or ``I`` with values up to 65535)
    are divided by 257, float images (``F``) with values within 0..1 multiplied by 255.

    Attributes:
        image_size: side S in pixels.
        channels: 1 (grey) or 3 (RGB).
        mean, std: one number per channel, of values within 0..1.
        resize: "crop": the shorter side is resized to S and the centre cut out; "squash": both sides are resized to S,
            as earlier versions did. Bicubic, antialiased.

    Raises:
        ValueError: a value of another type or out of range.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "crop"

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"Preprocessing: image_size must be an integer of at least 1, got {self.image_size!r}")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise ValueError(f"Preprocessing: channels must be 1 or 3, got {self.channels!r}")
        if self.resize not in RESIZES:
            raise ValueError(f"Preprocessing: resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        for name in ("mean", "std"):
            try:
                numbers = per_exit(
                    "Preprocessing", name, list(getattr(self, name)), self.channels, positive=name == "std"
                )
            except TypeError as error:
                raise ValueError(f"Preprocessing: {name} must be numbers, got {getattr(self, name)!r}") from error
            object.__setattr__(self, name, numbers)

    def pixels(self, image: Image.Image) -> Tensor:
        """An image as uint8 (channels, S, S), values 0..255, not normalised.

        Raises:
            ValueError: its mode has no such meaning, or its values are out of the mode's range.
        """
        ops = require("PIL.ImageOps", "train", "reading images")
        image = _eight_bits(ops.exif_transpose(image)).convert("L" if self.channels == 1 else "RGB")
        size = (self.image_size, self.image_size)
        if self.resize == "crop":
            image = ops.fit(image, size)
        else:
            image = image.resize(size, require("PIL.Image", "train", "reading images").Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1).contiguous()

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 (..., channels, S, S) as float32 of the same shape: ``(pixels / 255 - mean) / std``."""
        mean, std = (torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def __call__(self, image: Image.Image) -> Tensor:
        """An image as a network's input: float32 (channels, S, S). Raises as :meth:`pixels`."""
        return self.normalised(self.pixels(image))

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for the metadata of a saved network."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The reverse of :meth:`to_dict`; also reads the metadata of earlier versions, which squashed images.

        Raises:
            ValueError: a value is missing, of another type or out of range.
        """
        if isinstance(values, Mapping) and isinstance(values.get("normalisation"), Mapping):
            old = {name: values[name] for name in ("image_size", "channels") if name in values}
            values = {**old, **values["normalisation"], "resize": "squash"}
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"Preprocessing.from_dict: not the entries of a preprocessing: {values!r:.200}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; of a mode that has more, its values scaled."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    highest = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= highest):  # NaN is refused, too
        raise ValueError(
            f"Preprocessing: an image of mode {image.mode} must have values within 0..{highest}, "
            f"got {values.min()}..{values.max()}"
        )
    scaled = values.astype(np.float32)  # exact, and half of what float64 would take
    scaled *= 255 / highest
    return require("PIL.Image", "train", "reading images").fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """Open an image file with Pillow; its pixels are read when they are asked for.

    Raises:
        DecompressionBombWarning, DecompressionBombError: it has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
        OSError: it is no image.
    """
    pillow = require("PIL.Image", "train", "reading images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        return pillow.open(file)


class ImageError(UserError):
    """An image cannot be read, or its values have no meaning as one."""


@contextmanager
def image_errors(name: str, remedy: str = "") -> Iterator[None]:
    """Whatever goes wrong with an image inside the block, as an ImageError of one line that names it and ends with
    the remedy.

    Pillow raises errors of a dozen kinds for files that are damaged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name} cannot be read as an image ({text.removeprefix('Preprocessing: ')}){remedy}"
        ) from error
