"""Batches as loaders yield them: pairs, and dicts as Hugging Face's; every function that reads one reads all."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from aep_ext import MultiExitNet, score_subsets, terminate
from aep_ext._utils import inputs_and_labels, inputs_of
from aep_ext.inference import collect_logits
from aep_ext.surgery import networks

X, Y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3


@pytest.fixture
def net() -> MultiExitNet:
    return networks.build("resnet_small", 3, 1).eval()


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y.tolist(), "more"],
        {"pixel_values": X, "labels": Y},
        {"label": Y.to(torch.int32), "image": X, "path": ["a"] * 12},
        UserDict({"pixel_values": X, "labels": Y}),  # what transformers' BatchFeature is
    ],
    ids=["tuple", "list", "hugging face", "datasets", "user dict"],
)
def test_what_a_batch_may_be(batch: object) -> None:
    x, y = inputs_and_labels("f", batch)
    assert x is X and y.tolist() == Y.tolist() and inputs_of("f", batch) is X


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (X, TypeError, r"f: loader must yield \(x, y\) batches, or dicts with 'labels' or 'label', got Tensor$"),
        ((X,), TypeError, "got tuple of Tensor$"),
        ({"pixel_values": X}, TypeError, "got a dict with 'pixel_values'$"),
        ({"inputs": X, "labels": Y}, TypeError, "'pixel_values' or 'image', got a dict with 'inputs', 'labels'$"),
        (([1.0], Y), TypeError, "got tuple of list, Tensor$"),
        ((X, Y[:3]), ValueError, r"y must be integers of shape \[12\], got torch.int64 of shape \[3\]"),
        ((X, Y > 0), ValueError, r"y must be integers of shape \[12\], got torch.bool"),
    ],
)
def test_what_it_may_not(batch: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        inputs_and_labels("f", batch)


def test_dicts_are_taken_everywhere(net: MultiExitNet) -> None:
    pairs = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    dicts = [{"pixel_values": x, "labels": y} for x, y in pairs]
    assert torch.equal(score_subsets(net, dicts).counts, score_subsets(net, pairs).counts)
    for ours, theirs in zip(collect_logits(net, dicts), collect_logits(net, pairs), strict=True):
        assert torch.equal(ours, theirs)
    gated, other = (terminate(net, batches, budget=100) for batches in (dicts, pairs))
    assert gated.policy == other.policy
    for ours, theirs in zip(gated.predict_all(dicts), gated.predict_all(pairs), strict=True):
        assert torch.equal(ours, theirs)
