"""The cases of the benchmarks, which of them are quick, which are goals, and their inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float64")
MARKS = {
    "quick": "the small selection of benchmarks that everyone can run",
    "goal": "a case that benchmarks/goals.toml judges",
    "full": "a benchmark that runs with --full only",
}
ALL_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# Input sets rotate through at least this much, which is past a core's own caches.
_ROTATE_BYTES, _LARGE_BYTES, _MAX_SETS = 16 << 20, 128 << 20, 8


@dataclass(frozen=True)
class Case:
    """One case of an operator. ``threads``: 1, or 0 for all cores."""

    size: tuple[int, ...]
    variant: str = "plain"
    dtype: str = "float32"
    layout: str = "contiguous"
    threads: int = 1

    @property
    def id(self) -> str:
        """The size, then everything that is not the default: ``4x64x100-bfloat16-strided-allthreads``."""
        parts = ["x".join(str(n) for n in self.size)]
        parts += [] if self.variant == "plain" else [self.variant]
        parts += [] if self.dtype == "float32" else [self.dtype]
        parts += [] if self.layout == "contiguous" else [self.layout]
        return "-".join(parts + ([] if self.threads == 1 else ["allthreads"]))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    @property
    def tolerance(self) -> dict[str, float]:
        """``rtol`` and ``atol`` against the reference: baselines in bfloat16 also add up in bfloat16."""
        if self.dtype == "bfloat16":
            return {"rtol": 3e-2, "atol": 6e-2}
        return {"rtol": 1e-4, "atol": 1e-5}


def cases(
    sizes: Iterable[Sequence[int]],
    *,
    goal: Iterable[str] = (),
    quick: Iterable[str] = (),
    variants: Sequence[str] = ("plain",),
    dtypes: Sequence[str] = DTYPES,
    layouts: Sequence[str] = ("contiguous", "strided"),
    huge: Iterable[Sequence[int]] = (),
) -> list[Any]:
    """Parameters for ``pytest.mark.parametrize("case", ...)``: all combinations, with ids ``cpu-4x64x100``.

    ``goal`` and ``quick`` name cases by :attr:`Case.id`. What is neither is marked ``full`` and runs on request only.
    ``huge`` sizes come in float32 and bfloat16 and contiguous only: gigabytes, and nothing new to learn.

    Raises:
        ValueError: ``goal`` or ``quick`` names a case that does not exist.
    """
    goal, quick = set(goal), set(quick)
    rows = [Case(tuple(size), *rest) for size, *rest in product(sizes, variants, dtypes, layouts, (1, 0))]
    rows += [Case(tuple(size), v, d, "contiguous", t) for size, v, d, t in product(huge, variants, dtypes[:2], (1, 0))]
    unknown = (goal | quick) - {row.id for row in rows}
    if unknown:
        raise ValueError(f"cases: no such case: {', '.join(sorted(unknown))}")
    parameters = []
    for row in rows:
        marks = [pytest.mark.goal] if row.id in goal else []
        marks += [pytest.mark.quick] if row.id in quick else []
        parameters.append(pytest.param(row, marks=marks or [pytest.mark.full], id=f"cpu-{row.id}"))
    return parameters


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    return [found for entry in value for found in tensors(entry)] if isinstance(value, (tuple, list)) else []


def bytes_of(value: Any) -> int:
    """Of all tensors in nested tuples and lists."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def input_sets(bytes_each: int) -> int:
    """How many input sets rotate on a CPU: several, unless one alone is larger than any cache."""
    if bytes_each >= _LARGE_BYTES:
        return 1
    return max(2, min(_MAX_SETS, math.ceil(_ROTATE_BYTES / max(1, bytes_each))))


def make_logits(case: Case, device: str, *, trained: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (E, N, K), weights (E,) of the same dtype and labels (N,) of a case whose size is (E, N, K).

    ``trained``: the label's logit is raised by 3 in every exit, as a trained network would; else chance.
    """
    exits, rows, classes = case.size
    if case.layout == "strided":  # as torch.stack(..., dim=1) gives it
        logits = torch.randn(rows, exits, classes, device=device).transpose(0, 1)
    else:
        logits = torch.randn(exits, rows, classes, device=device)
    target = torch.randint(classes, (rows,), device=device)
    if trained:
        logits[:, torch.arange(rows, device=device), target] += 3.0
    weights = torch.arange(1.0, exits + 1, device=device) / sum(range(1, exits + 1))
    return logits.to(case.torch_dtype), weights.to(case.torch_dtype), target


def feature_map(rows: int, channels: int, height: int, case: Case, device: str) -> Tensor:
    """(rows, channels, height, height) in the case's dtype and layout."""
    if case.layout == "strided":  # a crop: neither rows nor columns follow one another
        full = torch.randn(rows, channels, height + 1, height + 1, device=device)
        return full.to(case.torch_dtype)[:, :, 1:, 1:]
    form = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    x = torch.randn(rows, channels, height, height, device=device)
    return x.to(case.torch_dtype).contiguous(memory_format=form)
