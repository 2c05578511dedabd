"""Small data and small runs for the training's tests."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# One thread: threads that wait for one another on a busy machine make tiny networks slow.
TINY = {
    "image_size": 8,
    "train_samples": 300,
    "epochs": 2,
    "batch_size": 32,
    "device": "cpu",
    "threads": 1,
    "methods": ("mixed",),
}


@pytest.fixture(scope="session", autouse=True)
def _quickly() -> Iterator[None]:
    """Two folds of a cross-validation where a run takes ten, and latencies from a few calls: neither is tested here."""
    pytest.importorskip("lightning", reason="the training needs lightning")
    from aep_ext.training import evaluate, gates

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluate, "SECONDS_A_NETWORK", 0.02)
        patched.setattr(gates, "SINGLES", 32)
        patched.setattr(gates, "calibrate", partial(gates.calibrate, folds=2))
        yield


@pytest.fixture
def data() -> Any:
    """A data module: 96 digits to learn from, 8 x 8 pixels."""
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from aep_ext.training import ImageDataModule

    return ImageDataModule("digits", image_size=8, batch_size=32, train_samples=96)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """A finished run of two seeds and two families of exit weights: its folder, its results, the lines it printed."""
    from aep_ext.training import Progress, run

    folder = tmp_path_factory.mktemp("finished") / "run"
    lines: list[str] = []
    asked = {"seeds": (0, 1), "methods": ("mixed", "ASC"), "margin": 8.0}
    results = run({**TINY, **asked, "output": str(folder)}, progress=Progress(lines.append))
    yield folder, results, lines


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file of an array (H, W) or (H, W, 3), uint8."""
    image = pytest.importorskip("PIL.Image", reason="images need Pillow").fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """An .npz of image files in the layout of the CIFAR-10 JPEG copy: 40 training and 10 test images, 3 classes."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"classes": np.array(["cat", "dog", "<ship>"])}
    for split, count in (("train", 40), ("test", 10)):
        files = [encoded(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(files), dtype=np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, files)]).astype(np.int64)
        arrays[f"{split}_labels"] = (np.arange(count) % 3).astype(np.uint8)
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def image_tree(
    root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), mode: str = "RGB"
) -> Path:
    """A folder of images: for every split ("" for none) so many images of every class."""
    generator = np.random.default_rng(0)
    shape = (5, 7) if mode == "L" else (5, 7, 3)
    for split, count in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").write_bytes(encoded(generator.integers(0, 256, shape, dtype=np.uint8)))
            (folder / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="session")
def tree() -> Any:
    """The function that makes a folder of images."""
    return image_tree


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def equal_weights() -> Any:
    """The function that compares two state dicts."""
    return same_weights
