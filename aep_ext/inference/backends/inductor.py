"""torch.compile with frozen weights: BatchNorm folded and weights packed by torch itself. Compiles for minutes.

Any device. Threads are torch's own (``torch.set_num_threads``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aep_ext.inference.backends.engine import Engine, Settings, TorchChain
from aep_ext.inference.segments import Segment


def build(segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> Engine:
    """See :func:`aep_ext.inference.backends.build`."""
    # A batch of one is a shape of its own to Inductor: compiled apart, it needs no guard on a free size either.
    return Engine(_compiled(segments, inputs, max(2, len(inputs[0]))), {1: _compiled(segments, inputs, 1)})


def _compiled(segments: Sequence[Segment], inputs: Sequence[Tensor], n: int) -> TorchChain:
    # A module of its own around each: two compilations of one module would share a cache of guards.
    alone = [nn.Sequential(segment) for segment in segments]
    compiled = [torch.compile(segment, dynamic=n > 1, options={"freezing": True}) for segment in alone]
    with torch.no_grad():
        for segment, x in zip(compiled, inputs, strict=True):
            rows = torch.arange(n, device=x.device) % len(x)
            segment(x[rows].contiguous())
    return TorchChain(compiled)
