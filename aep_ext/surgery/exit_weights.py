"""Exit weights: the loss weights a_e and the output weights b_e of a multi-exit network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aep_ext._utils import per_exit

FAMILIES = ("uniform", "ascending", "descending", "mixed")
SHORT_NAMES = {
    "unif": "uniform",
    "asc": "ascending",
    "desc": "descending",
    "mix": "mixed",
    "hybrid": "mixed",
}  # the paper's


def _checked_exits(num_exits: int, name: str) -> int:
    if isinstance(num_exits, bool) or not isinstance(num_exits, int) or num_exits < 1:
        raise ValueError(f"ExitWeights.{name}: num_exits must be an integer of at least 1, got {num_exits!r}")
    return num_exits


def _ascending(num_exits: int) -> tuple[float, ...]:
    total = num_exits * (num_exits + 1) // 2
    return tuple(e / total for e in range(1, num_exits + 1))


@dataclass(frozen=True)
class ExitWeights:
    """Loss weights a_e and output weights b_e of E exits.

    Training minimises ``sum_e a_e * CE(O_e, y)``; the ensemble's answer is ``sum_e b_e * O_e`` over raw logits
    (arXiv 2301.12168). The named families sum to 1 and are not rounded; the authors' published experiment rounds
    every weight to four decimals.

    Args:
        loss: E positive, finite numbers (a sequence or a 1-D tensor).
        output: the same for the output, or one number for all exits; left out, the loss weights serve for both.

    Weights that are given are taken as they are: they need not sum to 1.

    Raises:
        TypeError: what is given are no numbers.
        ValueError: an entry is not positive and finite, there is none, or the two differ in length.
    """

    loss: tuple[float, ...]
    output: tuple[float, ...]

    def __init__(self, loss: Sequence[float] | Tensor, output: Sequence[float] | Tensor | None = None) -> None:
        try:
            count = len(loss)
        except TypeError:
            raise TypeError(f"ExitWeights: loss must be a sequence of numbers, got {loss!r}") from None
        if count == 0:
            raise ValueError("ExitWeights: loss must have at least one entry, got none")
        losses = per_exit("ExitWeights", "loss", loss, count, positive=True)
        outputs = losses if output is None else per_exit("ExitWeights", "output", output, count, positive=True)
        object.__setattr__(self, "loss", losses)
        object.__setattr__(self, "output", outputs)

    @classmethod
    def uniform(cls, num_exits: int) -> ExitWeights:
        """1/E for every exit, in loss and output (the paper's UNIF)."""
        count = _checked_exits(num_exits, "uniform")
        return cls((1 / count,) * count)

    @classmethod
    def ascending(cls, num_exits: int) -> ExitWeights:
        """e / (1 + 2 + .. + E) for exit e = 1..E, in loss and output (ASC)."""
        return cls(_ascending(_checked_exits(num_exits, "ascending")))

    @classmethod
    def descending(cls, num_exits: int) -> ExitWeights:
        """(E + 1 - e) / (1 + 2 + .. + E) for exit e = 1..E, in loss and output (DESC)."""
        return cls(_ascending(_checked_exits(num_exits, "descending"))[::-1])

    @classmethod
    def mixed(cls, num_exits: int) -> ExitWeights:
        """Descending in the loss, ascending in the output (MIX, the paper's "hybrid")."""
        rising = _ascending(_checked_exits(num_exits, "mixed"))
        return cls(rising[::-1], rising)

    @classmethod
    def named(cls, name: str, num_exits: int) -> ExitWeights:
        """One of the families above by name: uniform, ascending, descending, mixed, or UNIF, ASC, DESC, MIX.

        Raises:
            ValueError: no family has that name.
        """
        family = str(name).lower()
        family = SHORT_NAMES.get(family, family)
        if family not in FAMILIES:
            raise ValueError(
                f"ExitWeights.named: name must be one of {', '.join(FAMILIES)} (or UNIF, ASC, DESC, MIX), got {name!r}"
            )
        return getattr(cls, family)(num_exits)

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.loss)

    def __len__(self) -> int:
        return len(self.loss)

    def loss_tensor(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """The loss weights as a tensor of shape (E,)."""
        return torch.tensor(self.loss, dtype=dtype, device=device)
