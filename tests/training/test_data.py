"""Sources, data sets and data modules."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("PIL", reason="images need Pillow")

from PIL import Image

from aep_ext.export import Preprocessing
from aep_ext.training import ImageDataModule, UserError, sources
from aep_ext.training.data import load_splits
from aep_ext.training.dataset import EpochSampler, ImageDataset, batches, measured_normalisation
from aep_ext.training.splits import CIFAR10_CLASSES, PUBLISHED


def plain(size: int, channels: int = 1) -> Preprocessing:
    """Without normalisation."""
    return Preprocessing(size, channels, (0.0,) * channels, (1.0,) * channels)


def test_digits_have_three_disjoint_splits() -> None:
    splits = load_splits("digits")
    parts = [indices for _, indices in splits.parts.values()]
    assert [len(part) for part in parts] == [897, 360, 540]
    assert sorted(torch.cat(parts).tolist()) == list(range(1797))
    again = load_splits("digits")
    assert all(torch.equal(a[1], b[1]) for a, b in zip(splits.parts.values(), again.parts.values(), strict=True))


def test_digits_keep_their_grey_levels() -> None:
    source = sources.digits()
    datasets = pytest.importorskip("sklearn.datasets")
    pixels = source.pixels(5, plain(8))
    assert torch.equal((pixels[0].double() * 16 / 255).round(), torch.from_numpy(datasets.load_digits().images[5]))


@pytest.mark.parametrize("channels", [1, 3])
def test_decode_is_the_published_transform(channels: int) -> None:
    pytest.importorskip("torchvision", reason="compares with torchvision's transforms")
    from torchvision.transforms import Compose, InterpolationMode, Normalize, Resize, ToTensor

    pixels = np.random.default_rng(1).integers(0, 256, (32, 28, 3) if channels == 3 else (32, 28), dtype=np.uint8)
    mean, std = [0.4] * channels, [0.3] * channels
    resize = Resize((64, 64), interpolation=InterpolationMode.BICUBIC, antialias=True)
    theirs = Compose([resize, ToTensor(), Normalize(mean, std)])(Image.fromarray(pixels))
    source = sources.Source(lambda index: Image.fromarray(pixels), torch.tensor([0]), ("a",))
    ours, _ = ImageDataset(source, torch.tensor([0]), Preprocessing(64, channels, mean, std, resize="squash"))[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_cached_and_uncached_images_agree() -> None:
    source, indices = sources.digits(), torch.tensor([3, 1, 4, 1])
    how = Preprocessing(12, 3, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    cached, lazy = ImageDataset(source, indices, how), ImageDataset(source, indices, how, cache_bytes=10)
    assert cached._cache is not None and lazy._cache is None
    for a, b in zip(cached.__getitems__([2, 0]), lazy.__getitems__([2, 0]), strict=True):
        assert torch.equal(a, b)
    images, labels = cached.__getitems__([])
    assert images.shape == (0, 3, 12, 12) == lazy.__getitems__([])[0].shape and labels.shape == (0,)
    assert torch.equal(cached[1][0], cached.__getitems__([1])[0][0]) and cached[1][1] == source.labels[1]


def test_measured_normalisation() -> None:
    some = ImageDataset(sources.digits(), torch.arange(100), plain(8))
    mean, std = measured_normalisation(some)
    images, _ = some.__getitems__(list(range(100)))
    assert mean == pytest.approx((float(images.mean()),), abs=1e-5)
    assert std == pytest.approx((float(images.std(correction=0)),), abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "mean", "std"),
    [
        ("imagenet", (0.485,), (0.229,)),
        ("cifar10", PUBLISHED["cifar10"].mean[:1], PUBLISHED["cifar10"].std[:1]),
        ("0.5/0.25", (0.5,), (0.25,)),
        ("measured", None, None),
        (None, None, None),
    ],
)
def test_normalisation_by_name_or_numbers(asked: str | None, mean: Any, std: Any) -> None:
    data = ImageDataModule("digits", normalize=asked, image_size=8)
    if mean is None:
        raw = ImageDataset(*data.splits.parts["train"], plain(8))
        mean, std = measured_normalisation(raw)
    assert (data.preprocessing.mean, data.preprocessing.std) == (mean, std)
    assert ImageDataModule("digits", normalize="0.5/0.25", channels=3).preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("soup", "no such normalize: 'soup' .*measured, cifar10.*imagenet"),
        ("0.5", "no such normalize: '0.5'"),
        ("0.5/a", "no such normalize"),
        ("0.5,0.5/1", "normalize must be as many means as standard deviations, got '0.5,0.5/1'"),
        ("0.5/0", "^std must be positive and finite, got 0"),
        ("nan/1", "^mean must not be NaN"),
    ],
)
def test_normalisations_that_are_none(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImageDataModule("digits", normalize=asked)


def test_transforms_of_training_images() -> None:
    """As torchvision's: an image by itself, before it is normalised; other splits have none."""
    options: dict[str, Any] = {"image_size": 8, "batch_size": 64, "train_samples": 64}
    bare = ImageDataModule("digits", **options)
    seen: list[torch.Tensor] = []

    def inverted(image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        return 255 - image

    images, labels = next(iter(ImageDataModule("digits", transform=inverted, **options).train_dataloader()))
    expected, same = next(iter(bare.train_dataloader()))
    mean, std = bare.preprocessing.mean[0], bare.preprocessing.std[0]
    torch.testing.assert_close(images, (1 - (expected * std + mean) - mean) / std)
    assert torch.equal(labels, same) and len(seen) == 64
    assert seen[0].dtype == torch.uint8 and seen[0].shape == (1, 8, 8)
    scaled = ImageDataModule("digits", transform=lambda image: image.float() / 255, **options)
    torch.testing.assert_close(next(iter(scaled.train_dataloader()))[0], expected)
    assert torch.equal(next(iter(scaled.val_dataloader()))[0], next(iter(bare.val_dataloader()))[0])
    for bad, found in (
        (lambda image: image[:, 1:], r"torch.uint8 of shape \[1, 7, 8\]"),
        (lambda image: image.numpy(), "ndarray"),
    ):
        with pytest.raises(ValueError, match=rf"transform must give tensors of one dtype .*\[1, 8, 8\], got {found}"):
            next(iter(ImageDataModule("digits", transform=bad, **options).train_dataloader()))


def test_the_real_torchvision_s_transforms() -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", reason="torchvision is not installed", exc_type=ImportError)
    transform = v2.Compose(
        [v2.RandomCrop(8, padding=1), v2.ColorJitter(0.2), v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(1.0)]
    )
    data = ImageDataModule("digits", image_size=8, batch_size=32, train_samples=64, transform=transform)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8) and images.dtype == torch.float32 and bool(images.isfinite().all())


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = EpochSampler(20, seed=1), EpochSampler(20, seed=1)
    first.set_epoch(3)
    second.set_epoch(2)
    assert list(first) != list(second)
    second.set_epoch(3)
    assert list(first) == list(second) == list(first) and sorted(first) == list(range(20)) and len(first) == 20
    assert list(EpochSampler(20, seed=2)) != list(EpochSampler(20, seed=1))


