"""What an executor needs to know of a gate, as plain Python numbers, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MODES = ("auto", "compact", "mask", "off")


@dataclass(frozen=True)
class GateSettings:
    """The numbers of E exits.

    Attributes:
        weights: E output weights b.
        thresholds: E numbers; the last stands for the exit that always answers and is 0.
        temperatures: E numbers.
        live: E flags, whether a sample may leave there before the end; the last is False.
        sums: by accumulation dtype, the sum of the weights before each exit and at last of all (E+1 numbers), rounded
            as the operator rounds it.
    """

    weights: tuple[float, ...]
    thresholds: tuple[float, ...]
    temperatures: tuple[float, ...]
    live: tuple[bool, ...]
    sums: dict[torch.dtype, tuple[float, ...]]


def settings_of(
    weights: Tensor, thresholds: Tensor, temperatures: Tensor, enabled: Tensor, gated: Sequence[bool]
) -> GateSettings:
    """Reads the buffers of a gated net once.

    Args:
        weights, thresholds, temperatures, enabled: (E,), (E-1,), (E,), (E-1,).
        gated: E-1 flags, False where the mode is "off" (by hand or by measurement).

    Raises:
        ValueError: a value out of its range.
    """
    factors = check_values("output_weights", weights.tolist(), positive=True)
    limits = check_values("thresholds", thresholds.tolist(), positive=False)
    scales = check_values("temperatures", temperatures.tolist(), positive=True)
    live = [bool(flag) and on for flag, on in zip(enabled.tolist(), gated, strict=True)]
    return GateSettings(tuple(factors), (*limits, 0.0), tuple(scales), (*live, False), sums_of(tuple(factors)))


@lru_cache(maxsize=64)
def sums_of(weights: tuple[float, ...]) -> dict[torch.dtype, tuple[float, ...]]:
    """For each accumulation dtype the sums of the first 0, 1, .. E weights, as the operator would have them."""
    sums: dict[torch.dtype, tuple[float, ...]] = {}
    for dtype in (torch.float32, torch.float64):
        # Step by step in this dtype: a sum in double precision could differ in the last bit, and with it a confidence.
        total, before = torch.zeros((), dtype=dtype), []
        for weight in weights:
            before.append(total.item())
            total = total + torch.tensor(weight, dtype=dtype)
        sums[dtype] = (*before, total.item())
    return sums


def check_values(name: str, values: Sequence[float], *, positive: bool) -> list[float]:
    """``values`` as a list, none NaN; with ``positive`` all of them above 0 and finite."""
    result = [float(value) for value in values]
    for position, value in enumerate(result):
        if positive and not 0 < value < math.inf:
            raise ValueError(f"GatedNet: {name} must be positive and finite, got {value} at position {position}")
        if math.isnan(value):
            raise ValueError(f"GatedNet: {name} must not be NaN, got NaN at position {position}")
    return result


def numbers_buffer(name: str, values: Sequence[float] | Tensor | float, count: int, *, positive: bool) -> Tensor:
    """(count,) float64 on the CPU, checked; a single number serves for all.

    Raises:
        TypeError: something else than numbers.
        ValueError: another number of entries, or a value out of its range.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    try:
        listed = [float(values)] * count if isinstance(values, numbers.Real) else [float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"GatedNet: {name} must be numbers, got {values!r}") from error
    if len(listed) != count:
        raise ValueError(f"GatedNet: {name} must have {count} entries, got {len(listed)}")
    return torch.tensor(check_values(name, listed, positive=positive), dtype=torch.float64)


def flags_buffer(values: Sequence[bool] | Tensor | bool | None, count: int) -> Tensor:
    """(count,) bool on the CPU; None stands for all True, one flag for all.

    Raises:
        TypeError: something else than flags.
        ValueError: another number of entries.
    """
    if values is None:
        values = True
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    listed = [values] * count if isinstance(values, bool | int) else list(values)
    strange = next((v for v in listed if v not in (0, 1)), None)
    if strange is not None:
        raise TypeError(f"GatedNet: enabled must be True or False for each exit, got {strange!r}")
    if len(listed) != count:
        raise ValueError(f"GatedNet: enabled must have {count} entries, got {len(listed)}")
    return torch.tensor([bool(v) for v in listed], dtype=torch.bool)


def check_modes(mode: str | Sequence[str], count: int) -> tuple[str, ...]:
    """``mode`` as ``count`` entries, one for every exit but the last.

    Raises:
        ValueError: another number of entries, or none of :data:`MODES`.
    """
    modes = (mode,) * count if isinstance(mode, str) else tuple(mode)
    strange = next((m for m in ((mode,) if isinstance(mode, str) else modes) if m not in MODES), None)
    if strange is not None:
        raise ValueError(f"GatedNet: mode must be one of {', '.join(MODES)}, got {strange!r}")
    if len(modes) != count:
        raise ValueError(f"GatedNet: mode must have {count} entries, got {len(modes)}")
    return modes
