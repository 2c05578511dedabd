"""What the fused loss is held against: cross entropies of all exits, computed one by one by torch and summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SummedCrossEntropy", "WrittenOutCrossEntropy"]


class SummedCrossEntropy(nn.Module):
    """``sum_e a_e * F.cross_entropy(logits[e], target)``.

    Args:
        exit_weights: E numbers a_e.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        dtype: the arithmetic's type; the gradient comes back in that of the logits. Default: the logits' type, at
            least float32.
    """

    def __init__(
        self, exit_weights: Sequence[float], label_smoothing: float = 0.0, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.exit_weights, self.label_smoothing, self.dtype = tuple(exit_weights), label_smoothing, dtype

    def forward(self, exit_logits: Tensor, target: Tensor) -> Tensor:
        """The joint loss, no dimension, of logits (E, N, K) and labels (N,) int64."""
        # Autocast has no say in the arithmetic.
        with torch.autocast(exit_logits.device.type, enabled=False):
            total = exit_logits.new_zeros((), dtype=self._dtype(exit_logits))
            for weight, logits in zip(self.exit_weights, exit_logits, strict=True):
                total = total + weight * self._cross_entropy(logits.to(total.dtype), target)
            return total

    def _dtype(self, logits: Tensor) -> torch.dtype:
        return self.dtype or torch.promote_types(logits.dtype, torch.float32)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)


class WrittenOutCrossEntropy(SummedCrossEntropy):
    """The same sum with the cross entropy written out: ``logsumexp(o) - (1 - s) * o[y] - s * mean(o)``.

    The same formula in the same precision, rounded differently in value and gradient: what rounding alone does to a
    training curve. (The order of the exits' sum would not show it: it changes no gradient.)
    """

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        own = logits.gather(1, target[:, None]).squeeze(1)
        smooth = self.label_smoothing
        return (logits.logsumexp(1) - (1.0 - smooth) * own - smooth * logits.mean(1)).mean()
