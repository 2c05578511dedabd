"""What every part of the package uses: errors for users, optional packages, numbers per exit, eval mode, threads."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn


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


def per_exit(
    function: str, name: str, values: float | Iterable[float] | Tensor, count: int, *, positive: bool = False
) -> tuple[float, ...]:
    """One number for every exit, or ``count`` numbers, as a tuple of floats.

    Args:
        function: who asks, for the messages.
        name: of the argument, for the messages.
        values: a number (it counts for every exit), or ``count`` of them; a tensor may have any dtype and device.
        count: how many the result has, 0 or more.
        positive: refuse what is not positive and finite; else only NaN is refused.

    Raises:
        TypeError: ``values`` are no numbers.
        ValueError: too few or too many, or one that is refused.
    """
    if isinstance(values, Tensor):
        if values.dim() > 1:
            raise ValueError(f"{function}: {name} must have one dimension, got shape {list(values.shape)}")
        values = values.detach().double().cpu().tolist()
    try:
        numbers = tuple(float(v) for v in values) if isinstance(values, Iterable) else (float(values),) * count
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a number or a sequence of numbers, got {values!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{function}: {name} must have {count} entries, got {len(numbers)}")
    for position, value in enumerate(numbers):
        if positive and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{function}: {name} must be positive and finite, got {value} at position {position}")
        if math.isnan(value):
            raise ValueError(f"{function}: {name} must not be NaN, got {value} at position {position}")
    return numbers


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


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """So many CPU threads inside the block; None: as it is."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
