"""Exit logits of a labelled data set, kept in memory, so that calibration never runs the network again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 4096


def check_labels(function: str, target: Tensor, samples: int, classes: int) -> None:
    """An error unless ``target`` holds ``samples`` integers within 0..classes-1.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(target, Tensor) or tuple(target.shape) != (samples,) or target.is_floating_point():
        found = f"{target.dtype} of shape {list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"{function}: target must be integers of shape [{samples}], got {found}")
    if target.dtype == torch.bool:
        raise ValueError(f"{function}: target must be integers, got torch.bool")
    if samples and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise ValueError(
            f"{function}: target must be within 0..{classes - 1}, got {int(target.min())}..{int(target.max())}"
        )


class CachedLogits:
    """Exit logits and labels of N samples, on the CPU.

    Args:
        logits: (E, N, K) floating, any device; kept as float32, without a copy where that is what it is.
        target: (N,) integers within 0..K-1.
        role: what the data are for: "val", "calibration", "test" or a name of the user's own.
        exits: the exits' numbers in the network as it was built, ascending; 0..E-1 by default.

    Raises:
        TypeError: the logits are no floating tensor.
        ValueError: a shape or a value breaks these rules, or a finite logit is too large for float32.
    """

    def __init__(
        self, logits: Tensor, target: Tensor, *, role: str = "val", exits: Sequence[int] | None = None
    ) -> None:
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            found = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"CachedLogits: logits must be a floating tensor, got {found}")
        if logits.dim() != 3 or logits.shape[0] < 1 or logits.shape[2] < 1:
            raise ValueError(
                f"CachedLogits: logits must have shape [E, N, K] with E and K at least 1, got {list(logits.shape)}"
            )
        labels = torch.as_tensor(target)
        check_labels("CachedLogits", labels, logits.shape[1], logits.shape[2])
        if not isinstance(role, str) or not role:
            raise ValueError(f"CachedLogits: role must be a name such as 'val' or 'test', got {role!r}")
        numbers = tuple(range(logits.shape[0])) if exits is None else tuple(int(e) for e in exits)
        if len(numbers) != logits.shape[0] or any(b <= a for a, b in zip(numbers, numbers[1:], strict=False)):
            raise ValueError(f"CachedLogits: exits must be {logits.shape[0]} ascending numbers, got {list(numbers)}")
        self.logits = logits.detach().to("cpu", torch.float32)
        if logits.dtype == torch.float64 and bool((self.logits.isinf() & ~logits.detach().cpu().isinf()).any()):
            raise ValueError("CachedLogits: logits must be within +-3.40282e+38 for float32, got larger ones")
        self.target = labels.detach().to("cpu", torch.int64)
        self.role = role
        self.exits = numbers

    def __len__(self) -> int:
        return self.logits.shape[1]

    def __repr__(self) -> str:
        return f"CachedLogits({self.role}: {len(self)} samples, {self.num_exits} exits, {self.num_classes} classes)"

    @property
    def num_exits(self) -> int:
        """E."""
        return self.logits.shape[0]

    @property
    def num_classes(self) -> int:
        """K."""
        return self.logits.shape[2]

    def select(self, indices: Tensor | Sequence[int], *, role: str | None = None) -> CachedLogits:
        """The samples with these numbers (int64, or a bool mask), in this order; ``role``: by default the same."""
        rows = torch.as_tensor(indices)
        rows = rows if rows.dtype == torch.bool else rows.to(torch.int64)
        return CachedLogits(
            self.logits[:, rows], self.target[rows], role=self.role if role is None else role, exits=self.exits
        )

    def select_exits(self, exits: Sequence[int]) -> CachedLogits:
        """Only the exits at these positions, ascending."""
        rows = list(exits)
        return CachedLogits(
            self.logits[rows], self.target, role=self.role, exits=[self.exits[position] for position in rows]
        )

    @cached_property
    def row_hashes(self) -> NDArray[np.uint64]:
        """(N,) uint64: a hash of every sample's logits at all exits and its label.

        It recognises the same logits, split and shuffled; another pass over the same images may change their last bits.
        """
        rng = np.random.default_rng(20220515)  # any fixed odd multipliers would do
        factors = rng.integers(1, 1 << 63, size=(self.num_exits, self.num_classes), dtype=np.uint64) | np.uint64(1)
        result = self.target.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        with np.errstate(over="ignore"):
            for start in range(0, len(self), _CHUNK):  # 64 bits a number: not for all samples at once
                rows = slice(start, start + _CHUNK)
                bits = self.logits[:, rows].contiguous().view(torch.int32).numpy().astype(np.uint64)
                result[rows] += np.einsum("enk,ek->n", bits, factors)
        return result

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the rows' hashes, in hexadecimal; the order of the samples does not matter."""
        return hashlib.sha256(np.sort(self.row_hashes).astype("<u8").tobytes()).hexdigest()
