"""The reference path's checks of shapes and dtypes. The native operators make theirs in C++ (csrc/torch/checks.cpp).

Every message has the form ``aep::<operator>: <rule>, got <value>``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INT64 = (torch.int64,)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(
    op: str,
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
) -> torch.Size:
    """The shape of ``value``, a tensor of one of ``dtypes`` and of this ``shape``, in which a letter stands for any
    size of at least 1, and N for any size."""
    if not isinstance(value, Tensor):
        raise TypeError(f"aep::{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        rule = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"aep::{op}: {name} must be {rule}, got {str(value.dtype).removeprefix('torch.')}")
    fits = value.dim() == len(shape) and all(
        (size >= 1 or wanted == "N") if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        rule = ", ".join(str(wanted) for wanted in shape)
        raise ValueError(f"aep::{op}: {name} must have shape [{rule}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"aep::{op}: {name} must be on device {device}, got {value.device}")
    return value.shape


def number(op: str, name: str, value: object, device: torch.device, *, positive: bool = False) -> None:
    """``value`` is a number, or a 0-d floating tensor on ``device``, whose value is not read: that could wait."""
    if isinstance(value, Tensor):
        tensor(op, name, value, (), FLOATING, device)
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"aep::{op}: {name} must be a number or a 0-d tensor, got {type(value).__name__}")
    elif positive and not 0 < value < math.inf:  # False for NaN
        raise ValueError(f"aep::{op}: {name} must be finite and greater than 0, got {value:g}")
    elif value != value:
        raise ValueError(f"aep::{op}: {name} must not be NaN, got {value:g}")


def choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` is one of the names ``allowed``."""
    if value not in allowed:
        raise ValueError(f"aep::{op}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def weighted_exits(op: str, exit_logits: Tensor, name: str, weights: Tensor) -> tuple[int, int, int]:
    """(E, N, K) logits with a weight for every exit."""
    exits, rows, classes = tensor(op, "exit_logits", exit_logits, "ENK")
    tensor(op, name, weights, (exits,), FLOATING, exit_logits.device)
    return exits, rows, classes


def sequences(op: str, **values: object) -> None:
    """All are lists or tuples, which the native operators' schemas want."""
    for name, value in values.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"aep::{op}: {name} must be a list or tuple of tensors, got {type(value).__name__}")


def linears(
    op: str, name: str, inputs: Sequence[Tensor], shape: str, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[int, int]:
    """(N, K) of the exits' linear layers on ``inputs``, an argument called ``name`` whose tensors have ``shape``."""
    if not len(inputs) == len(weights) == len(biases) >= 1:
        found = f"{len(inputs)}, {len(weights)} and {len(biases)}"
        raise ValueError(f"aep::{op}: {name}, weights and biases must hold as many tensors, 1 or more, got {found}")
    first: tuple[Sequence[torch.dtype], torch.device | None] = (FLOATING, None)
    rows = classes = 0
    for e, (x, weight, bias) in enumerate(zip(inputs, weights, biases, strict=True)):
        rows, channels, *_ = tensor(op, f"{name}[{e}]", x, (rows if e else "N", *shape[1:]), *first)
        first = (x.dtype,), x.device
        classes, _ = tensor(op, f"weights[{e}]", weight, (classes if e else "K", channels), *first)
        if bias is not None:
            tensor(op, f"biases[{e}]", bias, (classes,), *first)
    return rows, classes
