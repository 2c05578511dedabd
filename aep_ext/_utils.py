"""What every part of the package uses: errors, optional packages, numbers per exit, batches, tables, eval mode,
threads."""

from __future__ import annotations

import html
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_FLOAT32 = torch.finfo(torch.float32)


class UserError(Exception):
    """Something the user asked for cannot be done. The message is one line; the command `aep` prints it and exits with
    2."""


class MissingPackage(UserError, ImportError):
    """An optional package is not installed; the message names it and the extra that brings it."""


class FileError(UserError, OSError):
    """A file cannot be read or written; the message names it and says why."""


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
        positive: refuse what is not positive and finite, in float32 too (its normal numbers); else only NaN is refused.

    Raises:
        TypeError: ``values`` are no numbers.
        ValueError: too few or too many, or one that is refused.
    """
    shape = getattr(values, "shape", ())
    if len(shape) > 1:
        raise ValueError(f"{function}: {name} must have one dimension, got shape {list(shape)}")
    if isinstance(values, Tensor):
        values = (values if values.is_complex() else values.double()).detach().cpu().tolist()
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{function}: {name} must be a number or a sequence of numbers, got {values!r}")
    try:
        numbers = tuple(float(v) for v in values) if isinstance(values, Iterable) else (float(values),) * count
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} must be a number or a sequence of numbers, got {values!r}") from None
    if len(numbers) != count:
        raise ValueError(f"{function}: {name} must have {count} entries, got {len(numbers)}")
    for position, value in enumerate(numbers):
        if positive and not _FLOAT32.tiny <= value <= _FLOAT32.max:
            raise ValueError(f"{function}: {name} must be positive and finite, got {value} at position {position}")
        if math.isnan(value):
            raise ValueError(f"{function}: {name} must not be NaN, got {value} at position {position}")
    return numbers


_INPUTS, _LABELS = ("pixel_values", "image"), ("labels", "label")
"""Their keys where a batch is a dict, as Hugging Face's are."""


def inputs_of(function: str, batch: Any) -> Tensor:
    """The inputs of a loader's batch: itself, the first of a tuple or list, or a dict's "pixel_values" or "image".

    Raises:
        TypeError: there are none, or they are no tensor.
    """
    x = batch
    if isinstance(batch, Mapping):
        x = next((batch[key] for key in _INPUTS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and batch:
        x = batch[0]
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{function}: loader must yield tensors, tuples that begin with one, or dicts with one under "
            f"{' or '.join(map(repr, _INPUTS))}, got {_kind(batch)}"
        )
    return x


def inputs_and_labels(function: str, batch: Any, soft: bool = False) -> tuple[Tensor, Tensor]:
    """The inputs (N, ...) and integer labels (N,) of an (x, y) batch, or of a dict with "labels" or "label" too.

    Args:
        function: who asks, for the messages.
        batch: the batch.
        soft: labels may be probabilities (N, K) as well.

    Raises:
        TypeError: there are no such two.
        ValueError: labels of another type or shape. Whether they are in range is not looked at.
    """
    y = None
    if isinstance(batch, Mapping):
        y = next((batch[key] for key in _LABELS if key in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        y = batch[1]
    if y is None:
        raise TypeError(
            f"{function}: loader must yield (x, y) batches, or dicts with {' or '.join(map(repr, _LABELS))}, "
            f"got {_kind(batch)}"
        )
    x, y = inputs_of(function, batch), torch.as_tensor(y)
    if soft and y.dim() == 2 and len(y) == len(x) and y.is_floating_point():
        return x, y
    if y.shape != x.shape[:1] or y.dtype == torch.bool or y.is_floating_point():
        other = f", or probabilities of shape [{len(x)}, K]" if soft else ""
        raise ValueError(
            f"{function}: a batch's y must be integers of shape [{len(x)}]{other}, got {y.dtype} of shape "
            f"{list(y.shape)}"
        )
    return x, y


def _kind(batch: Any) -> str:
    """A batch's type and what is in it, for messages."""
    if isinstance(batch, Mapping):
        return f"a dict with {', '.join(map(repr, batch))}"
    inside = [type(entry).__name__ for entry in batch] if isinstance(batch, (tuple, list)) else []
    return type(batch).__name__ + (f" of {', '.join(inside)}" if 0 < len(inside) < 5 else "")


def aligned(lines: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of plain text with their cells in columns, the first ``left`` of them aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def html_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a notebook, escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    return f"<div><b>{html.escape(title)}</b><table>{line(head, 'th')}{body}</table></div>"


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
