"""Writes a small data set in the layout that reference training scripts read: ROOT/{train,validation}/CLASS/N.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aep_ext.training import sources

__all__ = ["write_images"]


def write_images(root: Path, data: str, *, train: int, validation: int, size: int, seed: int = 0) -> dict[str, Any]:
    """Write the images and say what was written.

    Args:
        root: an empty folder, or one that will be made.
        data: ``digits`` (scikit-learn's), or an ``.npz`` of encoded images
            (:func:`aep_ext.training.sources.jpeg_archive`).
        train, validation: how many images of each; both are drawn by ``seed``.
        size: pixels of a side.

    Raises:
        ValueError: there are not as many images.
    """
    if data == "digits":
        title, digits = "handwritten digits (scikit-learn)", sources.digits()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        # Whoever asks for more than there are is told so below.
        parts = {"train": (digits, order[validation:]), "validation": (digits, order[:validation])}
    else:
        title, found = "CIFAR-10 (JPEG copy)", sources.jpeg_archive(Path(data).expanduser())
        generator = torch.Generator().manual_seed(seed)
        parts = {
            split: (found[name], torch.randperm(len(found[name]), generator=generator))
            for split, name in (("train", "train"), ("validation", "test"))
        }
    for split, wanted in (("train", train), ("validation", validation)):
        source, indices = parts[split]
        if not 0 < wanted <= len(indices):
            raise ValueError(f"write_images: {split} must be within 1..{len(indices)}, got {wanted}")
        for name in source.classes:
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for number, index in enumerate(indices[:wanted].tolist()):
            image = source.image(index).convert("RGB").resize((size, size))
            image.save(root / split / source.classes[int(source.labels[index])] / f"{number:05d}.png")
    return {"name": title, "train": train, "validation": validation, "pixels": size, "seed": seed}
