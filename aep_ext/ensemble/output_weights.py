"""Output weights learned from data: which mixture of an exit and those before it answers best.

The paper's families give every exit a weight by its position and leave the search for better ones open (arXiv
2301.12168, future work). A gate answers with the prefix ensemble R_e = sum_{j<=e} b_j O_j / sum_{j<=e} b_j wherever a
sample leaves, so all E prefixes count, not the last alone. The weights found here minimise

    sum_e mean_n CE(R_e / T_e, y)

over the positive weights b and one temperature T_e for every prefix, which are found together: without the
temperatures a weight would have to make up for over-confidence as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aep_ext._utils import per_exit

__all__ = ["OutputWeightsFit", "fit_output_weights"]

_CHUNK = 1 << 21
"""Logits of one part of the rows, so that large data sets need no float64 copy."""
_RATIO = 1e-6
"""The least weight, as a fraction of the largest: an exit that does not help counts as good as nothing, and every
weight stays positive in float32."""
_SHARPEST = math.log(1e4)
"""The largest |log T|, in units of the exit's scale: where every sample is right, as few samples often are, the
likelihood grows with 1/T for ever."""


@dataclass(frozen=True)
class OutputWeightsFit:
    """Fitted output weights and how they were found.

    Attributes:
        weights: E positive numbers that sum to 1.
        temperatures: E positive numbers, for the normalised prefix ensembles.
        nll: E mean negative log-likelihoods in nats, one for each prefix ensemble at its temperature.
        iterations: evaluations of loss and gradient.
        converged: the gradient of the summed likelihoods vanished, or the search could not improve on the last step.
        used: samples that took part; one with a logit that is not finite is left out.
    """

    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    nll: tuple[float, ...]
    iterations: int
    converged: bool
    used: int


def _check(exit_logits: Tensor, target: Tensor) -> None:
    if not isinstance(exit_logits, Tensor) or exit_logits.dim() != 3 or not exit_logits.is_floating_point():
        found = str(list(exit_logits.shape)) if isinstance(exit_logits, Tensor) else type(exit_logits).__name__
        raise ValueError(f"fit_output_weights: exit_logits must be floating of shape [E, N, K], got {found}")
    exits, samples, classes = exit_logits.shape
    if exits < 1 or classes < 1:
        raise ValueError(
            f"fit_output_weights: exit_logits must have an exit and a class, got shape {[exits, samples, classes]}"
        )
    if not isinstance(target, Tensor) or list(target.shape) != [samples] or target.dtype != torch.int64:
        found = f"{target.dtype} of shape {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"fit_output_weights: target must be int64 of shape [{samples}], got {found}")
    if samples and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(
            f"fit_output_weights: target must be within 0..{classes - 1}, got {int(target.min())}..{int(target.max())}"
        )


def fit_output_weights(
    exit_logits: Tensor,
    target: Tensor,
    *,
    tolerance: float = 1e-7,
    max_iterations: int = 200,
) -> OutputWeightsFit:
    """The output weights whose prefix ensembles have the least summed cross entropy, each at its best temperature.

    L-BFGS on log b and log 1/T in float64, from equal weights. The logits are first divided by one number per exit,
    their median distance to the row's largest one, so that an exit's scale does not decide where the search begins.
    For fixed ratios of the weights the problem is convex in 1/T; over the ratios it need not be, so what is found is a
    local optimum, no worse than equal weights. With one exit the weight is 1.

    Args:
        exit_logits: (E, N, K) floating, of labelled samples that trained nothing.
        target: (N,) int64 within 0..K-1.
        tolerance: on the gradient.
        max_iterations: evaluations of the loss.

    Raises:
        ValueError: a shape, a dtype or a label breaks these rules, no sample has finite logits only, or the logits are
            too large or too far apart for weights and temperatures within float32.
    """
    _check(exit_logits, target)
    with torch.inference_mode(False):  # what is made in inference mode takes no gradient
        return _fit(exit_logits.detach(), target, tolerance, max_iterations)


def _fit(exit_logits: Tensor, target: Tensor, tolerance: float, max_iterations: int) -> OutputWeightsFit:
    usable = exit_logits.isfinite().all(dim=2).all(dim=0)
    if bool(usable.all()):
        logits, labels = exit_logits, target.to(exit_logits.device)
    else:
        logits, labels = exit_logits[:, usable], target[usable].to(exit_logits.device)
    exits, used, classes = logits.shape
    if used == 0:
        raise ValueError(f"fit_output_weights: a sample must have finite logits, got none among {len(target)}")
    gaps = (logits.amax(dim=2, keepdim=True) - logits).flatten(1)
    medians = [gap[gap > 0].median() if bool((gap > 0).any()) else gap.new_ones(()) for gap in gaps]
    scale = torch.stack(medians).double()[:, None, None]
    free = torch.zeros(2, exits, 1, 1, dtype=torch.float64, device=logits.device, requires_grad=True)
    rows = max(1, _CHUNK // (exits * classes))

    def evaluate(backward: bool) -> Tensor:
        """Each prefix's mean cross entropy, by parts of the rows; gradients go to ``free``."""
        total = torch.zeros(exits, dtype=torch.float64, device=logits.device)
        for part, own in zip(logits.split(rows, dim=1), labels.split(rows), strict=True):
            # Logits are in units of their exit's scale, so `b` is weight times scale.
            b = _positive(free[0])
            scaled = (part / scale * b).cumsum(0) * (_inverse(free[1]) / b.cumsum(0))
            losses = cross_entropy(scaled.flatten(0, 1), own.repeat(exits), reduction="none").view(exits, -1).sum(1)
            if backward:
                (losses.sum() / used).backward()
            total += losses.detach() / used
        return total

    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=max_iterations,
        max_eval=max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            return evaluate(backward=True).sum()

    optimizer.step(closure)
    evaluations = int(optimizer.state[free]["func_evals"])
    with torch.no_grad():
        nll = evaluate(backward=False)
        b = _positive(free[0])
        weights = (b / scale / (b / scale).max()).clamp_min(_RATIO).flatten()
        # R_e in the caller's units is (sum b_j O_j / s_j) / sum w_j with w = b / s.
        temperatures = (b.cumsum(0) / (b / scale).cumsum(0) / _inverse(free[1])).flatten()
    return OutputWeightsFit(
        per_exit("fit_output_weights", "the fitted weights", weights / weights.sum(), exits, positive=True),
        per_exit("fit_output_weights", "the fitted temperatures", temperatures, exits, positive=True),
        tuple(nll.tolist()),
        evaluations,
        evaluations < max_iterations,
        used,
    )


def _inverse(free: Tensor) -> Tensor:
    """1/T, in units of the exit's scale."""
    return free.clamp(-_SHARPEST, _SHARPEST).exp()


def _positive(free: Tensor) -> Tensor:
    """exp, relative to the largest, not below the least ratio."""
    return (free - free.max().detach()).clamp_min(math.log(_RATIO)).exp()
