"""Data that is damaged, mislabelled or odd: one line that names the file, or a warning."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("PIL", reason="images need Pillow")

from PIL import Image

from aep_ext.training import ImageDataModule, UserError
from aep_ext.training.data import load_splits


def rewritten(archive: Path, **changes: Any) -> str:
    """The archive with other arrays under some names (None: without)."""
    arrays = {**np.load(archive), **changes}
    path = archive.with_name("changed.npz")
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def refused(spec: str, rule: str, **options: Any) -> None:
    with pytest.raises(UserError, match=rule) as caught:
        ImageDataModule(spec, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (np.full(40, 0.6), r"train_labels must be integers, got \[0.6\] of type float64"),
        (np.full(40, 3), r"train_labels must be within 0..2 \(3 classes\), got 3"),
        (np.full(40, -1), r"train_labels must be within 0..2 \(3 classes\), got -1"),
        (np.full(40, 1 << 40), rf"train_labels must be within 0..2 \(3 classes\), got {1 << 40}"),
        (np.full(40, (1 << 64) - 1, np.uint64), rf"got {(1 << 64) - 1}"),
        (np.zeros((40, 1), int), r"train_labels_?.* (no array of shape|shape \[40, 1\])"),
        (np.array(["cat"] * 40), r"train_labels must be integers, got \['cat'\] of type <U3"),
        (np.zeros(39, int), r"train_offsets must be one more than the 39 labels, got 41"),
        (np.zeros(0, int), r"train_labels must be a list of at least one, got shape \[0\]"),
    ],
)
def test_labels_that_are_refused(archive: Path, labels: np.ndarray, rule: str) -> None:
    refused(rewritten(archive, train_labels=labels), rf"^no such data: .*changed.npz is not an archive .*{rule}")


def test_offsets_that_are_refused(archive: Path) -> None:
    offsets = np.load(archive)["train_offsets"]
    swapped, negative, beyond = offsets.copy(), offsets.copy(), offsets.copy()
    swapped[[3, 4]], negative[0], beyond[-1] = swapped[[4, 3]], -1, offsets[-1] + 1
    for wrong in (swapped, negative, beyond):
        refused(rewritten(archive, train_offsets=wrong), "changed.npz .*train_offsets must ascend within 0..")
    refused(rewritten(archive, train_offsets=offsets.astype(float)), "train_offsets integers, got uint8, float64")
    refused(rewritten(archive, train_bytes=None), "changed.npz .*train_bytes.npy")


def test_headers_that_promise_too_much(tmp_path: Path, archive: Path) -> None:
    """A header of 8 TB, an array of Python objects, a gigabyte of zeros: nothing of it is allocated or run."""

    def header(shape: tuple[int, ...], descr: str) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": descr})
        return buffer.getvalue()

    for content, rule in (
        (header((1 << 40,), "<i8") + bytes(8), "holds 8 bytes, which are no array of shape"),
        (header((1,), "|O") + b"cos\nsystem\n(S'false'\ntR.", "no array of shape .* and type object"),
        (header((2 << 30,), "|u1"), "holds 0 bytes"),
        (b"text", "magic string|EOF|bytes"),
    ):
        path = tmp_path / "header.npz"
        with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                target.writestr(name, content if name == "train_labels.npy" else source.read(name))
        refused(str(path), rf"^no such data: .*header.npz .*({rule})")


def test_a_bomb_of_an_archive(tmp_path: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aep_ext.training import sources

    monkeypatch.setattr(sources, "MEMBER_LIMIT", 1 << 16)
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, **{**np.load(archive), "train_bytes": np.zeros(1 << 20, np.uint8)})
    refused(str(path), "bomb.npz .*train_bytes is a decompression bomb: .* become")


def test_cut_and_empty_archives(tmp_path: Path, archive: Path) -> None:
    whole = archive.read_bytes()
    for count in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.npz").write_bytes(whole[:count])
        refused(str(tmp_path / "cut.npz"), "^no such data: .*cut.npz is not an archive of image files")


def test_titles_of_archives(archive: Path) -> None:
    from aep_ext.training.splits import CIFAR10_CLASSES

    few = rewritten(archive, classes=np.array(CIFAR10_CLASSES))
    assert load_splits(str(archive)).title == "images.npz" and load_splits(few).title == "changed.npz"


class _Labelled:
    def __init__(self, labels: Any, classes: list[str] | None = None) -> None:
        self.targets = labels
        if classes:
            self.classes = classes

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("L", (4, 4), index), 0

    def __len__(self) -> int:
        return len(self.targets)


@pytest.mark.parametrize(
    ("labels", "classes", "rule"),
    [
        ([0.6] * 40, None, "must be integers"),
        ([0, 1 << 40] * 20, None, rf"must be within 0..39 \(40 classes\), got {1 << 40}"),
        ([0, -1] * 20, None, "got -1"),
        ([0, 2] * 20, ["a", "b"], r"must be within 0..1 \(2 classes\), got 2"),
        ([], None, "at least one"),
    ],
)
def test_labels_of_torchvision(
    monkeypatch: pytest.MonkeyPatch, labels: Any, classes: list[str] | None, rule: str
) -> None:
    from aep_ext.training import sources

    with pytest.raises(ValueError, match=rule):
        sources._torchvision_sources({"all": _Labelled(labels, classes)}, "Labelled")


def test_a_folder_that_may_not_be_read(tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "images", {"": 20})

    def denied(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    refused(str(root), "^no such data: .*images: Permission denied$")


def test_hidden_files_and_folders_are_no_images(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path / "images", {"": 20})
    (root / ".ipynb_checkpoints").mkdir()
    (root / "cat" / "._1.png").write_bytes(b"a Mac's notes")
    assert ImageDataModule(str(root)).splits.classes == ("cat", "dog")


def test_bad_images_are_skipped_and_listed(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path / "images", {"train": 20, "test": 6})
    for name in ("train/cat/3.png", "train/dog/0.png", "test/dog/5.png"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    Image.fromarray(np.full((5, 7), 9, np.float32)).save(root / "test" / "cat" / "hot.tif")
    refused(str(root), r"images/train/(cat/3|dog/0).png cannot be read as an image .*; --skip-bad-images leaves")
    for cache in (2 << 30, 10):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("aep_ext.training.dataset.CACHE_BYTES", cache)
            data = ImageDataModule(str(root), skip_bad_images=True)
            line = data.warnings()[0]
        assert sum(len(data.dataset(role)) for role in ("train", "val")) == 38 and len(data.dataset("test")) == 11
        listed = [f"images/{n}" for n in ("test/cat/hot.tif", "test/dog/5.png", "train/cat/3.png", "train/dog/0.png")]
        assert data.describe()["skipped"] == listed
        assert line == f"4 images that cannot be read were left out: {', '.join(listed[:3])}, ..."
        for role in ("train", "val", "test"):
            images, labels = data.dataset(role).__getitems__(list(range(len(data.dataset(role)))))
            assert len(images) == len(labels) == data.describe()["splits"][role]["samples"]


def test_too_few_images_are_left(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path / "images", {"train": 10, "val": 2, "test": 2})
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="too few images: images in images leaves 0 to val"):
        ImageDataModule(str(root), skip_bad_images=True).warnings()


def test_an_extra_that_is_missing_is_no_bad_image(tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "images", {"": 20})
    monkeypatch.setitem(sys.modules, "PIL.ImageOps", None)
    refused(str(root), r"needs PIL: pip install 'aep_ext\[train\]'", skip_bad_images=True)


def test_a_decompression_bomb_is_named(tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path / "images", {"": 20})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    refused(str(root), r"/\d+.png cannot be read as an image \(.*decompression bomb")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_a_folder_of_wide_images_gives_sensible_pixels(tmp_path: Path, mode: str) -> None:
    generator = np.random.default_rng(0)
    for name, level in (("dark", 0.2), ("light", 0.7)):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for number in range(20):
            values = np.clip(level + generator.normal(0, 0.05, (10, 12)), 0, 1)
            pixels = (values * 65535).astype(np.uint16) if mode == "I;16" else values.astype(np.float32)
            Image.fromarray(pixels).save(tmp_path / "wide" / name / f"{number}.{'png' if mode == 'I;16' else 'tif'}")
    data = ImageDataModule(str(tmp_path / "wide"))
    assert data.channels == 1 and data.preprocessing.image_size == 10
    found = data.dataset("train")
    pixels = found.pixels(list(range(len(found)))).double() / 255
    for label, level in enumerate((0.2, 0.7)):
        assert float(pixels[found.labels == label].mean()) == pytest.approx(level, abs=0.01)
    assert len(pixels.unique()) > 50


def images(root: Path, splits: dict[str, dict[str, list[int]]]) -> str:
    """Plain grey images of these levels."""
    for split, classes in splits.items():
        for name, levels in classes.items():
            (root / split / name).mkdir(parents=True)
            for number, level in enumerate(levels):
                Image.new("L", (4, 4), level).save(root / split / name / f"{number}.png")
    return str(root)


@pytest.mark.parametrize(
    ("splits", "lines"),
    [
        ({"train": {"a": [1, 2], "b": [3, 4]}, "val": {"a": [5], "b": [6]}, "test": {"a": [7], "b": [8]}}, []),
        (
            {"train": {"a": [1, 2], "b": [3, 4]}, "val": {"a": [5]}, "test": {"b": [8]}},
            ["no val images of 1 of 2 classes: b", "no test images of 1 of 2 classes: a"],
        ),
        (
            {"train": {"a": [1, 2, 3]}, "val": {"a": [5]}, "test": {"a": [8]}},
            ["all images are of one class: a"],
        ),
        (
            {"train": {"a": [1, 2], "b": [3, 4]}, "val": {"a": [5], "b": [3]}, "test": {"a": [2, 5], "b": [8]}},
            [
                "1 of 3 test images are also train images, pixel for pixel",
                "1 of 2 val images are also train images, pixel for pixel",
                "1 of 3 test images are also val images, pixel for pixel",
            ],
        ),
        (
            {"train": {"a": [1, 1], "b": [1, 1]}, "val": {"a": [1], "b": [1]}, "test": {"a": [1], "b": [1]}},
            [
                "all images are identical",
                "2 of 2 test images are also train images, pixel for pixel",
                "2 of 2 val images are also train images, pixel for pixel",
                "2 of 2 test images are also val images, pixel for pixel",
            ],
        ),
    ],
)
def test_warnings(tmp_path: Path, splits: Any, lines: list[str]) -> None:
    assert ImageDataModule(images(tmp_path / "images", splits)).warnings() == lines


def test_the_digits_give_no_warning() -> None:
    assert ImageDataModule("digits").warnings() == []


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([(100, 60)] * 40, 60), ([(500, 900)] * 40, 224), ([(90, 60)] * 13 + [(30, 40)] * 14 + [(200, 100)] * 13, 60)],
)
def test_the_size_is_the_median_shorter_side(tmp_path: Path, sizes: list[tuple[int, int]], expected: int) -> None:
    for number, size in enumerate(sizes):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number:02}.png")
    spec = str(tmp_path / "images")
    assert load_splits(spec).image_size == expected
    assert ImageDataModule(spec, image_size=8).dataset("test").pixels([0]).shape == (1, 3, 8, 8)


def test_one_colour_image_makes_colour_data(tmp_path: Path, tree: Any) -> None:
    root = tree(tmp_path / "images", {"": 20}, mode="L")
    assert load_splits(str(root)).channels == 1
    Image.new("RGB", (7, 5), (1, 2, 3)).save(root / "dog" / "7.png")
    assert load_splits(str(root)).channels == 3


def test_sizes_and_resizing_of_a_run(tmp_path: Path, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from aep_ext.surgery import networks
    from aep_ext.training import RunConfig

    root = str(tree(tmp_path / "images", {"": 20}))

    def size(**given: Any) -> int:
        return ImageDataModule.of_config(RunConfig(**given).resolved()).preprocessing.image_size

    assert size() == 16 and size(recipe="paper") == 64 and size(image_size=9, recipe="paper") == 9
    assert size(data=root) == 5 and size(data=root, recipe="paper") == 64 and size(data=root, recipe="cifar") == 5
    monkeypatch.setattr(networks, "image_size", lambda name, weights: 12 if weights else None)
    assert size(data=root, weights="DEFAULT") == 12 and size(data=root, weights="DEFAULT", image_size=7) == 7
    data = ImageDataModule.of_config(RunConfig(data=root, resize="squash").resolved())
    assert data.preprocessing.resize == "squash" and ImageDataModule(root).preprocessing.resize == "crop"
    with pytest.raises(UserError, match=r"no such resize: 'stretch' \(there are: crop, squash\)"):
        RunConfig(resize="stretch").resolved()
    assert torch.equal(data.dataset("test").labels, ImageDataModule(root).dataset("test").labels)


def test_runs_that_name_no_resizing_squashed(tmp_path: Path) -> None:
    from aep_ext.training.folder import RunFolder

    for entry, expected in (({}, "squash"), ({"resize": None}, None), ({"resize": "crop"}, "crop")):
        (tmp_path / "config.json").write_text(json.dumps({"version": 2, "image_size": 16, **entry}))
        assert RunFolder(tmp_path).stored().resize == expected


@pytest.mark.slow
def test_a_run_says_its_size_its_warnings_and_what_it_skipped(tmp_path: Path, tree: Any) -> None:
    from aep_ext.training import Progress, calibrate_run, run

    root = tree(tmp_path / "images", {"train": 20, "test": 6})
    (root / "train" / "cat" / "3.png").write_bytes(b"")
    twin = (root / "train" / "dog" / "1.png").read_bytes()
    (root / "test" / "dog" / "1.png").write_bytes(twin)
    lines: list[str] = []
    given = {"data": str(root), "epochs": 1, "batch_size": 16, "device": "cpu", "threads": 1, "skip_bad_images": True}
    results = run({**given, "terminate": False, "output": str(tmp_path / "run")}, progress=Progress(lines.append))
    assert "images: 5 x 5 pixels (shorter side resized, then cut square; --image-size says another size)" in lines
    notices = [
        "1 images that cannot be read were left out: images/train/cat/3.png",
        "1 of 12 test images are also train images, pixel for pixel",
    ]
    assert [f"warning: {line}" for line in notices] == [line for line in lines if line.startswith("warning")]
    assert results["data"]["skipped"] == ["images/train/cat/3.png"] and results["notices"][:2] == notices
    assert results["data"]["splits"]["train"]["samples"] + results["data"]["splits"]["val"]["samples"] == 39
    assert results["recipe"]["image_size"] == results["data"]["preprocessing"]["image_size"] == 5
    again = calibrate_run(tmp_path / "run", {"budget": 50.0})
    assert again["data"] == results["data"] and again["notices"][:2] == notices


def test_sizes_of_networks() -> None:
    from aep_ext.surgery import networks

    assert networks.image_size("resnet_small") is None and networks.image_size("resnet_small", "DEFAULT") is None
    pytest.importorskip("torchvision", reason="asks torchvision's weights")
    assert networks.image_size("torchvision/resnet18") is None and networks.image_size("resnet50", "DEFAULT") == 224
    assert networks.image_size("torchvision/efficientnet_b5", "DEFAULT") == 456
    assert networks.image_size("torchvision/nonsense", "DEFAULT") is None
    pytest.importorskip("timm", reason="asks timm's weights")
    assert (
        networks.image_size("timm/resnet18") is None and networks.image_size("timm/swin_tiny_patch4_window7_224") == 224
    )
    assert networks.image_size("timm/resnet18", "a1_in1k") == networks.image_size("timm/resnet18", "DEFAULT") == 224
    assert networks.image_size("timm/nonsense", "DEFAULT") is None
