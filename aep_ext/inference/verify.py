"""Are the prepared units still the network? Counted over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Verification", "compare", "difference"]

_CHUNK = 64


class Verification(NamedTuple):
    """How prepared units and the network agree on n samples."""

    n: int
    same_predictions: int
    """Samples for which the ensemble's argmax is the same."""
    same_exit_predictions: tuple[int, ...]
    """The same for each exit's own argmax."""
    max_logit_difference: float
    """Over all exits and samples; a value that is finite on one side only counts as infinite."""
    max_logit: float
    """The network's largest absolute finite logit, to judge the difference by."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; equal infinities and two NaN count 0, finite against not finite infinity."""
    if ours.numel() == 0:
        return 0.0
    ours, theirs = ours.double(), theirs.double()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    gap = (ours - theirs).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(torch.where(same, 0.0, gap).max())


def _batches(data: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    if isinstance(data, Tensor):
        # What cannot be split is refused by the network as it is.
        yield from data.split(_CHUNK) if data.dim() and data.layout == torch.strided else (data,)
        return
    try:
        batches = iter(data)
    except TypeError:
        raise TypeError(
            "PreparedNet.verify: data must be a tensor, or batches that are tensors or begin with one, got "
            f"{type(data).__name__}"
        ) from None
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise TypeError(
                "PreparedNet.verify: data must be a tensor, or batches that are tensors or begin with one, got a batch "
                f"of {type(x).__name__}"
            )
        yield x


def compare(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    combine: Callable[[Tensor], Tensor],
    exits: int,
    data: Tensor | Iterable[Any],
) -> Verification:
    """Runs two functions that give exit logits (E, n, K) over ``data``; ``combine`` makes ensembles of them."""
    n = same = 0
    same_exits = [0] * exits
    gap = largest = 0.0
    for x in _batches(data):
        a, b = ours(x), theirs(x)
        n += len(x)
        if not len(x):
            continue
        same += int((combine(a).argmax(-1) == combine(b).argmax(-1)).sum())
        for position, count in enumerate((a.argmax(-1) == b.argmax(-1)).sum(-1).tolist()):
            same_exits[position] += count
        gap = max(gap, difference(a, b))
        largest = max(largest, float(torch.where(b.isfinite(), b, 0).abs().max()))
    return Verification(n, same, tuple(same_exits), gap, largest)
