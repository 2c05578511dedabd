"""The scores of all subsets of the exits: look them up, choose by the published rule, draw the Pareto front."""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aep_ext._utils import aligned, html_table
from aep_ext.pruning.cost import Latency
from aep_ext.pruning.subsets import exits_of_mask, mask_of_exits

# What a goal or an axis reads from a score, with the sign that makes more of it better.
_AXES: dict[str, tuple[str, int]] = {
    "top1": ("correct1", 1),
    "top5": ("correct5", 1),
    "macs": ("macs", -1),
    "parameters": ("parameters", -1),
    "latency": ("latency_ms", -1),
}

_SHOWN = 20  # rows of a printed table


@dataclass(frozen=True)
class SubsetScore:
    """One subset of the exits: its right answers and its costs.

    Attributes:
        mask: bit ``1 << e`` is set for exit e.
        exits: the indices of its exits in the network that was scored.
        exit_ids: their original numbers (the same, unless that network was pruned before).
        correct1, correct5: samples right at top-1 and at top-min(5, K).
        n: samples.
        parameters, macs, latency: of the extracted network at batch 1; None where not known.
    """

    mask: int
    exits: tuple[int, ...]
    exit_ids: tuple[int, ...]
    correct1: int
    correct5: int
    n: int
    parameters: int | None = None
    macs: int | None = None
    latency: Latency | None = None

    @property
    def top1(self) -> float:
        """Top-1 accuracy as a fraction of 1."""
        return self.correct1 / self.n

    @property
    def top5(self) -> float:
        """Top-min(5, K) accuracy as a fraction of 1."""
        return self.correct5 / self.n

    @property
    def latency_ms(self) -> float | None:
        """Median latency in milliseconds, or None."""
        return None if self.latency is None else self.latency.median


def _cost_key(score: SubsetScore) -> tuple[int, ...]:
    """Smaller is cheaper. Without counted costs: the earlier last exit, then fewer exits; the mask settles the rest."""
    if score.macs is None or score.parameters is None:
        return max(score.exits), len(score.exits), score.mask
    return score.macs, score.parameters, score.mask


def _choice_key(score: SubsetScore) -> tuple[int, ...]:
    return (-score.correct1, -score.correct5, *_cost_key(score))


def _better(score: SubsetScore, axis: str) -> float:
    """The value on an axis, larger is better."""
    name, sign = _AXES[axis]
    value = getattr(score, name)
    if value is None:
        raise ValueError(f"SubsetScores: {axis} was not measured for these scores")
    return sign * value


