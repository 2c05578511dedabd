"""Augmentation of whole batches against an image by itself, and what it costs nobody: dtype, shape, the generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext._recipes import AUGMENTATIONS
from aep_ext.training.augment import augmented, mixed


def images(count: int = 64, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) + 0.5


def seeded(value: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def test_flip_leaves_or_mirrors_each_image() -> None:
    x = images()
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(augmented(x, ["flip"], seeded()), x, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(augmented(x, ["flip"], seeded()), x, strict=True)]
    assert all(f != s for f, s in zip(flipped, same, strict=True)) and 16 < sum(flipped) < 48


@pytest.mark.parametrize(("name", "most", "mode"), [("translate", 2, "reflect"), ("crop", 4, "constant")])
def test_shifts_are_windows_of_the_padded_image(name: str, most: int, mode: str) -> None:
    x = images(400)
    seen = set()
    for image, found in zip(F.pad(x, (most,) * 4, mode=mode), augmented(x, [name], seeded()), strict=True):
        places = [
            (dy, dx)
            for dy in range(2 * most + 1)
            for dx in range(2 * most + 1)
            if torch.equal(image[:, dy : dy + 32, dx : dx + 32], found)
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 0.9 * (2 * most + 1) ** 2


def test_cutout_is_one_square_clipped_at_the_border() -> None:
    found = augmented(images(200), ["cutout"], seeded()) == 0
    assert torch.equal(found, found[:, :1].expand_as(found))
    rows, columns = found[:, 0].any(2), found[:, 0].any(1)
    assert torch.equal(found[:, 0], rows[:, :, None] & columns[:, None, :])
    for marks in (rows, columns):
        lengths = marks.sum(1)
        assert int(lengths.min()) >= 8 and int(lengths.max()) == 16
        assert all("1" * int(n) in "".join(map(str, row.int().tolist())) for row, n in zip(marks, lengths, strict=True))
        assert marks[:, 0].any() and marks[:, -1].any()


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_dtypes_shapes_layouts_and_seeds(name: str) -> None:
    for shape in ((5, 1, 8, 8), (3, 3, 7, 12), (0, 3, 8, 8), (1, 2, 2, 2)):
        x = torch.randint(1, 255, shape, dtype=torch.uint8, generator=seeded(2))
        before = x.clone()
        found = augmented(x, [name], seeded())
        assert found.dtype == torch.uint8 and found.shape == x.shape and torch.equal(x, before)
        assert torch.equal(augmented(x.float(), [name], seeded()), found.float())
        assert torch.equal(augmented(x.to(memory_format=torch.channels_last), [name], seeded()), found)
    x = images(8)
    assert torch.equal(augmented(x, [name], seeded()), augmented(x, [name], seeded()))
    assert not torch.equal(augmented(x, [name], seeded()), augmented(x, [name], seeded(3)))
    torch.manual_seed(1)
    assert torch.equal(augmented(x, [name]), augmented(x, [name], seeded()))  # torch's own generator by default


def test_several_in_their_order() -> None:
    x = images(8)
    assert augmented(x, []) is x
    generator = seeded()
    expected = augmented(augmented(x, ["flip"], generator), ["cutout"], generator)
    assert torch.equal(augmented(x, ["flip", "cutout"], seeded()), expected)


def test_mixup_is_one_share_of_an_image_and_the_one_before() -> None:
    x, y = images(6, 4), torch.eye(10)[torch.tensor([3, 1, 4, 1, 5, 9])]
    shares = []
    for seed in range(200):
        found, soft = mixed(x, y, 0.4, seeded(seed))
        share = float(np.random.default_rng(int(torch.randint(1 << 62, (), generator=seeded(seed)))).beta(0.4, 0.4))
        before = [5, 0, 1, 2, 3, 4]
        assert torch.allclose(found, share * x + (1 - share) * x[before], atol=1e-6)
        assert torch.allclose(soft, share * y + (1 - share) * y[before], atol=1e-6)
        shares.append(share)
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert np.mean(shares) == pytest.approx(0.5, abs=0.08) and np.var(shares) == pytest.approx(1 / 7.2, abs=0.03)
