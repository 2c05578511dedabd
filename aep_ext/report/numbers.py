"""How numbers are written: per cent, millions, mean with spread, exits counted from 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = {"uniform": "UNIF", "ascending": "ASC", "descending": "DESC", "mixed": "MIX"}


def method_name(method: str) -> str:
    """The paper's name of one of its methods; any other as it is."""
    return NAMES.get(method, method)


def percent(value: float, digits: int = 2) -> str:
    """A fraction of 1 as a percentage."""
    return f"{100 * value:.{digits}f} %"


def percent_spread(spread: dict[str, Any], digits: int = 2) -> str:
    """Mean and, over several seeds, sample standard deviation of fractions of 1, as percentages."""
    if spread["std"] is None:
        return percent(spread["mean"], digits)
    return f"{100 * spread['mean']:.{digits}f} ± {100 * spread['std']:.{digits}f} %"


def points(difference: dict[str, Any]) -> str:
    """A ``difference`` of accuracies with its interval ``low``, ``high``, in points."""
    return f"{100 * difference['difference']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]"


def amount(value: float) -> str:
    """A count with three significant digits and k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f}"


def relative(value: float, reference: float) -> str:
    """By how many per cent ``value`` differs from ``reference``."""
    return f"{100 * (value / reference - 1):+.0f} %" if reference else ""


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals; nothing where it is not known."""
    return "" if value is None else f"{value:.{digits}f}"


def exits(numbers: Sequence[int]) -> str:
    """Exits as people count them, from 1: ``(0, 2)`` is ``1+3``."""
    return "+".join(str(number + 1) for number in numbers)


def exits_of_seeds(subsets: Sequence[Sequence[int]]) -> str:
    """The subsets of several seeds: one where they agree, else all in the seeds' order."""
    written = [exits(subset) for subset in subsets]
    return written[0] if len(set(written)) == 1 else ", ".join(written)