@dataclass(frozen=True, eq=False)
class SubsetScores:
    """The scores of all 2^E - 1 non-empty subsets of E exits. Iterates over :class:`SubsetScore` in mask order.

    ``print(scores)`` shows the best 20 by the published rule (see :meth:`best`) with exits as indices from 0, and marks
    those that no other subset beats in both top-1 and multiply-adds. A notebook shows the same.

    Attributes:
        counts: (2^E - 1, 2) int64 on the CPU; row m-1 holds the top-1 and top-min(5, K) counts of the subset with
            bit mask m.
        n: samples scored.
        exit_ids: the original number of each exit.
        parameters, macs: of each extracted network, or None where no network was at hand.
        latency: of each, or None where not asked for.
        correct: (2^E - 1, N) bool, right at top-1 per sample in the loader's order; kept on request.
    """

    counts: Tensor
    n: int
    exit_ids: tuple[int, ...]
    parameters: tuple[int, ...] | None = None
    macs: tuple[int, ...] | None = None
    latency: tuple[Latency, ...] | None = None
    correct: Tensor | None = None

    def __post_init__(self) -> None:
        rows = (1 << len(self.exit_ids)) - 1
        if self.counts.dtype != torch.int64 or tuple(self.counts.shape) != (rows, 2):
            raise ValueError(
                f"SubsetScores: counts must be int64 of shape [{rows}, 2], "
                f"got {self.counts.dtype} of shape {list(self.counts.shape)}"
            )
        if self.n < 1:
            raise ValueError(f"SubsetScores: n must be at least 1, got {self.n}")
        for name in ("parameters", "macs", "latency", "correct"):
            values = getattr(self, name)
            if values is not None and len(values) != rows:
                raise ValueError(f"SubsetScores: {name} must have {rows} entries, got {len(values)}")

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.exit_ids)

    @property
    def masks(self) -> range:
        """1 .. 2^E - 1, in the order of the rows."""
        return range(1, len(self) + 1)

    @property
    def top1(self) -> Tensor:
        """Top-1 accuracy of every subset as fractions of 1, float64."""
        return self.counts[:, 0].double() / self.n

    @property
    def top5(self) -> Tensor:
        """Top-min(5, K) accuracy of every subset as fractions of 1, float64."""
        return self.counts[:, 1].double() / self.n

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __iter__(self) -> Iterator[SubsetScore]:
        for mask in self.masks:
            yield self[mask]

    def __getitem__(self, subset: int | Iterable[int]) -> SubsetScore:
        """The score of a subset, given as a bit mask or as exit indices: ``scores[0b101]``, ``scores[(0, 2)]``."""
        mask = mask_of_exits(subset) if isinstance(subset, Iterable) else operator.index(subset)
        if not 1 <= mask <= len(self):
            raise IndexError(f"SubsetScores: the subset's mask must be within 1..{len(self)}, got {mask}")
        exits, row = exits_of_mask(mask), mask - 1
        return SubsetScore(
            mask=mask,
            exits=exits,
            exit_ids=tuple(self.exit_ids[e] for e in exits),
            correct1=int(self.counts[row, 0]),
            correct5=int(self.counts[row, 1]),
            n=self.n,
            parameters=None if self.parameters is None else self.parameters[row],
            macs=None if self.macs is None else self.macs[row],
            latency=None if self.latency is None else self.latency[row],
        )

    def best(
        self,
        goal: str = "top1",
        *,
        min_top1: float | None = None,
        max_macs: int | None = None,
        max_parameters: int | None = None,
        max_latency: float | None = None,
    ) -> SubsetScore:
        """Choose one subset by integer counts.

        "top1", the published rule: the highest top-1, then top-5, then fewest multiply-adds, then fewest parameters
        (without counted costs, the earlier last exit, then fewer exits). Any other goal ("top5", "macs",
        "parameters", "latency") goes first, and that rule settles its ties.

        Args:
            goal: see above.
            min_top1: consider only subsets with at least this top-1 accuracy (fraction of 1).
            max_macs, max_parameters, max_latency: or with at most these costs (latency: median, ms).

        Raises:
            ValueError: no such goal, a cost that was not measured, or no subset inside the limits.
        """
        if goal not in _AXES:
            raise ValueError(f"SubsetScores.best: goal must be one of {', '.join(_AXES)}, got {goal!r}")
        candidates: list[SubsetScore] = list(self)
        for axis, limit in (("macs", max_macs), ("parameters", max_parameters), ("latency", max_latency)):
            if limit is not None:
                candidates = [score for score in candidates if _better(score, axis) >= -limit]
        if min_top1 is not None:
            candidates = [score for score in candidates if score.top1 >= min_top1]
        if not candidates:
            raise ValueError("SubsetScores.best: no subset is inside the limits")
        return min(candidates, key=lambda score: (-_better(score, goal), *_choice_key(score)))

    def pareto(self, axes: Sequence[str] = ("top1", "macs")) -> list[SubsetScore]:
        """The subsets that no other beats: as good on every axis and better on one. The best on the first axis leads.

        Of subsets that are equal on every axis, the one that :meth:`best` prefers is listed.

        Args:
            axes: at least one of "top1", "top5", "macs", "parameters", "latency".
        """
        if not axes or any(axis not in _AXES for axis in axes):
            raise ValueError(f"SubsetScores.pareto: axes must be from {', '.join(_AXES)}, got {tuple(axes)}")
        rows = [(tuple(_better(score, axis) for axis in axes), score) for score in self]
        rows.sort(key=lambda row: (tuple(-value for value in row[0]), _choice_key(row[1])))
        front: list[tuple[tuple[float, ...], SubsetScore]] = []
        for values, score in rows:  # in this order a row can only be beaten, or equalled, by one already seen
            if not any(all(b >= v for b, v in zip(beating, values, strict=True)) for beating, _ in front):
                front.append((values, score))
        return [score for _, score in front]

    def __str__(self) -> str:
        title, head, rows = self._table()
        return "\n".join([title, *aligned([head, *rows])])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        best = heapq.nsmallest(_SHOWN, self, key=_choice_key)
        front = set() if self.macs is None else {score.mask for score in self.pareto()}
        columns: dict[str, list[str]] = {
            "": ["best" if score is best[0] else "*" if score.mask in front else "" for score in best],
            "exits": [str(score.exits) for score in best],
            "top-1 %": [f"{100 * score.top1:.2f}" for score in best],
            "top-5 %": [f"{100 * score.top5:.2f}" for score in best],
        }
        for title, values in (("parameters", self.parameters), ("multiply-adds", self.macs)):
            if values is not None:
                columns[title] = [f"{values[score.mask - 1]:,}" for score in best]
        if self.latency is not None:
            columns["ms"] = [f"{score.latency_ms:.3g}" for score in best]
        shown = f"the best {len(best)} of {len(self)} subsets" if len(best) < len(self) else f"{len(self)} subsets"
        marks = "" if self.macs is None else "; *: no other has both a higher top-1 and fewer multiply-adds"
        title = f"SubsetScores: {shown} of {self.num_exits} exits, {self.n:,} samples{marks}"
        return title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def pooled(cls, scores: Sequence[SubsetScores]) -> SubsetScores:
        """The scores of several seeds of one network as if they were one: counts added, ``correct`` left out.

        Raises:
            ValueError: none given, or of different networks.
        """
        if not scores or len({(one.exit_ids, one.macs, one.parameters) for one in scores}) != 1:
            raise ValueError(f"SubsetScores.pooled: scores must be of one network, got {len(scores)} that differ")
        counts = torch.stack([one.counts for one in scores]).sum(0)
        first = scores[0]
        return cls(counts, sum(one.n for one in scores), first.exit_ids, first.parameters, first.macs)

    def cheapest_first(self) -> list[SubsetScore]:
        """All subsets by fewest multiply-adds, then fewest parameters, then most right answers."""

        def key(score: SubsetScore) -> tuple[int, ...]:
            *cost, mask = _cost_key(score)
            return (*cost, -score.correct1, -score.correct5, mask)

        return sorted(self, key=key)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; the answers per sample (``correct``) are left out."""
        return {
            "n": self.n,
            "exit_ids": list(self.exit_ids),
            "counts": self.counts.tolist(),
            "parameters": None if self.parameters is None else list(self.parameters),
            "macs": None if self.macs is None else list(self.macs),
            "latency_ms": None if self.latency is None else [latency.to_dict() for latency in self.latency],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubsetScores:
        """The reverse of :meth:`to_dict`."""
        parameters, macs, latency = values.get("parameters"), values.get("macs"), values.get("latency_ms")
        return cls(
            counts=torch.tensor(values["counts"], dtype=torch.int64),
            n=int(values["n"]),
            exit_ids=tuple(values["exit_ids"]),
            parameters=None if parameters is None else tuple(parameters),
            macs=None if macs is None else tuple(macs),
            latency=None if latency is None else tuple(Latency(**entry) for entry in latency),
        )
