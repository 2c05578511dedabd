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

_CHUNK = 1 << 21


def fit_temperature(
    logits: Tensor, target: Tensor, *, bounds: tuple[float, float] = (0.05, 100.0), max_iterations: int = 100
) -> float:
    """The temperature T that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    L-BFGS on log 1/T in float64; the likelihood is convex in 1/T, so this is the optimum within the bounds. Where every
    answer is right it rises for ever as T falls to 0, and T is the lower bound. 1 where the likelihood does not depend
    on T, or no row can be used: one with NaN or +inf, or whose label's logit is -inf, is left out.

    Args:
        logits: (N, K) floating.
        target: (N,) integers within 0..K-1.
        bounds: smallest and largest T.
        max_iterations: evaluations of the likelihood.

    Raises:
        ValueError: a shape, a label or a bound is out of its range.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not logits.is_floating_point():
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"fit_temperature: logits must be floating of shape [N, K], got {found}")
    check_labels("fit_temperature", target, *logits.shape)
    low, high = (float(bound) for bound in bounds)
    if not 0 < low <= high < math.inf:
        raise ValueError(f"fit_temperature: bounds must be positive, finite and in order, got {bounds}")
    with torch.inference_mode(False):  # what is made in inference mode takes no gradient
        return min(max(_fit(logits.detach(), target.to(logits.device, torch.int64), max_iterations), low), high)


def _fit(logits: Tensor, target: Tensor, max_iterations: int) -> float:
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
    free = torch.zeros((), dtype=torch.float64, device=logits.device, requires_grad=True)
    rows = max(1, _CHUNK // shifted.shape[1])
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=max_iterations,
        max_eval=max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        with torch.enable_grad():
            for part, labels in zip(shifted.split(rows), target.split(rows), strict=True):
                loss = torch.nn.functional.cross_entropy(part.double() / scale * free.exp(), labels, reduction="sum")
                loss = loss / len(target)
                loss.backward()
                total += loss.detach()
        return total

    optimizer.step(closure)
    return scale * math.exp(-float(free.detach()))


def fit_temperatures(
    logits: CachedLogits, output_weights: Sequence[float] | Tensor, *, criterion_on: str = "ensemble"
) -> tuple[float, ...]:
    """One temperature for every exit: of its normalised prefix ensemble R_e, or of its own logits with
    ``criterion_on="exit"``.

    Args:
        logits: the data to fit on.
        output_weights: E positive numbers.

    Raises:
        ValueError: as :func:`prefix_ensembles`.
    """
    judged = prefix_ensembles(logits, output_weights, criterion_on)
    return tuple(fit_temperature(part, logits.target) for part in judged)


def prefix_ensembles(
    logits: CachedLogits, output_weights: Sequence[float] | Tensor, criterion_on: str = "ensemble"
) -> list[Tensor]:
    """What each exit's confidence is taken of, before the temperature: R_e, or with ``criterion_on="exit"`` its logits.

    Returns:
        E tensors (N, K) float32.

    Raises:
        ValueError: ``criterion_on`` is neither "ensemble" nor "exit", or the weights do not fit.
    """
    if criterion_on not in ("ensemble", "exit"):
        raise ValueError(f"calibration: criterion_on must be 'ensemble' or 'exit', got {criterion_on!r}")
    weights = per_exit("calibration", "output_weights", output_weights, logits.num_exits, positive=True)
    if criterion_on == "exit":
        return list(logits.logits)
    factors = torch.tensor(weights, dtype=torch.float32)
    return list((logits.logits * factors[:, None, None]).cumsum(0) / factors.cumsum(0)[:, None, None])
