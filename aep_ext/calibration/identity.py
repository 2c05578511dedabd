"""Which data a cache holds: a name for its role, a count, a hash, and a sketch that recognises shared samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SKETCH = 256
"""Row hashes kept in a sketch."""
SHARED = 0.05
"""From this share of a sketch on, two sets of samples overlap."""
SHARED_EXACT = 0.01
"""From this share of the smaller set on, where all hashes are known; single duplicates are common in real data."""
REPORTING_ROLES = ("test", "report")
"""Roles whose data are there to be reported on, once."""

_CHUNK = 4096


def row_hashes(exit_logits: Tensor, target: Tensor) -> NDArray[np.uint64]:
    """(N,) uint64: a hash of every sample's logits at all exits and its label.

    Taken of the logits rounded to float16, so that a cache kept at half size has the same hashes. A change in the last
    bits (another batch size, another device) usually changes some of them: what is recognised is the same cache, its
    splits and its shuffles, not another pass over the same images.

    Args:
        exit_logits: (E, N, K), on the CPU.
        target: (N,) int64.
    """
    exits, samples, classes = exit_logits.shape
    rng = np.random.default_rng(20220515)  # any fixed odd multipliers would do
    result = np.full(samples, exits * 1_000_003 + classes, dtype=np.uint64)
    multiplier = rng.integers(1, 1 << 63, size=(exits, classes), dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        for e in range(exits):
            for start in range(0, samples, _CHUNK):  # 64 bits a number: not for all samples at once
                rows = slice(start, start + _CHUNK)
                half = exit_logits[e, rows].to(torch.float16).contiguous()
                bits = half.view(torch.int16).numpy().astype(np.uint64)
                result[rows] += (bits * multiplier[e]).sum(axis=1, dtype=np.uint64)
        result += target.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        # A finaliser (multiply and shift), so that the smallest hashes are a fair sample of the rows.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            result = (result ^ (result >> np.uint64(shift))) * np.uint64(factor)
    return result ^ (result >> np.uint64(31))


def same_role(a: str, b: str) -> bool:
    """Whether two roles are one; spelling (case, spaces around) makes no difference."""
    return a.strip().casefold() == b.strip().casefold()


def is_reported_on(role: str) -> bool:
    """Whether data of this role are there to be reported on."""
    return any(same_role(role, name) for name in REPORTING_ROLES)


@dataclass(frozen=True)
class DataIdentity:
    """What is known of a set of samples without the samples.

    Attributes:
        role: "calibration", "validation", "test", or a name of the user's own.
        count: N.
        sha256: of the samples' hashes in order.
        sketch: the smallest different hashes, at most 256: a random part of the samples, the same in every split and
            shuffle that holds them (A. Broder, "On the resemblance and containment of documents", 1997).
        hashes: (N,) uint64 of all samples, as long as the identity lives in memory; None for one from a file, which
            knows the sketch only.
    """

    role: str
    count: int
    sha256: str
    sketch: tuple[int, ...] = ()
    hashes: NDArray[np.uint64] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, role: str, hashes: NDArray[np.uint64]) -> DataIdentity:
        """The identity of the samples with these hashes."""
        digest = hashlib.sha256(np.ascontiguousarray(hashes, dtype="<u8").tobytes()).hexdigest()
        return cls(role, len(hashes), digest, tuple(int(value) for value in np.unique(hashes)[:SKETCH]), hashes)

    def shared_with(self, hashes: NDArray[np.uint64]) -> float:
        """An estimate of the share of these samples that are among those with ``hashes``, from the sketch."""
        if not self.sketch:
            return 0.0
        return float(np.isin(np.array(self.sketch, dtype=np.uint64), hashes).mean())

    def overlaps(self, other: DataIdentity, hashes: NDArray[np.uint64]) -> bool:
        """Whether the samples of ``other``, whose hashes are given, are in part these.

        Both ways round, since a small set may lie inside a large one. With all hashes at hand it is found where more
        than a duplicate or two are shared, and at least one in a hundred of the smaller set; from sketches alone,
        where one in twenty is, and a set of less than about a hundredth of the other's size may go unnoticed.
        """
        if self.sha256 == other.sha256 and self.count:
            return True
        if self.hashes is not None:
            if not self.count or not len(hashes):
                return False
            shared = min(int(np.isin(hashes, self.hashes).sum()), int(np.isin(self.hashes, hashes).sum()))
            smaller = min(len(hashes), self.count)
            return shared >= max(min(2, smaller), SHARED_EXACT * smaller)
        if self.shared_with(hashes) >= SHARED:
            return True
        # The other's samples that hash below this sketch's largest entry would be in the sketch if they were here.
        if not self.sketch or not other.sketch:
            return False
        complete = len(self.sketch) < SKETCH
        below = [value for value in other.sketch if complete or value <= self.sketch[-1]]
        known = set(self.sketch)
        shared = sum(value in known for value in below)
        # A single one says nothing among many, but much where it is half of what could be known.
        return shared >= max(2, SHARED * len(below)) or 0 < len(below) <= 2 * shared

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "role": self.role,
            "count": self.count,
            "sha256": self.sha256,
            "sketch": [f"{value:x}" for value in self.sketch],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataIdentity:
        """The reverse of :meth:`to_dict`."""
        return cls(
            str(values["role"]),
            int(values["count"]),
            str(values["sha256"]),
            tuple(int(value, 16) for value in values.get("sketch", ())),
        )

    def __str__(self) -> str:
        return f"{self.role} ({self.count} samples, {self.sha256[:12]})"