def test_a_lone_last_sample_is_left_out_of_the_training() -> None:
    dataset = ImageDataset(sources.digits(), torch.arange(9), plain(8))
    assert [len(labels) for _, labels in batches(dataset, 4, sampler=EpochSampler(9, 0))] == [4, 4]
    assert [len(labels) for _, labels in batches(dataset, 4)] == [4, 4, 1]
    assert [len(labels) for _, labels in batches(dataset, 5, sampler=EpochSampler(9, 0), workers=1)] == [5, 4]


def test_jpeg_archive(archive: Path) -> None:
    for spec in (str(archive), f"cifar10-jpeg:{archive}"):
        data = ImageDataModule(spec, image_size=6)
        assert data.splits.title == "images.npz" and data.channels == 3 and data.num_classes == 3
        assert [len(data.dataset(role)) for role in ("train", "val", "test")] == [36, 4, 10]
        assert data.describe()["classes"] == ["cat", "dog", "<ship>"]
    found = sources.jpeg_archive(archive)
    assert found["train"].image(7).size == (6, 6) and found["train"].labels[:4].tolist() == [0, 1, 2, 0]


def test_jpeg_archive_of_cifar_s_size_gets_the_published_split(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(count: int) -> sources.Source:
        labels = torch.arange(count) % 10
        return sources.Source(lambda index: Image.new("RGB", (2, 2)), labels, CIFAR10_CLASSES)

    monkeypatch.setattr(sources, "jpeg_archive", lambda path: {"train": source(50000), "test": source(10000)})
    splits = load_splits("some/cifar.npz")
    train, val = PUBLISHED["cifar10"].split()
    assert torch.equal(splits.parts["train"][1], train) and torch.equal(splits.parts["val"][1], val)
    assert splits.normalisation == (PUBLISHED["cifar10"].mean, PUBLISHED["cifar10"].std) and splits.weighted is False
    assert len(splits.parts["test"][1]) == 10000


def test_broken_archives(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(UserError, match="no such data: .* is not a file"):
        load_splits(str(tmp_path / "absent.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="no such data: .* is not an archive of image files"):
        load_splits(str(tmp_path / "text.npz"))
    arrays = dict(np.load(archive))
    for name, value in (("train_offsets", arrays["train_offsets"][:-1]), ("classes", None)):
        changed = {key: value if key == name else array for key, array in arrays.items()}
        np.savez(tmp_path / "wrong.npz", **{key: array for key, array in changed.items() if array is not None})
        with pytest.raises(UserError, match="is not an archive of image files"):
            load_splits(str(tmp_path / "wrong.npz"))


def test_folder_without_splits(tmp_path: Path, tree: Any) -> None:
    data = ImageDataModule(str(tree(tmp_path / "images", {"": 20})), image_size=4)
    assert [len(data.dataset(role)) for role in ("train", "val", "test")] == [26, 6, 8]
    assert data.splits.classes == ("cat", "dog") and data.channels == 3 and not data.unbalanced
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (6, 3, 4, 4) and images.dtype == torch.float32 and labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("splits", "sizes"),
    [
        ({"train": 20, "test": 5}, [36, 4, 10]),
        ({"train": 20, "valid": 4, "test": 5}, [40, 8, 10]),
        ({"train": 20}, [30, 4, 6]),
    ],
)
def test_folder_with_splits(tmp_path: Path, tree: Any, splits: dict[str, int], sizes: list[int]) -> None:
    found = load_splits(f"folder:{tree(tmp_path / 'images', splits, mode='L')}")
    assert [len(indices) for _, indices in found.parts.values()] == sizes and found.channels == 1


def test_a_class_that_a_split_lacks_shifts_no_label(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path / "images", {"train": 5, "test": 2}, ("ape", "bat", "cat"))
    for file in (root / "test" / "ape").iterdir():
        file.unlink()
    found = sources.image_folder(root)
    assert found["test"].labels.tolist() == [1, 1, 2, 2] and found["test"].classes == ("ape", "bat", "cat")


def test_folders_without_images(tmp_path: Path, tree: Any) -> None:
    for folder, rule in ((tmp_path, "has no images"), (tmp_path / "absent" / "x", "neither a file nor a folder")):
        with pytest.raises(UserError, match=f"no such data: .*{rule}"):
            load_splits(str(folder))
    with pytest.raises(UserError, match="is not a folder"):
        load_splits(f"folder:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match="no sub-folder train"):
        load_splits(str(tree(tmp_path / "images", {"test": 1})))


def test_too_few_images(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(UserError, match=r"too few images: .* leaves 0 to test \(there must be at least 1\)"):
        ImageDataModule(str(tree(tmp_path / "images", {"": 2})), image_size=4)
    with pytest.raises(UserError, match="leaves 1 to train .* at least 2"):
        ImageDataModule("digits", train_samples=1)


def test_an_image_that_cannot_be_read(tmp_path: Path, tree: Any, archive: Path) -> None:
    root = tree(tmp_path / "images", {"": 20})
    for file in sorted((root / "cat").iterdir()):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"cat.* cannot be read as an image"):
        ImageDataModule(str(root), image_size=4)
    arrays = dict(np.load(archive))
    arrays["train_bytes"] = np.zeros_like(arrays["train_bytes"])
    np.savez(tmp_path / "zeros.npz", **arrays)
    with pytest.raises(UserError, match=r"image \d+ of train in .*zeros.npz cannot be read"):
        ImageDataModule(str(tmp_path / "zeros.npz"), image_size=4)


class _Base:
    """Stands in for torchvision's base class."""


def _fake(count: int, labels: str = "targets") -> type:
    class Fake(_Base):
        def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
            assert download and Path(root).is_dir()
            setattr(self, labels, [index % 3 for index in range(count if train else 6)])
            self.classes = ["a", ("b", "bee"), "c"]

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return Image.new("L", (4, 4), index), index % 3

        def __len__(self) -> int:
            return 20

    return Fake


def _with_splits(known: tuple[str, ...]) -> type:
    class Splits(_Base):
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in known:
                raise ValueError(f"unknown split {split}")
            self.count = {"train": 30, "test": 6}.get(split, 9)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return Image.new("RGB", (4, 4)), index % 2

        def __len__(self) -> int:
            return self.count

    return Splits


class _Whole(_Base):
    def __init__(self) -> None:
        self.labels = np.arange(20) % 4

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", (4, 4)), index % 4


class _Detection(_Whole):
    def __init__(self) -> None:
        self.labels = np.zeros((20, 4))


class _Offline(_Base):
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        raise RuntimeError("Error downloading\nfrom nowhere")


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torchvision's data sets: the real ones need a download."""
    module = types.ModuleType("torchvision.datasets")
    members = {
        "VisionDataset": _Base,
        "Fake": _fake(20),
        "Whole": _Whole,
        "Detection": _Detection,
        "Offline": _Offline,
        "TwoSplits": _with_splits(("train", "test")),
        "ThreeSplits": _with_splits(("train", "val", "test")),
        "MNIST": _fake(30, "labels"),
    }
    module.__dict__.update(members, __all__=[*members, "helper"], helper=print)
    package = types.ModuleType("torchvision")
    package.datasets = module
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("Fake", [18, 2, 6], ("a", "b / bee", "c")),
        ("mnist", [27, 3, 6], ("a", "b / bee", "c")),
        ("TwoSplits", [27, 3, 6], ("0", "1")),
        ("threesplits", [30, 9, 6], ("0", "1")),
        ("Whole", [13, 3, 4], ("0", "1", "2", "3")),
    ],
)
def test_torchvision_by_name(
    torchvision: None, tmp_path: Path, name: str, sizes: list[int], classes: tuple[str, ...]
) -> None:
    data = ImageDataModule(name, image_size=4, data_root=tmp_path / "root")
    assert [len(data.dataset(role)) for role in ("train", "val", "test")] == sizes
    assert data.splits.classes == classes and data.num_classes == len(classes)


def test_torchvision_that_cannot_be_had(torchvision: None, tmp_path: Path) -> None:
    for name, rule in (
        ("Offline", "torchvision's _Offline under .*: Error downloading from nowhere$"),
        ("Detection", "is not a classification data set"),
        ("nonsense", "'nonsense' .*CIFAR10"),
        ("helper", "'helper'"),
    ):
        with pytest.raises(UserError, match=f"no such data: .*{rule}"):
            load_splits(name, tmp_path)


def test_without_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(UserError, match=r"'CIFAR10' needs torchvision: pip install 'aep_ext\[models\]'"):
        load_splits("CIFAR10", tmp_path)


def test_the_real_torchvision() -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="reads torchvision's list of data sets")
    for name in ("CIFAR10", "cifar100", "FashionMNIST", "EuroSAT", "GTSRB"):
        assert sources._dataset_class(datasets, name).__name__.lower() == name.lower()
    data = ImageDataModule("FakeData", image_size=4, train_samples=10)
    assert data.num_classes == 10 and len(data.dataset("train")) == 10


def test_images_held_out_for_the_calibration() -> None:
    every = load_splits("digits").parts["train"][1]
    for given, train, held_out, used in (
        ({}, every, every[:0], "val"),
        ({"train_samples": 96}, every[:96], every[96:], "calibration"),  # more than the 360 validation images
        ({"train_samples": 800}, every[:800], every[800:], "val"),  # fewer, and nobody asked for them
        ({"calibration_samples": 50}, every[:-50], every[-50:], "calibration"),
        ({"calibration_samples": 50, "train_samples": 100}, every[:100], every[100:], "calibration"),
    ):
        data = ImageDataModule("digits", image_size=4, **given)
        parts = {name: indices for name, (_, indices) in data.splits.parts.items()}
        assert torch.equal(parts["train"], train) and torch.equal(parts["calibration"], held_out)
        assert data.calibration_split == used
        described = data.describe()["splits"]
        assert (described["calibration"] or {"samples": 0})["samples"] == len(held_out)
    assert len(next(iter(data.loader("calibration")))[1]) == 256


def test_classes_and_channels() -> None:
    data = ImageDataModule("digits", image_size=8, channels=3, num_classes=12, train_samples=20)
    assert data.num_classes == 12 and len(data.preprocessing.mean) == 3 and not data.unbalanced
    assert next(iter(data.train_dataloader()))[0].shape == (20, 3, 8, 8)
    assert torch.allclose(data.class_weights(), 1797 / (10 * data.splits.counts.float()))
    with pytest.raises(
        UserError, match="fewer classes than labels: 5 classes asked for, but handwritten digits .* label 9"
    ):
        ImageDataModule("digits", num_classes=5)
