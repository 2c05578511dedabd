"""torch.compile with frozen weights: BatchNorm folded and weights packed by torch itself. Compiles for minutes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from aep_ext.inference.backends.chain import Chain, Engine, Settings, TorchChain
from aep_ext.inference.segments import Segment

__all__ = ["InductorEngine", "no_compiler"]


def no_compiler(device: torch.device) -> str | None:
    """Why Inductor cannot compile for ``device`` here; None if a C++ compiler is found (or none is needed)."""
    if device.type != "cpu":
        return None
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++", "cl"]
    if any(shutil.which(name.split()[0]) for name in names):
        return None
    return f"backend 'inductor' needs a C++ compiler at run time, found none of {', '.join(names)}"


class InductorEngine(Engine):
    """Any device. Threads are torch's own (``torch.set_num_threads``)."""

    name = "inductor"

    def __init__(self, segments: Sequence[Segment], inputs: Sequence[Tensor], settings: Settings) -> None:
        reason = no_compiler(inputs[0].device)
        if reason:
            raise RuntimeError(reason)
        self.notices: list[str] = []
        # A batch of one is a shape of its own to Inductor: compiled apart, it needs no guard on a free size either.
        self._one = self._compiled(segments, inputs, 1)
        self._many = self._compiled(segments, inputs, max(2, len(inputs[0])))

    @staticmethod
    def _compiled(segments: Sequence[Segment], inputs: Sequence[Tensor], n: int) -> TorchChain:
        dynamic = n > 1
        units = [torch.compile(_Alone(segment), dynamic=dynamic, options={"freezing": True}) for segment in segments]
        with torch.no_grad():
            for unit, x in zip(units, inputs, strict=True):
                rows = torch.arange(n, device=x.device) % len(x)
                unit(x[rows].contiguous())
        return TorchChain(units)

    def chain(self, n: int) -> Chain:
        return self._one if n == 1 else self._many


class _Alone(torch.nn.Module):
    """A module of its own around a shared segment, so that its two compilations do not share a cache of guards."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.segment(x)
