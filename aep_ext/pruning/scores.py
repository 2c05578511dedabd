"""The scores of the subsets of the exits: look them up, choose for an objective, draw the Pareto front."""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aep_ext._utils import aligned, html_table
from aep_ext.pruning.cost import Latency
from aep_ext.pruning.non_inferiority import NonInferiority, non_inferiority_test
from aep_ext.pruning.objectives import MEASURES, OBJECTIVES, Limit, bound_words, parse_constraints, written
from aep_ext.pruning.subsets import exits_of_mask, mask_of_exits

_SHOWN = 20  # rows of a printed table
_ROUNDING = 1e-12  # of limits that are sums or products


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
        nll: mean negative log-likelihood of the extracted network's answers, in nats; None where not known.
        selection: of a subset that :meth:`SubsetScores.best` chose: how, as plain values for JSON.
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
    nll: float | None = field(default=None, compare=False)  # it may be NaN
    selection: dict[str, Any] | None = field(default=None, compare=False, repr=False)

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

    def measure(self, name: str) -> float | None:
        """One of "top1", "top5", "nll", "macs", "parameters" and "latency" (median, ms); None where not known."""
        value: float | None = getattr(self, "latency_ms" if name == "latency" else name)
        return value


def _cost_key(score: SubsetScore) -> tuple[int, ...]:
    """Smaller is cheaper. Without counted costs: the earlier last exit, then fewer exits; the mask settles the rest."""
    if score.macs is None or score.parameters is None:
        return max(score.exits), len(score.exits), score.mask
    return score.macs, score.parameters, score.mask


def _choice_key(score: SubsetScore) -> tuple[int, ...]:
    return (-score.correct1, -score.correct5, *_cost_key(score))


def _better(score: SubsetScore, name: str) -> float:
    """The value of a measure, larger is better; an NLL that is no number is the worst."""
    value = score.measure(name)
    if value is None:
        raise ValueError(f"SubsetScores: {name} was not measured for these scores")
    return -math.inf if math.isnan(value) else MEASURES[name] * value


def _holds(score: SubsetScore, name: str, limit: float) -> bool:
    return _better(score, name) >= MEASURES[name] * limit - _ROUNDING * abs(limit)


def pareto_front(scores: Iterable[SubsetScore], x: str = "macs", y: str = "top1") -> list[SubsetScore]:
    """The subsets that no other beats: none is as good in both measures and better in one.

    Args:
        scores: a :class:`SubsetScores`, or any scores of it.
        x, y: two of "top1", "top5", "nll", "macs", "parameters" and "latency".

    Returns:
        The front, the best in ``x`` first and the best in ``y`` last. Of subsets that are equal in both the one that
        the published rule prefers.

    Raises:
        ValueError: no such measure, twice the same, or one that was not taken.
    """
    if x not in MEASURES or y not in MEASURES or x == y:
        raise ValueError(f"pareto_front: x and y must be two of {', '.join(MEASURES)}, got {x!r} and {y!r}")
    front: list[SubsetScore] = []
    highest = -math.inf
    for score in sorted(scores, key=lambda one: (-_better(one, x), -_better(one, y), *_choice_key(one))):
        if _better(score, y) > highest:
            front.append(score)
            highest = _better(score, y)
    return front


