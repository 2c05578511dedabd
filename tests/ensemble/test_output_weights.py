"""Learned output weights: against known mixtures, a grid, and themselves in other units."""

from __future__ import annotations

import pytest
import torch

from aep_ext.ensemble import ExitWeights, fit_output_weights


def _prefixes(weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    weights = weights.to(logits.dtype)
    return torch.cumsum(weights[:, None, None] * logits, 0) / torch.cumsum(weights, 0)[:, None, None]


def _nll(weights: torch.Tensor, temperatures: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    scaled = _prefixes(weights, logits) / temperatures[:, None, None]
    return torch.stack([torch.nn.functional.cross_entropy(one, target) for one in scaled])


def _noisy_exits(noise: list[float], samples: int = 3000, classes: int = 5, seed: int = 0):
    """Exits whose logits are the truth and independent noise: the best mixture weights them by 1 / variance."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    truth = torch.nn.functional.one_hot(target, classes).double()
    drawn = torch.randn(len(noise), samples, classes, generator=generator, dtype=torch.float64)
    return truth + torch.tensor(noise, dtype=torch.float64)[:, None, None] * drawn, target


def test_independent_exits_are_weighted_by_their_precision():
    logits, target = _noisy_exits([1.0, 0.7, 0.5], samples=20000)
    fit = fit_output_weights(logits, target)
    weights = torch.tensor(fit.weights)
    assert fit.converged and weights.sum() == pytest.approx(1)
    assert torch.allclose(weights / weights[0], torch.tensor([1.0, 1 / 0.49, 4.0]), rtol=0.1)


def test_an_exit_that_only_repeats_noise_counts_nothing():
    logits, target = _noisy_exits([1.0, 0.5])
    logits[0] = logits[1] + 3 * torch.randn_like(logits[1])  # the second's answer, made worse
    fit = fit_output_weights(logits, target)
    assert fit.weights[0] < 0.02 and min(fit.weights) > 0


def test_likelihoods_are_those_of_the_weights_and_temperatures_and_better_than_the_families():
    logits, target = _noisy_exits([1.5, 0.9, 0.8, 0.7])
    fit = fit_output_weights(logits.float(), target)
    weights, temperatures = (torch.tensor(v, dtype=torch.float64) for v in (fit.weights, fit.temperatures))
    assert torch.allclose(
        _nll(weights, temperatures, logits.float().double(), target),
        torch.tensor(fit.nll, dtype=torch.float64),
        rtol=1e-9,
    )
    for family in ("uniform", "ascending", "descending"):
        other = torch.tensor(ExitWeights.named(family, 4).output, dtype=torch.float64)
        scales = torch.linspace(0.05, 3, 60, dtype=torch.float64)
        nll = torch.stack([_nll(other, scale.expand(4), logits, target) for scale in scales]).amin(0)
        assert sum(fit.nll) <= float(nll.sum()) + 1e-6


def test_against_a_grid_of_two_exits():
    logits, target = _noisy_exits([1.2, 0.8], samples=500)
    fit = fit_output_weights(logits, target)
    best = min(
        float(_nll(torch.tensor([w, 1 - w]), torch.tensor([1.0, t]), logits, target)[1])
        for w in torch.linspace(0.01, 0.99, 99).tolist()
        for t in torch.linspace(0.1, 1.5, 141).tolist()
    )
    assert fit.nll[1] <= best + 1e-6


def test_the_scale_of_an_exit_does_not_matter():
    logits, target = _noisy_exits([1.0, 0.7, 0.5])
    fit = fit_output_weights(logits, target)
    factors = torch.tensor([100.0, 0.01, 3.0], dtype=torch.float64)
    other = fit_output_weights(logits * factors[:, None, None], target)
    wanted = torch.tensor(fit.weights).double() / factors
    assert torch.allclose(torch.tensor(other.weights).double(), wanted / wanted.sum(), rtol=1e-3)
    assert other.nll == pytest.approx(fit.nll, abs=1e-6)


def test_samples_that_are_not_finite_are_left_out():
    logits, target = _noisy_exits([1.0, 0.5], samples=400)
    spoilt = torch.cat([logits, logits[:, :2].clone()], 1)
    spoilt[0, 400, 1], spoilt[1, 401, 0] = float("nan"), float("-inf")
    fit = fit_output_weights(spoilt, torch.cat([target, target[:2]]))
    assert fit.used == 400 and fit.weights == fit_output_weights(logits, target).weights


@pytest.mark.parametrize("shape", [(1, 5, 3), (3, 1, 4), (2, 6, 1)])
def test_odd_shapes(shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        fit = fit_output_weights(logits, torch.zeros(shape[1], dtype=torch.int64))
    assert len(fit.weights) == shape[0] and sum(fit.weights) == pytest.approx(1)
    assert all(w > 0 for w in fit.weights) and all(t > 0 for t in fit.temperatures)


@pytest.mark.parametrize(
    "logits, target, message",
    [
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"of shape \[E, N, K\], got \[3, 2\]"),
        (torch.zeros(1, 2, 3), torch.zeros(2), r"target must be int64 of shape \[2\], got torch.float32"),
        (torch.zeros(1, 2, 3), torch.tensor([0, 3]), r"within 0..2, got 0..3"),
        (torch.full((1, 2, 3), float("nan")), torch.zeros(2, dtype=torch.int64), "got none among 2"),
        (
            torch.tensor([[[1e308, -1e308]] * 3, [[1.0, 0.0]] * 3], dtype=torch.float64),
            torch.tensor([0, 1, 0]),
            "the fitted temperatures must be positive and finite",
        ),
    ],
)
def test_bad_input(logits, target, message):
    with pytest.raises(ValueError, match=message):
        fit_output_weights(logits, target)


def test_few_samples_that_are_all_right():
    """The likelihood then has no maximum, and the line search once went to a temperature that float32 has not."""
    generator, target = torch.Generator().manual_seed(390), torch.arange(24) % 4
    noise = torch.randn(4, 24, 4, generator=generator) * torch.tensor([2.0, 1.0, 1.0, 1.0])[:, None, None]
    signal = torch.tensor([3.0, 3.5, 4.0, 4.0])[:, None, None] * torch.nn.functional.one_hot(target, 4)
    fit = fit_output_weights(noise + signal, target, tolerance=1e-3)
    assert all(temperature > 1e-4 for temperature in fit.temperatures) and fit.nll[-1] < 1e-3
