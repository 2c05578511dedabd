"""What a sample costs that is answered at an exit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.pruning.cost import exit_costs

__all__ = ["checked_costs", "exit_costs"]


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
