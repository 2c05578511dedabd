"""What every part of the package uses: errors for users, optional packages."""

from __future__ import annotations

import importlib
import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn


class UserError(Exception):
    """Something the user asked for cannot be done. The message is one line; the command `aep` prints it and exits with
    2."""


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message names it and the extra that brings it."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say which extra of aep_ext brings it.

    Args:
        module: dotted name, for example ``"lightning.pytorch"``.
        extra: the extra's name, for example ``"train"``.
        purpose: what needs it, for the message.

    Raises:
        MissingPackage: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackage(
            f"{purpose} needs {module.split('.')[0]}: pip install 'aep_ext[{extra}]' ({error})"
        ) from error


def per_exit(function: str, name: str, values: Any, count: int, *, positive: bool = False) -> tuple[float, ...]:
    """One number for each of ``count`` exits, checked.

    Args:
        function, name: for the messages, ``"ExitPolicy"`` and ``"thresholds"`` say.
        values: a number, which then serves for all exits, or a sequence, tensor or array of ``count`` numbers.
        count: how many there must be.
        positive: every number must be above 0 and finite; otherwise it only must not be NaN.

    Raises:
        TypeError: something else than numbers.
        ValueError: another number of entries, or a value out of its range.
    """
    if hasattr(values, "tolist"):  # torch's and NumPy's
        values = values.tolist()
    try:
        listed = [float(values)] * count if isinstance(values, numbers.Real) else [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{function}: {name} must be numbers, got {values!r}") from error
    if len(listed) != count:
        raise ValueError(f"{function}: {name} must have {count} entries, got {len(listed)}")
    for position, value in enumerate(listed):
        if positive and not 0 < value < math.inf:
            raise ValueError(f"{function}: {name} must be positive and finite, got {value} at position {position}")
        if math.isnan(value):
            raise ValueError(f"{function}: {name} must not be NaN, got NaN at position {position}")
    return tuple(listed)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """``module`` in eval mode inside the block; every submodule's own mode is restored afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