@dataclass(frozen=True, eq=False)
class SubsetScores:
    """The scores of the non-empty subsets of E exits: of all 2^E - 1, or of those that a beam search has seen.

    Iterates over :class:`SubsetScore` in mask order. ``print(scores)`` shows the best 20 by the published rule (see
    :meth:`best`) with exits as indices from 0, and marks those that no other subset beats in both top-1 and
    multiply-adds. A notebook shows the same. A row below is a subset; where all were scored, that of mask m is m-1.

    Attributes:
        counts: (rows, 2) int64 on the CPU, top-1 and top-min(5, K) counts.
        n: samples scored.
        exit_ids: the original number of each exit.
        parameters, macs: of each extracted network, or None where no network was at hand.
        latency: of each, or None where not asked for.
        correct: (rows, N) bool, right at top-1 per sample in the loader's order; kept on request.
        nll: (rows,) float64, mean negative log-likelihood in nats of the ensemble whose weights are divided by their
            sum, as :func:`aep_ext.prune` divides them; or None.
        subsets: the mask of each row, ascending, the set of all exits among them; None: all masks.
        beam: the width of the beam search that chose them; None where all were scored.
        upper_bound: of a beam search: no subset, scored or not, has more right answers at top-1.
        split: the name of the images, for the record.
    """

    counts: Tensor
    n: int
    exit_ids: tuple[int, ...]
    parameters: tuple[int, ...] | None = None
    macs: tuple[int, ...] | None = None
    latency: tuple[Latency, ...] | None = None
    correct: Tensor | None = None
    nll: Tensor | None = None
    subsets: tuple[int, ...] | None = None
    beam: int | None = None
    upper_bound: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        rows = self.num_subsets if self.subsets is None else len(self.subsets)
        if self.counts.dtype != torch.int64 or tuple(self.counts.shape) != (rows, 2):
            raise ValueError(
                f"SubsetScores: counts must be int64 of shape [{rows}, 2], "
                f"got {self.counts.dtype} of shape {list(self.counts.shape)}"
            )
        if self.n < 1:
            raise ValueError(f"SubsetScores: n must be at least 1, got {self.n}")
        if self.subsets is not None and (list(self.subsets) != sorted(set(self.subsets)) or self.subsets[0] < 1):
            raise ValueError("SubsetScores: subsets must be ascending masks of at least 1")
        if self.subsets is not None and self.subsets[-1] != self.num_subsets:
            raise ValueError(f"SubsetScores: subsets must end with {self.num_subsets}, all exits")
        for name in ("parameters", "macs", "latency", "correct", "nll"):
            values = getattr(self, name)
            if values is not None and len(values) != rows:
                raise ValueError(f"SubsetScores: {name} must have {rows} entries, got {len(values)}")

    @property
    def num_exits(self) -> int:
        """E."""
        return len(self.exit_ids)

    @property
    def num_subsets(self) -> int:
        """2^E - 1: how many there are, scored or not. Also the mask of all exits."""
        return (1 << self.num_exits) - 1

    @property
    def exhaustive(self) -> bool:
        """Whether all were scored."""
        return len(self) == self.num_subsets

    @property
    def masks(self) -> Sequence[int]:
        """The mask of every row."""
        return range(1, len(self) + 1) if self.subsets is None else self.subsets

    @cached_property
    def _rows(self) -> Mapping[int, int]:
        return {mask: row for row, mask in enumerate(self.masks)}

    @property
    def top1(self) -> Tensor:
        """Top-1 accuracy of every row as fractions of 1, float64."""
        return self.counts[:, 0].double() / self.n

    @property
    def top5(self) -> Tensor:
        """Top-min(5, K) accuracy of every row as fractions of 1, float64."""
        return self.counts[:, 1].double() / self.n

    def __len__(self) -> int:
        return self.counts.shape[0]

    def __iter__(self) -> Iterator[SubsetScore]:
        for mask in self.masks:
            yield self[mask]

    def __getitem__(self, subset: int | Iterable[int]) -> SubsetScore:
        """The score of a subset, given as a bit mask or as exit indices: ``scores[0b101]``, ``scores[(0, 2)]``."""
        mask = mask_of_exits(subset) if isinstance(subset, Iterable) else operator.index(subset)
        if not 1 <= mask <= self.num_subsets:
            raise IndexError(f"SubsetScores: the subset's mask must be within 1..{self.num_subsets}, got {mask}")
        exits, row = exits_of_mask(mask), self._rows.get(mask)
        if row is None:
            raise IndexError(f"SubsetScores: exits {exits} are among the subsets that the beam search left out")
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
            nll=None if self.nll is None else float(self.nll[row]),
        )

    def answers(self, score: SubsetScore) -> Tensor | None:
        """(N,) bool: whether a subset of these is right on each sample; None where that was not kept."""
        row = self._rows.get(score.mask)
        return None if row is None or self.correct is None or self[score.mask] != score else self.correct[row]

    def best(
        self,
        objective: str = "published",
        *,
        constraints: Mapping[str, float | str] | Iterable[str] | None = None,
        reference: SubsetScore | SubsetScores | None = None,
        confidence: float | None = None,
    ) -> SubsetScore:
        """Choose one subset: the best for an objective of those that meet the constraints.

        ``scores.best("macs", constraints={"top1": "-0.5"})`` is the cheapest subset that is at most half a point of
        top-1 below all exits together.

        Args:
            objective: "published" (or "top1"): the highest top-1, then top-5, then fewest multiply-adds, then fewest
                parameters, by integer counts (without counted costs, the earlier last exit, then fewer exits). "top5",
                "nll", "macs", "parameters" or "latency": the best in this; that rule settles ties.
            constraints: by measure, the least top-1 or top-5, or the most of anything else: a number (accuracies as
                fractions of 1, NLL in nats, latency in ms); "90%" for an accuracy; "50%" for a cost or the NLL: of the
                reference's; signed text for what may be lost against the reference: "-0.5" points of an accuracy,
                "+0.01" nats. Or texts "top1=-0.5", "macs=50%".
            reference: what relative constraints are held against. None: all exits together; one of these scores, for
                instance ``scores.best()``; or the scores of another network on the same samples, of which all exits
                count, for instance those of the single-exit baseline.
            confidence: a paired interval at this confidence, not the plain difference, is held against a constraint
                such as ``top1="-0.5"``: the subset is non-inferior within that margin, see
                :func:`non_inferiority_test`. Needs ``keep_correct=True``. The interval is not corrected for the choice
                among the subsets: confirm it on other images.

        Returns:
            The score; its ``selection`` says how it was chosen. :func:`aep_ext.prune` hands that on.

        Raises:
            ValueError: no such objective or measure, a measure that was not taken, a malformed constraint, or no subset
                that meets all of them; the message says which one cannot be met and what comes nearest.
        """
        if objective not in OBJECTIVES:
            raise ValueError(f"SubsetScores.best: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        base = reference[reference.num_subsets] if isinstance(reference, SubsetScores) else reference
        base = self[self.num_subsets] if base is None else base
        try:
            limits = parse_constraints(constraints)
            values = {limit.measure: limit.resolve(base) for limit in limits}
        except ValueError as error:
            raise ValueError(f"SubsetScores.best: {error}") from None
        margin = None if confidence is None else self._margin(limits)
        met = self._meeting(values)
        first = "top1" if objective == "published" else objective
        met.sort(key=lambda score: (-_better(score, first), *_choice_key(score)))
        chosen, test, tested = met[0], None, None
        if margin is not None and confidence is not None:
            right = (reference if isinstance(reference, SubsetScores) else self).answers(base)
            chosen, test, tested = self._non_inferior(met, right, margin, confidence)
        selection = {
            "objective": objective,
            "constraints": {limit.measure: limit.given for limit in limits},
            "limits": values,
            "reference": _plain(base) if limits else None,
            "confidence": confidence,
            "non_inferiority": None if test is None else test.to_dict(),
            **_plain(chosen),
            "split": self.split,
            "images": self.n,
            "subsets": self.num_subsets,
            "scored": len(self),
            "exhaustive": self.exhaustive,
            "upper_bound": None if self.upper_bound is None else self.upper_bound / self.n,
            "meeting_constraints": len(met),
            "tested": tested,
        }
        return replace(chosen, selection=selection)

    def _meeting(self, values: Mapping[str, float]) -> list[SubsetScore]:
        """The subsets inside all limits; an error that names the limit that none meets, alone or with the others."""
        scores = list(self)
        for name, value in values.items():
            if not any(_holds(score, name, value) for score in scores):
                raise ValueError(
                    f"SubsetScores.best: no subset has {bound_words(name, value)}: {_nearest(scores, name)}"
                )
        met: list[str] = []
        for name, value in values.items():
            left = [score for score in scores if _holds(score, name, value)]
            if not left:
                others = " and ".join(bound_words(other, values[other]) for other in met)
                raise ValueError(
                    f"SubsetScores.best: no subset with {others} has {bound_words(name, value)}: "
                    f"{_nearest(scores, name)}"
                )
            scores = left
            met.append(name)
        return scores

    def _margin(self, limits: Sequence[Limit]) -> float:
        """How much top-1 a constraint allows to lose, as a fraction of 1; an error where none does."""
        lost = next((-limit.value for limit in limits if limit.measure == "top1" and limit.relation), 0.0)
        if not lost > 0:
            raise ValueError(
                "SubsetScores.best: confidence needs a margin to be shown, a constraint such as top1='-0.5', got "
                f"{ {limit.measure: limit.given for limit in limits} }"
            )
        return lost

    def _non_inferior(
        self, candidates: Sequence[SubsetScore], right: Tensor | None, margin: float, confidence: float
    ) -> tuple[SubsetScore, NonInferiority, int]:
        """The first candidate that is shown to be inside the margin, the test, and how many were tested."""
        if self.correct is None or right is None:
            raise ValueError(
                "SubsetScores.best: confidence needs the answers per sample of these scores and of the reference "
                "(keep_correct=True), got none"
            )
        tests: list[tuple[SubsetScore, NonInferiority]] = []
        for score in candidates:
            tests.append((score, non_inferiority_test(self.correct[self._rows[score.mask]], right, margin, confidence)))
            if tests[-1][1]:
                return *tests[-1], len(tests)
        score, test = max(tests, key=lambda one: one[1].low)
        raise ValueError(
            f"SubsetScores.best: no subset is shown to be inside a margin of {100 * margin:g} points of top-1 with "
            f"confidence {confidence:g}: the nearest, exits {score.exits}, differs by {100 * test.difference:+.2f} "
            f"[{100 * test.low:+.2f}, {100 * test.high:+.2f}] on {self.n:,} samples"
        )

    def __str__(self) -> str:
        title, head, rows = self._table()
        return "\n".join([title, *aligned([head, *rows])])

    def _repr_html_(self) -> str:
        return html_table(*self._table())

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        best = heapq.nsmallest(_SHOWN, self, key=_choice_key)
        front = set() if self.macs is None else {score.mask for score in pareto_front(self)}
        columns: dict[str, list[str]] = {
            "": ["best" if score is best[0] else "*" if score.mask in front else "" for score in best],
            "exits": [str(score.exits) for score in best],
            "top-1 %": [f"{100 * score.top1:.2f}" for score in best],
            "top-5 %": [f"{100 * score.top5:.2f}" for score in best],
        }
        if self.nll is not None:
            columns["NLL"] = [f"{score.nll:.4f}" for score in best]
        if self.parameters is not None:
            columns["parameters"] = [f"{score.parameters:,}" for score in best]
        if self.macs is not None:
            columns["multiply-adds"] = [f"{score.macs:,}" for score in best]
        if self.latency is not None:
            columns["ms"] = [f"{score.latency_ms:.3g}" for score in best]
        shown = f"the best {len(best)} of {len(self):,} subsets" if len(best) < len(self) else f"{len(self)} subsets"
        if not self.exhaustive:
            shown += f" that a beam search of width {self.beam} scored of {self.num_subsets:,}"
            if self.upper_bound is not None:
                shown += f" (none, scored or not, has a top-1 above {100 * self.upper_bound / self.n:.2f} %)"
        marks = "" if self.macs is None else "; *: no other has both a higher top-1 and fewer multiply-adds"
        title = f"SubsetScores: {shown} of {self.num_exits} exits, {self.n:,} samples{marks}"
        return title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)]

    @classmethod
    def pooled(cls, scores: Sequence[SubsetScores]) -> SubsetScores:
        """The scores of several seeds of one network as if they were one: counts added, ``correct`` left out.

        Raises:
            ValueError: none given, or of different networks.
        """
        if not scores or len({(one.exit_ids, one.macs, one.parameters, one.subsets) for one in scores}) != 1:
            raise ValueError(f"SubsetScores.pooled: scores must be of one network, got {len(scores)} that differ")
        first, n = scores[0], sum(one.n for one in scores)
        losses = [one.nll * one.n for one in scores if one.nll is not None]
        return replace(
            first,
            counts=torch.stack([one.counts for one in scores]).sum(0),
            n=n,
            nll=torch.stack(losses).sum(0) / n if len(losses) == len(scores) else None,
            latency=None,
            correct=None,
            upper_bound=None,
        )

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
            # JSON has no NaN.
            "nll": None if self.nll is None else [None if math.isnan(x) else x for x in self.nll.tolist()],
            "subsets": None if self.subsets is None else list(self.subsets),
            "beam": self.beam,
            "upper_bound": self.upper_bound,
            "split": self.split,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SubsetScores:
        """The reverse of :meth:`to_dict`; entries that older files lack are unknown."""
        parameters, macs, latency = values.get("parameters"), values.get("macs"), values.get("latency_ms")
        nll, subsets = values.get("nll"), values.get("subsets")
        if nll is not None:
            nll = torch.tensor([math.nan if x is None else x for x in nll], dtype=torch.float64)
        return cls(
            counts=torch.tensor(values["counts"], dtype=torch.int64),
            n=int(values["n"]),
            exit_ids=tuple(values["exit_ids"]),
            parameters=None if parameters is None else tuple(parameters),
            macs=None if macs is None else tuple(macs),
            latency=None if latency is None else tuple(Latency(**entry) for entry in latency),
            nll=nll,
            subsets=None if subsets is None else tuple(subsets),
            beam=values.get("beam"),
            upper_bound=values.get("upper_bound"),
            split=values.get("split"),
        )


