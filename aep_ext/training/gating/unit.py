"""What a finished run holds of one seed and one family of exit weights, as far as a gate needs it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aep_ext import ops
from aep_ext._io import read_arrays, read_json
from aep_ext._utils import UserError
from aep_ext.termination import ExitCache
from aep_ext.training.evaluate import right_answers
from aep_ext.training.folder import BASELINE, RunFolder


@dataclass(frozen=True, eq=False)
class Unit:
    """One trained multi-exit network of a run.

    Attributes:
        seed, name: which one; ``name`` is the family of exit weights.
        part: the content of its ``part.json``.
        baseline: that of the single-exit network of its seed.
        select, report: exit logits and labels of all exits on the images to select (or to calibrate) and to report on.
        baseline_right: (N,) whether the single-exit network is right on the images to report on.
        digest: SHA-256 of the files that all of this was read from.
    """

    seed: int
    name: str
    part: dict[str, Any]
    baseline: dict[str, Any]
    select: ExitCache
    report: ExitCache
    baseline_right: Tensor
    digest: str

    @classmethod
    def read(cls, folder: RunFolder, seed: int, name: str) -> Unit:
        """Read it from a finished run.

        Raises:
            UserError: a file is missing.
        """
        wanted = [folder.part(seed, name), folder.part(seed, BASELINE)]
        wanted += [folder.unit(seed, unit) / "predictions.npz" for unit in (name, BASELINE)]
        absent = [path for path in wanted if not path.is_file()]
        if absent:
            raise UserError(f"{absent[0]} is not there: the run is unfinished, or its folder has lost a file")
        part, baseline = (read_json(path) for path in wanted[:2])
        arrays = read_arrays(wanted[2])
        weights = part["exit_weights"]["output"]
        select, report = (
            ExitCache.from_logits(
                torch.from_numpy(arrays[f"{role}_logits"]),
                torch.from_numpy(arrays[f"{role}_labels"]),
                weights,
                role="calibration" if role == "select" else "report",
                copy=False,
            )
            for role in ("select", "report")
        )
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in wanted))
        return cls(
            seed,
            name,
            part,
            baseline,
            select,
            report,
            torch.from_numpy(read_arrays(wanted[3])["report_right_full"]),
            digest.hexdigest(),
        )

    def calibrated_on(self, logits: Tensor, labels: Tensor) -> Unit:
        """The same with other images instead of those to select on: exit logits (E, N, K) and labels (N,)."""
        cache = ExitCache.from_logits(logits, labels, self.select.weights, role="calibration", copy=False)
        return replace(self, select=cache)

    @property
    def macs(self) -> list[int]:
        """Multiply-adds of every subset; entry m-1 is the one of mask m."""
        return self.part["scores"]["macs"]

    @property
    def pruned_exits(self) -> list[int]:
        """The exits of the pruned ensemble, original numbers."""
        return self.part["pruned"]["exits"]

    @property
    def pruned_macs(self) -> int:
        """Multiply-adds of the pruned ensemble."""
        return self.part["pruned"]["macs"]

    def right(self, role: str, exits: list[int] | None = None) -> Tensor:
        """(N,) whether the ensemble of some exits (None: all) is right, on the images of "select" or "report"."""
        cache = self.select if role == "select" else self.report
        rows = list(range(cache.num_exits)) if exits is None else exits
        together = ops.ensemble(cache.logits[rows].contiguous(), cache.weights[rows])
        return right_answers(together, cache.target)
