"""What a sample costs that is answered at an exit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..pruning.cost import subset_costs
from ..surgery.multi_exit import MultiExitNet


def exit_costs(net: MultiExitNet, example: Tensor | Sequence[int]) -> tuple[int, ...]:
    """Multiply-adds of a sample that is answered at each exit: E numbers, ascending.

    Counted as ``count_macs`` does: the backbone up to that exit, and the heads of this exit and of all before it, since
    the running ensemble needs them whether their gates are enabled or not.

    Args:
        net: a full or pruned network of at most 16 exits.
        example: an input (N, C, H, W), of which the first sample is used, or a shape (C, H, W).
    """
    macs = subset_costs(net, example).macs
    return tuple(macs[(1 << e + 1) - 2] for e in range(net.num_exits))