def _plain(score: SubsetScore) -> dict[str, Any]:
    """A score as plain values: original exit numbers, and every measure."""
    values = {name: score.measure(name) for name in MEASURES}
    values["nll"] = None if values["nll"] is None or math.isnan(values["nll"]) else values["nll"]
    return {"exits": list(score.exit_ids), **values}


def _nearest(scores: Sequence[SubsetScore], name: str) -> str:
    """What comes nearest to a limit that no score meets."""
    score = max(scores, key=lambda one: _better(one, name))
    return f"the nearest, exits {score.exits}, has {written(name, score.measure(name) or 0.0)}"


def smallest_non_inferior(
    scores: SubsetScores | Sequence[SubsetScores],
    reference: Tensor | Sequence[bool],
    margin: float,
    confidence: float = 0.95,
) -> tuple[SubsetScore, NonInferiority] | None:
    """The cheapest subset that is not worse than a reference by ``margin``, and the test that says so.

    Cheapest: fewest multiply-adds, then fewest parameters, then most right answers. The interval is not corrected
    for the choice among the subsets: choose on one set of samples and confirm on another.

    Args:
        scores: of ``score_subsets(..., keep_correct=True)`` or ``score_logits(..., keep_correct=True)``; or those of
            S seeds of one network, on the same samples.
        reference: (N,) bool, or (S, N) for S seeds: whether the reference is right on the same samples in the same
            order.

    Returns:
        The subset's score (over all seeds) and the test, or None where no subset qualifies.

    Raises:
        ValueError: the scores were taken without ``keep_correct``, or of different networks.
    """
    seeds = [scores] if isinstance(scores, SubsetScores) else list(scores)
    if any(one.correct is None for one in seeds):
        raise ValueError("smallest_non_inferior: scores must hold the answers per sample (keep_correct=True), got none")
    for score in SubsetScores.pooled(seeds).cheapest_first():
        right = [one.correct[one._rows[score.mask]] for one in seeds if one.correct is not None]
        correct = right[0] if isinstance(scores, SubsetScores) else torch.stack(right)
        result = non_inferiority_test(correct, reference, margin, confidence)
        if result:
            return score, result
    return None
