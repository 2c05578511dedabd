"""Plain torch, with BatchNorm folded into the convolutions: works everywhere, and is no opponent to the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aep_ext.inference.backends.chain import Chain, Engine, Settings, TorchChain
from aep_ext.inference.fold import fold_batch_norm
from aep_ext.inference.segments import Segment

__all__ = ["EagerEngine"]


class EagerEngine(Engine):
    """Any device, any dtype. Threads are torch's own (``torch.set_num_threads``)."""

    name = "eager"

    def __init__(self, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> None:
        folded = [fold_batch_norm(segment) for segment in segments]
        self.notices = [reason for _, reason in folded if reason]
        self._chain = TorchChain([unit for unit, _ in folded])

    def chain(self, n: int) -> Chain:
        return self._chain
