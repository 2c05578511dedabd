"""Subsets of exits: tuples of indices, and bit masks with bit ``1 << e`` set for exit e (from 0)."""

from __future__ import annotations

import operator
from collections.abc import Iterable

MAX_EXITS = 16  # as aep::subset_correct: 65,535 subsets


def mask_of_exits(exits: Iterable[int]) -> int:
    """The bit mask of the exits given by their indices, for instance (0, 2) -> 0b101."""
    mask = 0
    for exit_index in exits:
        mask |= 1 << operator.index(exit_index)  # a NumPy integer would make the mask one
    return mask


def exits_of_mask(mask: int) -> tuple[int, ...]:
    """The exits of a bit mask in ascending order, for instance 0b101 -> (0, 2)."""
    return tuple(e for e in range(mask.bit_length()) if mask >> e & 1)


def checked_exits(function: str, exits: Iterable[int], num_exits: int) -> tuple[int, ...]:
    """``exits`` as a sorted tuple of distinct indices within 0..num_exits-1.

    Raises:
        TypeError: not an iterable of integers.
        ValueError: none given, one given twice, or one out of range.
    """
    if isinstance(exits, (str, bytes)) or not isinstance(exits, Iterable):
        raise TypeError(f"{function}: exits must be an iterable of exit indices, got {exits!r}")
    kept: list[int] = []
    for entry in exits:
        if isinstance(entry, bool):
            raise TypeError(f"{function}: exits must be integers, got {entry!r}")
        try:
            index = operator.index(entry)
        except TypeError:
            raise TypeError(f"{function}: exits must be integers, got {entry!r}") from None
        if not 0 <= index < num_exits:
            raise ValueError(f"{function}: exits must be within 0..{num_exits - 1}, got {index}")
        if index in kept:
            raise ValueError(f"{function}: exits must be distinct, got {index} twice")
        kept.append(index)
    if not kept:
        raise ValueError(f"{function}: exits must name at least one exit, got none")
    return tuple(sorted(kept))
