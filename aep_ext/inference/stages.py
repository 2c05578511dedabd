"""Stage execution: from exit to exit, each exit's logits and the features that go on."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aep_ext import ops
from aep_ext.surgery.multi_exit import MultiExitNet


class StageRun(Protocol):
    """A network's stages for one pass of one batch. Whoever began it closes it.

    Features are only handed back: tensors, or whatever stands for those that lie in the run's own memory. There they
    are good until the next call of the run, and so are the logits.
    """

    def __call__(self, e: int, features: Any) -> tuple[Any, Tensor]:
        """From the input (e = 0) or the features at exit e-1: the features and the logits (n, K) at exit e."""

    def take(self, features: Any, positions: Tensor) -> Any:
        """The features of fewer rows, at ``positions`` (m,) int64 among those at hand, m at least 1."""

    def close(self) -> None:
        """The pass is over, wherever it ended."""


def take_rows(features: Tensor, positions: Tensor) -> Tensor:
    """Copies rows, (n, ...) and (m,) int64 -> (m, ...), in the memory order of ``features``.

    Equivalent to ``features[positions]``, but channels_last stays so.
    """
    if not features.is_contiguous() and features.dim() in (4, 5):
        form = torch.channels_last if features.dim() == 4 else torch.channels_last_3d
        if features.is_contiguous(memory_format=form):
            return features.movedim(1, -1).index_select(0, positions).movedim(-1, 1)
    return features.index_select(0, positions)


class NetRun:
    """A :class:`MultiExitNet`'s stages up to each exit, and that exit's head, by the path that the network takes.

    Stages and heads are looked up for every pass, so one that was replaced is used from then on
    (``net.stages[i] = torch.compile(...)``).

    The network runs its heads after all stages, a gated net between them: a head that writes on its input (an in-place
    activation first of all) would spoil what the next stage reads. Such heads are found out the first time they run,
    and get a copy.

    Args:
        net: the network.
        writers: what was found out so far, by exit; kept by the caller from pass to pass.
    """

    __slots__ = ("bounds", "heads", "last", "linears", "plans", "stages", "writers")

    def __init__(self, net: MultiExitNet, writers: dict[int, tuple[nn.Module, bool]]) -> None:
        self.stages, self.heads, self.bounds = list(net.stages), list(net.exits), net.exit_stages
        self.linears, self.plans, self.writers = net._fusable_linears(), net._fused_plans, writers
        self.last = len(self.bounds) - 1

    def __call__(self, e: int, features: Tensor) -> tuple[Tensor | None, Tensor]:
        for index in range(self.bounds[e - 1] + 1 if e else 0, self.bounds[e] + 1):
            features = self.stages[index](features)
        head, pooled = self.heads[e], features
        if self.linears is None:
            logits, features = self._guarded(e, head, features)
        else:
            plan = self.plans[e]
            if plan is not None and plan.prepare is not None:
                pooled, features = self._guarded(e, head.get_submodule(plan.prepare), features)
            linear = self.linears[e]
            logits = ops.multi_exit_linear_head([pooled], [linear.weight], [linear.bias])[0]
        return (None if e == self.last else features), logits

    def take(self, features: Tensor, positions: Tensor) -> Tensor:
        return take_rows(features, positions)

    def close(self) -> None:
        pass

    def _guarded(self, e: int, module: nn.Module, features: Tensor) -> tuple[Tensor, Tensor]:
        """The module's result, and features that it did not write on."""
        if e == self.last:
            return module(features), features
        known = self.writers.get(e)
        if known is not None and known[0] is module:
            return module(features.clone() if known[1] else features), features
        kept = features.clone()
        tracked = not features.is_inference()  # tensors of inference mode count no versions
        before = features._version if tracked else 0
        result = module(features)
        self.writers[e] = module, features._version != before if tracked else not features.equal(kept)
        return result, kept
