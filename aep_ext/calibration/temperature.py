"""One temperature per exit: the number that divides an exit's logits so that its probabilities fit the labels best.

C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On calibration of modern neural networks", ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aep_ext._utils import per_exit
from aep_ext.calibration.cached_logits import CachedLogits, check_labels

BOUNDS = (0.05, 100.0)
"""The smallest and the largest temperature."""


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    L-BFGS on log 1/T in float64; the likelihood is convex in 1/T, so this is the optimum within :data:`BOUNDS`. Where
    every answer is right it rises for ever as T falls to 0, and T is the lower bound. 1 where the likelihood does not
    depend on T, or no row can be used: one with NaN or +inf, or whose label's logit is -inf, is left out.

    Args:
        logits: (N, K) floating.
        target: (N,) integers within 0..K-1.

    Raises:
        ValueError: a shape or a label breaks these rules.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"fit_temperature: logits must be floating of shape [N, K], got {found}")
    check_labels("fit_temperature", target, *logits.shape)
    with torch.inference_mode(False):  # what is made in inference mode takes no gradient
        return min(max(_fit(logits.detach(), target.to(logits.device, torch.int64)), BOUNDS[0]), BOUNDS[1])


def _fit(logits: Tensor, target: Tensor) -> float:
    shifted = logits - logits.amax(dim=1, keepdim=True)  # NaN where a logit is NaN or the largest one infinite
    own = shifted.gather(1, target[:, None])[:, 0]
    usable = ~shifted.isnan().any(dim=1) & own.isfinite()
    shifted, target = shifted[usable].clamp_min(torch.finfo(logits.dtype).min), target[usable]
    below = -shifted[(shifted < 0) & (shifted > torch.finfo(logits.dtype).min)]
    if not len(below):
        return 1.0
    if not bool((own[usable] < 0).any()):
        return 0.0
    scale = float(below.median())  # so that the logits' unit does not decide where the search begins
    scaled = shifted.double() / scale
    free = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=100,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(scaled * free.exp(), target)
            loss.backward()
        return loss

    optimizer.step(closure)
    return scale * math.exp(-float(free.detach()))


def fit_temperatures(
    logits: CachedLogits, output_weights: Sequence[float], *, criterion_on: str = "ensemble"
) -> tuple[float, ...]:
    """One temperature for every exit: of its normalised prefix ensemble R_e, or of its own logits with
    ``criterion_on="exit"``."""
    parts = criterion_logits(logits.logits, output_weights, criterion_on)
    return tuple(fit_temperature(part, logits.target) for part in parts)


def criterion_logits(exit_logits: Tensor, output_weights: Sequence[float], criterion_on: str) -> Tensor:
    """What each exit's confidence is taken of, before the temperature, (E, N, K): R_e, or the exit's own logits.

    Raises:
        ValueError: ``criterion_on`` is neither "ensemble" nor "exit", or the weights do not fit.
    """
    if criterion_on not in ("ensemble", "exit"):
        raise ValueError(f"calibration: criterion_on must be 'ensemble' or 'exit', got {criterion_on!r}")
    weights = per_exit("calibration", "output_weights", output_weights, len(exit_logits), positive=True)
    if criterion_on == "exit":
        return exit_logits
    factors = torch.tensor(weights, dtype=exit_logits.dtype)[:, None, None]
    return (exit_logits * factors).cumsum(0) / factors.cumsum(0)
