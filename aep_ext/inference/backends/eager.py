"""Plain torch, with BatchNorm folded into the convolutions: works everywhere, on any device and dtype.

Threads are torch's own (``torch.set_num_threads``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from aep_ext.inference.backends.engine import Engine, Settings, TorchChain
from aep_ext.inference.segments import Segment


def build(segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> Engine:
    """See :func:`aep_ext.inference.backends.build`."""
    folded = [fold_batch_norm(segment, x) for segment, x in zip(segments, inputs, strict=True)]
    return Engine(TorchChain([segment for segment, _ in folded]), notices=[reason for _, reason in folded if reason])


def fold_batch_norm(segment: nn.Module, x: Tensor) -> tuple[nn.Module, str | None]:
    """A copy of ``segment`` (in eval mode) with BatchNorm folded into the convolutions before it, by ``torch.fx``.

    Returns:
        The copy and None, or ``segment`` itself and the reason: its forward cannot be traced, or the copy computes
        something else on ``x`` (``torch.fx`` takes no notice of a convolution that is called twice).
    """
    try:
        fused = fuse(segment).eval().requires_grad_(False)
    except Exception as error:  # whatever a user's forward raises under tracing
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return segment, f"eager: BatchNorm is not folded, a stage cannot be traced ({reason})"
    with torch.no_grad():
        for ours, theirs in zip(fused(x), segment(x), strict=True):
            scale = float(theirs.abs().nan_to_num(0, 0, 0).max())
            tolerance = (1e-4 if theirs.dtype in (torch.float32, torch.float64) else 5e-2) * max(scale, 1e-30)
            if not torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True):
                return segment, "eager: BatchNorm is not folded, it would change what a stage computes"
    return fused, None
