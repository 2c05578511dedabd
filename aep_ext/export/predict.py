"""``predict``: what a network says of images, image files and tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext._utils import UserError, eval_mode
from aep_ext.export.preprocessing import IMAGE_SUFFIXES, ImageError, Preprocessing, image_errors, open_image
from aep_ext.inference import CompiledNet, GatedNet, GatedOutput
from aep_ext.surgery.multi_exit import MultiExitNet

if TYPE_CHECKING:
    from PIL import Image

    Picture: TypeAlias = str | os.PathLike[str] | Image.Image | Tensor


class Prediction(NamedTuple):
    """What a network says of one image."""

    file: str | None
    """As it was given; None for images and tensors."""
    label: int
    class_name: str | None
    """None where the network has no name for it."""
    confidence: float
    """The largest probability, at the exit taken."""
    exit: int
    """The exit taken, from 0, in the network at hand; the last one where nothing is gated."""


def predict(
    net: GatedNet | MultiExitNet | CompiledNet,
    images: Picture | Iterable[Picture],
    *,
    batch_size: int = 64,
    on_bad_image: Callable[[ImageError], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Prediction]:
    """Classifies images.

    Args:
        net: gated, full, pruned or compiled; its modes are restored. Images and files are prepared by
            ``net.preprocessing``, which a network that ``aep_ext.load`` read from a run has.
        images: one or several, read batch by batch: paths of image files, Pillow images, or tensors, floating,
            (C, H, W) or (N, C, H, W), prepared as the network takes them.
        batch_size: how many images the network is given at a time.
        on_bad_image: called with the error of an image that cannot be read, which is then left out; None: it is raised.
        progress: called after every batch with the number of images answered so far.

    Returns:
        One :class:`Prediction` per image, in order. Without gates the answer is that of the ensemble, and the
        confidence that of a gate at the last exit.

    Raises:
        ImageError: an image cannot be read; a UserError.
        TypeError: ``net`` or an image is of another type.
        ValueError: ``batch_size`` is below 1, ``net.preprocessing`` is None where it is needed, or tensors of several
            shapes.
    """
    if not isinstance(net, GatedNet | MultiExitNet | CompiledNet):
        raise TypeError(f"predict: net must be a GatedNet, MultiExitNet or CompiledNet, got {type(net).__name__}")
    if batch_size < 1:
        raise ValueError(f"predict: batch_size must be at least 1, got {batch_size}")
    one = isinstance(images, str | os.PathLike | Tensor) or not isinstance(images, Iterable)
    prepared = _prepared(net.preprocessing, [images] if one else images, on_bad_image)  # type: ignore[arg-type]
    found: list[Prediction] = []
    while batch := list(islice(prepared, batch_size)):
        files, inputs = zip(*batch, strict=True)
        if len(shapes := {tuple(x.shape) for x in inputs}) > 1:
            raise ValueError(f"predict: images must have one shape, got {sorted(shapes)}")
        output = _answer(net, torch.stack(inputs))
        columns = output.logits.argmax(1).tolist(), output.confidence.tolist(), output.exit.tolist()
        for file, label, confidence, exit_taken in zip(files, *columns, strict=True):
            name = net.classes[label] if net.classes and label < len(net.classes) else None
            found.append(Prediction(file, label, name, confidence, exit_taken))
        if progress is not None:
            progress(len(found))
    return found


def image_files(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Files as they are given; of folders the image files inside, at any depth, sorted.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    found: list[str] = []
    for path in paths:
        if not Path(path).exists():
            raise UserError(f"no such image: {path}")
        if not Path(path).is_dir():
            found.append(os.fspath(path))
            continue
        inside = sorted(
            str(file)
            for file in Path(path).rglob("*")
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        if not inside:
            raise UserError(f"no images in {path} (files that end in {', '.join(sorted(IMAGE_SUFFIXES))})")
        found += inside
    return found


def _prepared(
    preprocessing: Preprocessing | None,
    images: Iterable[Picture],
    on_bad_image: Callable[[ImageError], object] | None,
) -> Iterator[tuple[str | None, Tensor]]:
    """Every image's file and its input (C, H, W)."""
    for number, image in enumerate(images):
        if isinstance(image, Tensor):
            if image.dim() not in (3, 4) or not image.is_floating_point():
                raise TypeError(
                    "predict: a tensor must be floating, (C, H, W) or (N, C, H, W), prepared as the network takes it, "
                    f"got {image.dtype} of shape {list(image.shape)}"
                )
            yield from ((None, x) for x in (image if image.dim() == 4 else image[None]))
            continue
        if preprocessing is None:
            raise ValueError(
                "predict: net.preprocessing must say how images become inputs, got None; give it an "
                "aep_ext.export.Preprocessing, or give predict tensors"
            )
        file = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        if file is None and not hasattr(image, "convert"):
            raise TypeError(f"predict: an image must be a path, a Pillow image or a tensor, got {type(image).__name__}")
        try:
            with image_errors(f"image {number}" if file is None else file):
                if file is None:
                    x = preprocessing(image)
                else:
                    with open_image(Path(file)) as opened:
                        x = preprocessing(opened)
        except ImageError as error:
            if on_bad_image is None:
                raise
            on_bad_image(error)
        else:
            yield file, x


def _answer(net: GatedNet | MultiExitNet | CompiledNet, x: Tensor) -> GatedOutput:
    """As a gated network answers; without gates, at the last exit."""
    with torch.inference_mode(), nullcontext() if isinstance(net, CompiledNet) else eval_mode(net):
        if isinstance(net, GatedNet):
            return net(x.to(net.enabled.device))
        weights = net.output_weights
        found = ops.ensemble_stats(net.exit_logits(x.to(weights.device)), weights, normalizer=weights.sum())
        return GatedOutput(found.logits, torch.full_like(found.argmax, net.num_exits - 1), found.stats[:, 0])
