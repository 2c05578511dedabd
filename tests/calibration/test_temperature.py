from __future__ import annotations

import math

import pytest
import torch
from aep_ext.termination import fit_temperature, fit_temperatures
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_exits import cache_of, logits_and_labels


def likelihood(logits, target, temperature):
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, target))


@pytest.fixture(scope="module")
def data():
    logits, target = logits_and_labels(2, 4000, seed=3)
    return logits[1], target


def test_it_is_the_minimum(data):
    logits, target = data
    fit = fit_temperature(logits, target)
    assert fit.converged and fit.bounded is None and fit.iterations <= 12 and (fit.used, fit.left_out) == (4000, 0)
    assert fit.nll == pytest.approx(likelihood(logits, target, fit.temperature), rel=1e-12)
    assert fit.nll_before == pytest.approx(likelihood(logits, target, 1.0), rel=1e-12)
    assert abs(fit.gradient) < 1e-9
    for factor in (0.999, 1.001):
        assert likelihood(logits, target, fit.temperature * factor) > fit.nll
    # And over the whole range, on a fine grid.
    grid = torch.logspace(math.log10(0.05), 2, 200, dtype=torch.float64)
    assert min(likelihood(logits, target, float(t)) for t in grid) >= fit.nll


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 6), st.floats(0.01, 50))
def test_against_a_search_of_the_likelihood(seed, n, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(0, classes, (n,), generator=generator)
    fit = fit_temperature(logits, target)
    assert fit.converged and 0.05 <= fit.temperature <= 100
    # In float64, and not by a rounding beyond the bounds, where the likelihood may still rise.
    grid = torch.logspace(math.log10(0.05), 2, 300, dtype=torch.float64).clamp(0.05, 100)
    best = min(likelihood(logits, target, float(t)) for t in grid)
    assert fit.nll <= best + 1e-9 * max(1.0, abs(best))
    if fit.bounded == "low":
        assert fit.temperature == 0.05 and fit.gradient <= 0
    if fit.bounded == "high":
        assert fit.temperature == 100 and fit.gradient > 0


def test_a_calibrated_network_needs_no_temperature():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40000, 4, generator=generator)
    target = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, target).temperature == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, target).temperature == pytest.approx(3, abs=0.09)


def test_what_does_not_matter(data):
    logits, target = (x[:1000] for x in data)
    plain = fit_temperature(logits, target).temperature
    order, classes = torch.randperm(1000), torch.randperm(5)
    place = torch.argsort(classes)
    assert fit_temperature(logits[order], target[order]).temperature == pytest.approx(plain, rel=1e-8)
    assert fit_temperature(logits[:, classes], place[target]).temperature == pytest.approx(plain, rel=1e-8)
    shift = torch.randint(-8, 8, (1000, 1)).double()
    assert fit_temperature(logits.double() + shift, target).temperature == pytest.approx(plain, rel=1e-8)
    for factor in (0.25, 4.0):
        assert fit_temperature(logits * factor, target).temperature == pytest.approx(plain * factor, rel=1e-8)
    twice = fit_temperature(torch.cat([logits, logits]), torch.cat([target, target]))
    assert twice.temperature == pytest.approx(plain, rel=1e-8)


def test_degenerate_data_are_bounded_and_say_so():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    right = fit_temperature(logits, logits.argmax(1))
    assert (right.temperature, right.bounded, right.converged) == (0.05, "low", True)
    sure = fit_temperature(1000 * logits, logits.argmax(1))  # the gradient vanishes long before the bound
    assert (sure.temperature, sure.bounded) == (0.05, "low")
    wrong = fit_temperature(logits, logits.argmin(1))
    assert (wrong.temperature, wrong.bounded, wrong.converged) == (100, "high", True)
    assert fit_temperature(logits, logits.argmin(1), bounds=(0.5, 2)).temperature == 2
    flat = fit_temperature(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))
    assert (flat.temperature, flat.bounded, flat.converged) == (1, None, True)
    assert flat.nll == pytest.approx(math.log(4))
    assert fit_temperature(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)).temperature == 1


def test_rows_without_a_distribution_are_left_out(data):
    logits, target = (x[:500].clone() for x in data)
    plain = fit_temperature(logits[3:], target[3:])
    logits[0, 0], logits[1, 1], logits[2, target[2]] = math.nan, math.inf, -math.inf
    spoilt = fit_temperature(logits, target)
    assert spoilt.temperature == pytest.approx(plain.temperature, rel=1e-9)
    assert (spoilt.used, spoilt.left_out) == (497, 3)
    # A class of probability 0 that is not the label takes part.
    masked = logits[3:].clone()
    masked[0, (target[3] + 1) % 5] = -math.inf
    fit = fit_temperature(masked, target[3:])
    assert fit.left_out == 0 and fit.converged and math.isfinite(fit.nll)
    nothing = fit_temperature(torch.full((2, 3), math.nan), torch.zeros(2, dtype=torch.int64))
    assert nothing.temperature == 1 and not nothing.converged and nothing.used == 0
    assert fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).temperature == 1


def test_a_bound_at_one_is_a_bound():
    logits, target = logits_and_labels(1, 500)
    flat = fit_temperature(logits[0] / 10, target, bounds=(1, 5))
    assert (flat.temperature, flat.bounded, flat.converged) == (1, "low", True) and flat.gradient < 0
    sharp = fit_temperature(10 * logits[0], target, bounds=(0.5, 1))
    assert (sharp.temperature, sharp.bounded, sharp.converged) == (1, "high", True) and sharp.gradient > 0
    assert fit_temperature(logits[0], target, bounds=(1, 5)).bounded is None


def test_excluded_classes_and_outliers_do_not_blunt_the_fit():
    # A class that cannot be (-inf), or a single enormous logit, is no measure of what a small gradient is.
    logits, target = logits_and_labels(1, 800)
    wide = torch.cat([logits[0], torch.full((800, 5), -math.inf)], dim=1)
    plain, excluded = fit_temperature(logits[0], target), fit_temperature(wide, target)
    assert excluded.temperature == pytest.approx(plain.temperature, rel=1e-9) and excluded.used == 800
    assert abs(excluded.gradient) < 1e-9
    sure = torch.cat([logits[0], torch.tensor([[1e30, 0, 0, 0, 0]])])
    outlier = fit_temperature(sure, torch.cat([target, torch.tensor([0])]))
    assert outlier.temperature == pytest.approx(plain.temperature, rel=1e-9)


def test_every_exits_prefix_or_own_logits():
    cache = cache_of(3, 500)
    for on, judged in (("ensemble", cache.running), ("exit", cache.logits)):
        fits = fit_temperatures(cache, on=on)
        assert [f.temperature for f in fits] == [fit_temperature(x, cache.target).temperature for x in judged]
        assert fits[0].to_dict()["converged"] is True
    with pytest.raises(ValueError, match="on must be 'ensemble' or 'exit', got 'both'"):
        fit_temperatures(cache, on="both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(3), torch.zeros(3)),
            r"logits must be a floating tensor of shape \[N, K\], got torch.float32 of shape \[3\]",
        ),
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), r"target must be a tensor of shape \[3\], got \[2\]"),
        ((torch.zeros(1, 2), torch.tensor([2])), "target must be within 0..1, got 2..2"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(*arguments)


def test_bounds():
    with pytest.raises(ValueError, match=r"bounds must be positive, finite and around 1, got \(2, 3\)"):
        fit_temperature(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), bounds=(2, 3))
