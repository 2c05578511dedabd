"""What a sample costs that is answered at an exit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.pruning.cost import subset_costs
from aep_ext.surgery.multi_exit import MultiExitNet


def checked_costs(function: str, costs: Sequence[float] | Tensor, exits: int) -> NDArray[np.float64]:
    """``costs`` as (E,) float64.

    Raises:
        ValueError: they are not E positive, finite numbers in non-descending order.
    """
    prices = np.asarray(torch.as_tensor(costs, dtype=torch.float64, device="cpu"))
    if prices.shape != (exits,) or not np.isfinite(prices).all() or (prices <= 0).any() or (np.diff(prices) < 0).any():
        raise ValueError(
            f"{function}: costs must be {exits} positive numbers in non-descending order, got {prices.tolist()}"
        )
    return prices


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
