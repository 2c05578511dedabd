"""One temperature per exit: the number that divides an exit's logits so that its probabilities fit the labels best.

C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017. The negative
log-likelihood is convex in the inverse temperature b = 1 / T:

    f(b) = mean(logsumexp(b z) - b z_y),   f'(b) = mean(E_p[z] - z_y),   f''(b) = mean(Var_p[z]) >= 0,

p being softmax(b z). So f' has at most one sign change, which a Newton iteration inside a shrinking bracket finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from aep_ext.calibration.cached_logits import ExitCache

_ROWS = 8192


@dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature and how it was found.

    Attributes:
        temperature: T.
        nll: mean negative log-likelihood in nats at T, over the rows used.
        nll_before: at T = 1.
        gradient: f'(1 / T), in logits.
        iterations: evaluations of f' and f''.
        converged: the gradient vanished (within the tolerance), or a bound is the optimum inside the bounds.
        bounded: "low" or "high" where the optimum lies beyond a bound, which is then T; else None. Where every answer
            is right the likelihood rises for ever as T falls to 0: "low".
        used: rows that took part. A row is left out where a logit is NaN or +inf, or the label's is -inf.
        left_out: the others.
    """

    temperature: float
    nll: float
    nll_before: float
    gradient: float
    iterations: int
    converged: bool
    bounded: str | None
    used: int
    left_out: int

    @property
    def remark(self) -> str:
        """What a user should be told; empty for an ordinary fit."""
        if not self.used:
            return f"no temperature, none of {self.left_out} samples can be used"
        if self.bounded:
            return f"temperature at its bound {self.temperature:g}"
        return "" if self.converged else f"temperature did not converge in {self.iterations} steps"

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; None where a number does not exist."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def check_labelled(function: str, logits: Tensor, target: Tensor) -> None:
    """An error unless logits are floating (N, K), K at least 1, and labels (N,) integers within 0..K-1."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] < 1:
        found = f"{logits.dtype} of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{function}: logits must be a floating tensor of shape [N, K], got {found}")
    if not isinstance(target, Tensor) or tuple(target.shape) != (logits.shape[0],):
        found = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{function}: target must be a tensor of shape [{logits.shape[0]}], got {found}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"{function}: target must be integers, got {target.dtype}")
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise ValueError(
            f"{function}: target must be within 0..{logits.shape[1] - 1}, got {int(target.min())}..{int(target.max())}"
        )


def _prepared(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Usable rows in float64, shifted to a largest logit of 0, and the label's own (shifted) logit."""
    z = logits.double()
    z = z - z.amax(dim=1, keepdim=True)
    own = z.gather(1, target[:, None])[:, 0]
    # A row with +inf or NaN has NaN after the shift.
    usable = ~z.isnan().any(dim=1) & own.isfinite()
    # Probability 0 at every temperature; finite, or 0 * inf would spoil the sums.
    return z[usable].clamp_min(-1e200), own[usable]


def _derivatives(z: Tensor, own: Tensor, inverse: float) -> tuple[float, float, float]:
    """f, f' and f'' at ``inverse``, by parts of the rows."""
    value = first = second = 0.0
    for rows, labels in zip(z.split(_ROWS), own.split(_ROWS), strict=True):
        scaled = rows * inverse
        log_sum = scaled.logsumexp(dim=1, keepdim=True)
        p = (scaled - log_sum).exp()
        weighted = torch.where(p > 0, p * rows, 0.0)
        mean = weighted.sum(dim=1)
        spread = torch.where(p > 0, p * (rows - mean[:, None]).square(), 0.0).sum(dim=1)
        value += float((log_sum[:, 0] - inverse * labels).sum())
        first += float((mean - labels).sum())
        second += float(spread.sum())
    n = len(z)
    return value / n, first / n, second / n


