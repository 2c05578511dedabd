"""Images of every mode as a network's input."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images need Pillow")

from PIL import Image

from aep_ext._utils import UserError
from aep_ext.export.preprocessing import Preprocessing, image_errors, open_image

GREY, COLOUR = Preprocessing(8, 1, (0.5,), (0.25,)), Preprocessing(8, 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def test_tensors() -> None:
    pixels = (RAMP * 255).astype(np.uint8)
    assert torch.equal(GREY.pixels(Image.fromarray(pixels)), torch.from_numpy(pixels)[None])
    answer = COLOUR(Image.fromarray(pixels))
    assert answer.shape == (3, 8, 8) and answer.dtype == torch.float32
    expected = (torch.from_numpy(pixels) / 255 - 0.6) / 0.4
    torch.testing.assert_close(answer[2], expected)


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("format", ["as it is", "TIFF"])
def test_wide_values_are_scaled(tmp_path: Path, kind: str, format: str) -> None:
    dtypes = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4", "F": "<f4"}
    values = (RAMP * (1 if kind == "F" else 65535)).astype(dtypes[kind])
    image = Image.fromarray(values)
    assert image.mode == kind
    if format == "TIFF":
        image.save(tmp_path / "x.tif")
        image = open_image(tmp_path / "x.tif")
    for preprocessing in (GREY, COLOUR):
        found = preprocessing.pixels(image)
        assert float((found.double() / 255 - torch.from_numpy(RAMP)).abs().max()) < 0.003


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (np.full((4, 4), 200.0, np.float32), r"mode F must have values within 0..1, got 200.0..200.0"),
        (np.full((4, 4), -0.1, np.float32), r"mode F .* got -0.1"),
        (np.full((4, 4), np.nan, np.float32), r"mode F .* got nan..nan"),
        (np.full((4, 4), 65536, np.int32), r"mode I must have values within 0..65535, got 65536..65536"),
        (np.full((4, 4), -1, np.int32), r"mode I .* got -1..-1"),
    ],
)
def test_values_out_of_range_are_refused(values: np.ndarray, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        GREY.pixels(Image.fromarray(values))


def test_modes_of_eight_bits() -> None:
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    see_through = Image.new("RGBA", (8, 8), (200, 100, 50, 0))
    for image in (colour, see_through, colour.convert("P", palette=Image.Palette.ADAPTIVE), see_through.quantize(4)):
        assert COLOUR.pixels(image)[:, 0, 0].tolist() == pytest.approx([200, 100, 50], abs=3)  # transparency is dropped
    assert COLOUR.pixels(colour.convert("CMYK"))[:, 0, 0].tolist() == [200, 100, 50]
    for mode in ("1", "L", "LA", "P"):
        assert COLOUR.pixels(Image.new(mode, (8, 8))).unique().tolist() == [0]
    assert GREY.pixels(colour)[0, 0, 0] == Image.Image.convert(colour, "L").getpixel((0, 0))


def test_exif_rotation() -> None:
    pixels = (RAMP * 255).astype(np.uint8)
    upright = Image.fromarray(pixels)
    for orientation, turned in ((1, pixels), (3, pixels[::-1, ::-1]), (6, np.rot90(pixels)), (2, pixels[:, ::-1])):
        stored = Image.fromarray(np.ascontiguousarray(turned))
        stored.getexif()[0x0112] = orientation
        assert torch.equal(GREY.pixels(stored), GREY.pixels(upright)), orientation


def test_crop_keeps_the_aspect() -> None:
    """The centre of a wide and of a high image; a circle stays a circle."""
    y, x = np.mgrid[:60, :120]
    circle = (((x - 59.5) ** 2 + (y - 29.5) ** 2 < 20**2) * 255).astype(np.uint8)
    preprocessing = Preprocessing(30, 1, (0.0,), (1.0,))
    for image in (circle, circle.T):
        found = preprocessing.pixels(Image.fromarray(np.ascontiguousarray(image)))[0].double() / 255
        assert float(found.sum()) == pytest.approx(np.pi * 10**2, rel=0.02)
        for side in (0, 1):
            assert int((found.amax(side) > 0.5).sum()) == 20
    squashed = Preprocessing(30, 1, (0.0,), (1.0,), resize="squash").pixels(Image.fromarray(circle))[0]
    assert int((squashed.amax(0) > 127).sum()) == 10


def test_a_long_image_costs_no_more_than_itself() -> None:
    assert COLOUR.pixels(Image.new("RGB", (1, 60000))).shape == (3, 8, 8)
    assert Preprocessing(2000, 1, (0.0,), (1.0,)).pixels(Image.new("L", (60000, 1))).shape == (1, 2000, 2000)


def test_crop_is_torchvision_s_resize_and_centre_crop() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="compares with torchvision's transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 144, 3), dtype=np.uint8))
    theirs = transforms.Compose(
        [transforms.Resize(32, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(32)]
    )
    ours = Preprocessing(32, 3, (0.0,) * 3, (1.0,) * 3).pixels(image)
    inner = np.s_[:, :, 2:-2]  # at the cut, theirs also sees what lies beyond
    difference = transforms.functional.pil_to_tensor(theirs(image))[inner].int() - ours[inner].int()
    assert int(difference.abs().max()) <= 1


def test_to_and_from_dict() -> None:
    assert Preprocessing.from_dict(COLOUR.to_dict()) == COLOUR
    old = {"classes": ["a"], "image_size": 8, "channels": 1, "normalisation": {"mean": [0.5], "std": [0.25]}}
    assert Preprocessing.from_dict(old) == Preprocessing(8, 1, (0.5,), (0.25,), resize="squash")


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 0},
        {"image_size": 8.0},
        {"image_size": True},
        {"channels": 2},
        {"channels": None},
        {"mean": [0.5, 0.5]},
        {"mean": None},
        {"mean": ["a"]},
        {"std": [0.0]},
        {"std": [float("nan")]},
        {"resize": "stretch"},
        {"more": 1},
    ],
)
def test_entries_that_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="Preprocessing"):
        Preprocessing.from_dict({**GREY.to_dict(), **change})


@pytest.mark.parametrize("values", [{}, None, [], "crop", {"normalisation": {}}, {"normalisation": {"mean": [0.5]}}])
def test_no_preprocessing_at_all(values: object) -> None:
    with pytest.raises(ValueError, match="Preprocessing"):
        Preprocessing.from_dict(values)  # type: ignore[arg-type]


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:60])
    floats = tmp_path / "floats.tif"
    Image.fromarray(np.full((4, 4), 7, np.float32)).save(floats)

    def read(path: Path) -> None:
        with image_errors(str(path)):
            COLOUR(open_image(path))

    read(whole)
    for path, why in ((cut, "truncated|broken"), (floats, "within 0..1"), (tmp_path / "absent.png", "No such file")):
        with pytest.raises(UserError, match=rf"^[^\n]*{path.name} cannot be read as an image \([^\n]*({why})[^\n]*\)$"):
            read(path)
    for limit in (40, 20):  # Pillow warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(), pytest.raises(UserError, match="whole.png .*decompression bomb"):
            read(whole)
