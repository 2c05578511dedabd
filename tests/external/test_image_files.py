"""Images in the layout that reference training scripts read."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
pytest.importorskip("lightning", reason="aep_ext.training needs the extra [train]")
Image = pytest.importorskip("PIL.Image")

from benchmarks.external.image_files import write_images  # noqa: E402


def test_digits_are_written_once_each(tmp_path):
    said = write_images(tmp_path, "digits", train=40, validation=20, size=16)
    files = {split: sorted((tmp_path / split).glob("*/*.png")) for split in ("train", "validation")}
    assert {split: len(found) for split, found in files.items()} == {"train": 40, "validation": 20}
    assert [folder.name for folder in sorted((tmp_path / "validation").iterdir())] == [str(n) for n in range(10)]
    assert (said["train"], said["validation"], said["pixels"]) == (40, 20, 16)
    with Image.open(files["train"][0]) as image:
        assert image.size == (16, 16) and image.mode == "RGB"


def test_more_than_there_are_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"train must be within 1\.\.1777, got 1778"):
        write_images(tmp_path, "digits", train=1778, validation=20, size=8)