def fit_temperature(
    logits: Tensor,
    target: Tensor,
    *,
    bounds: tuple[float, float] = (0.05, 100.0),
    tolerance: float = 1e-10,
    max_iterations: int = 100,
) -> TemperatureFit:
    """The temperature that minimises the negative log-likelihood of ``softmax(logits / T)``.

    Newton steps in 1 / T, replaced by a bisection (in log T) wherever they leave the bracket, in float64. Neither the
    order of the samples nor that of the classes matters, nor a constant added to a row; logits times c give T times c.

    Args:
        logits: (N, K) floating, K at least 1.
        target: (N,) int64 within 0..K-1.
        bounds: smallest and largest T, around 1.
        tolerance: on \\|f'\\|, relative to the median distance of a logit to its row's largest.
        max_iterations: evaluations.

    Raises:
        ValueError: a shape, a label or a bound is out of its range.
    """
    check_labelled("fit_temperature", logits, target)
    low, high = (float(b) for b in bounds)
    if not 0 < low <= 1 <= high < math.inf:
        raise ValueError(f"fit_temperature: bounds must be positive, finite and around 1, got {bounds}")
    z, own = _prepared(logits.detach(), target.to(logits.device, torch.int64))
    used, left_out = len(z), len(target) - len(z)
    if used == 0:
        return TemperatureFit(1.0, math.nan, math.nan, math.nan, 0, False, None, 0, left_out)
    below = -z[(z < 0) & (z > -1e100)]
    # The usual distance to the largest logit; a median, which excluded classes (-inf) and outliers do not move.
    scale = float(below.median()) if len(below) else 0.0
    limit = tolerance * max(scale, 1e-300)
    before, slope, curvature = _derivatives(z, own, 1.0)
    done = 1
    if scale == 0:  # every row is flat (or K = 1): the likelihood does not depend on T
        return TemperatureFit(1.0, before, before, slope, done, True, None, used, left_out)

    def result(inverse: float, value: float, slope: float, converged: bool, bounded: str | None) -> TemperatureFit:
        return TemperatureFit(1.0 / inverse, value, before, slope, done, converged, bounded, used, left_out)

    if not bool((own < 0).any()):  # all right: no optimum, although f' soon falls below any tolerance
        value, slope, _ = _derivatives(z, own, 1.0 / low)
        done += 1
        return result(1.0 / low, value, slope, True, "low")
    # f' < 0 left of the optimum, > 0 right of it; the bracket is in inverse temperatures.
    if abs(slope) > limit and (low == 1 and slope < 0 or high == 1 and slope > 0):
        return result(1.0, before, slope, True, "low" if slope < 0 else "high")
    left, right = 1.0 / high, 1.0 / low
    inverse, value = 1.0, before
    at_bound = {left: False, right: False}
    while abs(slope) > limit and done < max_iterations:
        if slope < 0:
            left = inverse
        else:
            right = inverse
        if right - left <= 4e-16 * right:
            break
        step = inverse - slope / curvature if curvature > 0 else math.nan
        if not left < step < right:
            outer = right if slope < 0 else left
            # The bound itself is tried once; inside the bracket a bisection in log T.
            step = outer if at_bound.get(outer) is False else math.sqrt(left * right)
        inverse = step
        value, slope, curvature = _derivatives(z, own, inverse)
        done += 1
        if inverse in at_bound:
            at_bound[inverse] = True
            if inverse == 1.0 / low and slope < 0:
                return result(inverse, value, slope, True, "low")
            if inverse == 1.0 / high and slope > 0:
                return result(inverse, value, slope, True, "high")
    return result(inverse, value, slope, abs(slope) <= limit or right - left <= 4e-16 * right, None)


def fit_temperatures(cache: ExitCache, *, on: str = "ensemble", **options: Any) -> tuple[TemperatureFit, ...]:
    """One fit for every exit.

    Args:
        cache: the data to fit on.
        on: "ensemble": each exit's normalised prefix ensemble; "exit": each exit's own logits.
        options: those of :func:`fit_temperature`.

    Raises:
        ValueError: ``on`` is neither, or as :func:`fit_temperature`.
    """
    return tuple(fit_temperature(logits, cache.target, **options) for logits in judged_logits(cache, on))


def judged_logits(cache: ExitCache, on: str = "ensemble") -> Iterable[Tensor]:
    """What each exit's confidence is taken of, before the temperature: E tensors (N, K) float32, one at a time."""
    if on not in ("ensemble", "exit"):
        raise ValueError(f"calibration: on must be 'ensemble' or 'exit', got {on!r}")
    return cache.prefixes() if on == "ensemble" else (own.float() for own in cache.logits)
