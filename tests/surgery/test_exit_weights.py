from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aep_ext import ExitWeights


def test_the_four_families():
    assert ExitWeights.uniform(4).loss == ExitWeights.uniform(4).output == (0.25,) * 4
    assert ExitWeights.ascending(4).loss == ExitWeights.ascending(4).output == (0.1, 0.2, 0.3, 0.4)
    assert ExitWeights.descending(4).output == (0.4, 0.3, 0.2, 0.1)
    mixed = ExitWeights.mixed(4)
    assert mixed.loss == (0.4, 0.3, 0.2, 0.1) and mixed.output == (0.1, 0.2, 0.3, 0.4)
    assert ExitWeights.ascending(3).loss == (1 / 6, 2 / 6, 3 / 6)  # not rounded


@given(st.sampled_from(["uniform", "ascending", "descending", "mixed"]), st.integers(1, 40))
def test_named_weights_are_positive_and_sum_to_one(name, exits):
    weights = ExitWeights.named(name, exits)
    assert len(weights) == weights.num_exits == exits
    for values in (weights.loss, weights.output):
        assert min(values) > 0 and math.isclose(sum(values), 1, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("short", "name"),
    [("UNIF", "uniform"), ("ASC", "ascending"), ("DESC", "descending"), ("MIX", "mixed"), ("Hybrid", "mixed")],
)
def test_the_papers_names(short, name):
    assert ExitWeights.named(short, 5) == ExitWeights.named(name, 5)


def test_given_weights_are_taken_as_they_are():
    assert ExitWeights([2, 1]).output == (2.0, 1.0)
    weights = ExitWeights(torch.tensor([0.5, 0.25]), (3.0, 4.0))
    assert weights.loss == (0.5, 0.25) and weights.output == (3.0, 4.0)
    assert weights.loss_tensor().dtype == torch.float32
    assert hash(weights) == hash(ExitWeights((0.5, 0.25), (3.0, 4.0)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "at least one entry, got none"),
        (([1.0, 0.0],), "positive and finite, got 0.0 at position 1"),
        (([1, 1], [1, 1e-60]), "output must be positive and finite, got 1e-60 at position 1"),
        (([1.0, -2.0],), "positive and finite, got -2.0 at position 1"),
        (([math.nan],), "positive and finite, got nan at position 0"),
        (([math.inf],), "positive and finite, got inf at position 0"),
        (([1.0], [1.0, 2.0]), "output must have 1 entries, got 2"),
        ((torch.ones(2, 2),), r"one dimension, got shape \[2, 2\]"),
    ],
)
def test_bad_weights_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExitWeights(*arguments)


def test_bad_kinds_are_refused():
    with pytest.raises(TypeError, match="sequence of numbers, got 3"):
        ExitWeights(3)
    with pytest.raises(ValueError, match="uniform, ascending, descending, mixed.*got 'best'"):
        ExitWeights.named("best", 3)
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_exits must be an integer of at least 1"):
            ExitWeights.uniform(bad)
