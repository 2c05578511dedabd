"""Beam search over the subsets of many exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

BEAM = 16


def beam_search(
    num_exits: int, width: int, evaluate: Callable[[Sequence[int]], Sequence[tuple[int, ...]]]
) -> tuple[int, ...]:
    """The masks that a beam search scores, ascending; every prefix of the exits is among them.

    From the first exit on, each joins the best ``width`` subsets that end at each exit before it: about
    ``width * E^2 / 2`` subsets, E exits. Then exits are added to, and taken from, the best ``width`` of all one by one,
    until these have no neighbour that was not scored.

    Args:
        num_exits: E.
        width: how many subsets are kept for each last exit.
        evaluate: gives each of some masks its key; smaller is better.
    """
    keys: dict[int, tuple[int, ...]] = {}
    kept: list[list[int]] = []

    def scored(masks: Sequence[int]) -> list[int]:
        new = [mask for mask in dict.fromkeys(masks) if mask not in keys]
        keys.update(zip(new, evaluate(new), strict=True))
        return sorted(set(masks), key=lambda mask: (keys[mask], mask))[:width]

    for e in range(num_exits):
        before = [mask | 1 << e for mask in chain.from_iterable(kept)]
        kept.append(scored([1 << e, (2 << e) - 1, *before]))
    best: list[int] = []
    while (better := sorted(keys, key=lambda mask: (keys[mask], mask))[:width]) != best:
        best = better
        scored([mask ^ 1 << e for mask in best for e in range(num_exits) if mask != 1 << e])
    return tuple(sorted(keys))
