"""Temperatures against scipy's bounded minimiser, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from synthetic_exits import ascending, cached_logits, logits_and_labels

from aep_ext.calibration import fit_temperature, fit_temperatures


def likelihood(logits, target, temperature):
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, target))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(2, 6), st.floats(0.01, 50))
def test_against_scipy(seed, n, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(0, classes, (n,), generator=generator)
    found = fit_temperature(logits, target)
    best = minimize_scalar(
        lambda x: likelihood(logits, target, math.exp(x)), bounds=(math.log(0.05), math.log(100)), method="bounded"
    )
    assert 0.05 <= found <= 100
    assert likelihood(logits, target, found) <= best.fun + 1e-7 * max(1.0, abs(best.fun))


def test_a_calibrated_network_needs_no_temperature():
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40000, 4, generator=generator)
    target = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, target) == pytest.approx(1, abs=0.03)
    assert fit_temperature(3 * logits, target) == pytest.approx(3, abs=0.09)


def test_what_does_not_matter():
    logits, target = (x[0] if x.dim() == 3 else x for x in logits_and_labels(1, 1000))
    plain = fit_temperature(logits, target)
    order, classes = torch.randperm(1000), torch.randperm(5)
    place = torch.argsort(classes)
    assert fit_temperature(logits[order], target[order]) == pytest.approx(plain, rel=1e-6)
    assert fit_temperature(logits[:, classes], place[target]) == pytest.approx(plain, rel=1e-6)
    assert fit_temperature(logits + torch.randint(-8, 8, (1000, 1)), target) == pytest.approx(plain, rel=1e-5)
    for factor in (0.25, 4.0):
        assert fit_temperature(logits * factor, target) == pytest.approx(plain * factor, rel=1e-6)


def test_degenerate_data_are_bounded():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert fit_temperature(logits, logits.argmax(1)) == 0.05
    assert fit_temperature(1000 * logits, logits.argmax(1)) == 0.05
    assert fit_temperature(logits, logits.argmin(1)) == 100
    for flat in (torch.ones(5, 4), torch.randn(5, 1), torch.full((5, 3), math.nan), torch.zeros(0, 3)):
        assert fit_temperature(flat, torch.zeros(len(flat), dtype=torch.int64)) == 1


def test_rows_without_a_distribution_are_left_out():
    logits, target = (x[0] if x.dim() == 3 else x for x in logits_and_labels(1, 500))
    plain = fit_temperature(logits[3:], target[3:])
    spoilt = logits.clone()
    spoilt[0, 0], spoilt[1, 1], spoilt[2, target[2]] = math.nan, math.inf, -math.inf
    assert fit_temperature(spoilt, target) == pytest.approx(plain, rel=1e-6)
    # Classes that cannot be (-inf), or a single enormous logit, take part and do not blunt the fit.
    wide = torch.cat([logits, torch.full((500, 5), -math.inf)], dim=1)
    assert fit_temperature(wide, target) == pytest.approx(fit_temperature(logits, target), rel=1e-6)
    sure = torch.cat([logits, torch.tensor([[1e30, 0, 0, 0, 0]])])
    outlier = fit_temperature(sure, torch.cat([target, torch.tensor([0])]))
    assert outlier == pytest.approx(fit_temperature(logits, target), rel=1e-5)


def test_every_exits_prefix_or_own_logits():
    logits, weights = cached_logits(3, 500), ascending(3)
    prefix = (logits.logits[0] * weights[0] + logits.logits[1] * weights[1]) / (weights[0] + weights[1])
    fitted = fit_temperatures(logits, weights)
    assert fitted[1] == pytest.approx(fit_temperature(prefix, logits.target), rel=1e-5)
    own = fit_temperatures(logits, weights, criterion_on="exit")
    assert list(own) == [fit_temperature(x, logits.target) for x in logits.logits]
    with torch.inference_mode():
        assert fit_temperatures(logits, weights) == fitted
    with pytest.raises(ValueError, match="criterion_on must be 'ensemble' or 'exit', got 'both'"):
        fit_temperatures(logits, weights, criterion_on="both")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3)), r"logits must be floating of shape \[N, K\], got \[3\]"),
        (
            (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)),
            r"target must be integers of shape \[3\], got torch.int64",
        ),
        ((torch.zeros(1, 2), torch.tensor([2])), "target must be within 0..1, got 2..2"),
        ((torch.zeros(2, 2), torch.tensor([True, False])), "target must be integers, got torch.bool"),
    ],
)
def test_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"fit_temperature: {message}"):
        fit_temperature(*arguments)
