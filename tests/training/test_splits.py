"""Splits, class weights and normalisation of the published experiment, from the copy of its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning", reason="the training needs lightning")

from aep_ext.training.splits import PUBLISHED, class_counts, class_weights, seeded_split, split_sha256

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "published.json").read_text())["datasets"]
NAMES = {"fashionMNIST": "fashionmnist", "eurosatW": "eurosat", "gtsrbW": "gtsrb"}


@pytest.mark.parametrize("name", GOLDEN)
def test_published_split(name: str) -> None:
    golden, ours = GOLDEN[name], PUBLISHED[NAMES.get(name, name)]
    assert (ours.num_classes, ours.channels) == (golden["n_classes"], golden["img_channels"])
    assert (ours.train, ours.val, ours.test) == (golden["train"], golden["val"], golden["test"])
    parts = ours.split()
    hashes = [golden[f"{role}_sha256"] for role in ("train", "val", "test")]
    assert [split_sha256(part) for part in parts] == [digest for digest in hashes if digest is not None]
    assert [len(part) for part in parts] == [golden[role] for role in ("train", "val", "test")][: len(parts)]
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)


@pytest.mark.parametrize("name", GOLDEN)
def test_published_normalisation(name: str) -> None:
    ours = PUBLISHED[NAMES.get(name, name)]
    mean, std = re.search(r"Normalize\(mean=(.*?), std=(.*?)\)\n", GOLDEN[name]["transforms"][0]).groups()
    numbers = [tuple(float(number) for number in re.findall(r"[\d.]+", text)) for text in (mean, std)]
    assert [ours.mean, ours.std] == numbers
    assert len(ours.mean) == len(ours.std) == ours.channels


@pytest.mark.parametrize("name", [name for name in GOLDEN if GOLDEN[name]["class_weights"]])
def test_published_class_weights(name: str) -> None:
    golden, ours = GOLDEN[name], PUBLISHED[NAMES[name]]
    assert ours.weighted
    counts = golden[f"implied_class_counts_of_{ours.total}"]
    assert sum(counts) == ours.total
    assert torch.equal(class_weights(counts), torch.tensor(golden["class_weights"]))


def test_unweighted_sets_are_unweighted() -> None:
    assert {name for name in GOLDEN if GOLDEN[name]["class_weights"]} == {"eurosatW", "gtsrbW"}
    assert [name for name, data in PUBLISHED.items() if data.weighted] == ["eurosat", "gtsrb"]


def test_split_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = seeded_split(10, (6, 3), seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    again = torch.randperm(10, generator=torch.Generator().manual_seed(7))
    assert first.tolist() == again[:6].tolist() and second.tolist() == again[6:9].tolist()


@pytest.mark.parametrize("sizes", [(5, 6), (-1, 2)])
def test_split_refuses_impossible_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"seeded_split: sizes .* at most 10, got"):
        seeded_split(10, sizes)


def test_class_weights_need_every_class() -> None:
    counts = class_counts(torch.tensor([0, 0, 2]), 3)
    assert counts.tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="class_weights: every class must have at least one sample"):
        class_weights(counts)
