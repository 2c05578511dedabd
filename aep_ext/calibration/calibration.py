"""The result of a calibration: all that a gated network needs, where it comes from, and what it promises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aep_ext.calibration.budgets import Budget, budget_from_dict, budget_to_dict
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.identity import DataIdentity, same_role
from aep_ext.calibration.table import GateTable
from aep_ext.calibration.tails import binomial_upper
from aep_ext.inference._old_criteria import POLICIES, Policy
from aep_ext.inference.agreement import near_threshold
from aep_ext.inference.simulate import simulate

_SAME = "calibrated and reported on the same data"


def refuse_same_data(function: str, cache: ExitCache, used: Sequence[DataIdentity], allow_same_data: bool) -> bool:
    """Whether ``cache`` shares samples or role with data that were used before; an error unless that is allowed.

    Raises:
        ValueError: it does, and ``allow_same_data`` is False.
    """
    for other in used:
        same_samples = other.overlaps(cache.identity, cache.hashes)
        if same_samples or same_role(other.role, cache.role):
            if not allow_same_data:
                what = "samples" if same_samples else "role"
                raise ValueError(
                    f"{function}: data must not share the {what} of the data used before, {other}, got "
                    f"{cache.identity}; allow_same_data=True does it all the same and marks the result"
                )
            return True
    return False


@dataclass(frozen=True)
class GateReport:
    """What a calibration does on a set of samples.

    Attributes:
        data: which samples.
        same_data: they, or their role, were used to calibrate: the figures are optimistic.
        correct, full_correct, n: right answers, those of the full ensemble, samples.
        degraded: how many only the full ensemble answered rightly.
        improved: how many only the early answer did.
        cost, full_cost: mean per sample.
        counts: how many were answered at each exit.
        near: how many a live network may treat otherwise, since they pass within 1e-5 of a decision; see
            :func:`near_threshold`.
    """

    data: DataIdentity
    same_data: bool
    correct: int
    full_correct: int
    degraded: int
    improved: int
    n: int
    cost: float
    full_cost: float
    counts: tuple[int, ...]
    near: int

    @property
    def accuracy(self) -> float:
        """Top-1 as a fraction of 1."""
        return self.correct / self.n

    @property
    def full_accuracy(self) -> float:
        """Top-1 of the full ensemble."""
        return self.full_correct / self.n

    @property
    def drop(self) -> float:
        """Points of top-1 below the full ensemble."""
        return 100 * (self.full_correct - self.correct) / self.n

    def degradation_bound(self, delta: float = 0.05) -> float:
        """Upper bound, with confidence 1 - delta, of the probability of a degraded answer (Clopper and Pearson).

        Means nothing where ``same_data`` is set.
        """
        return binomial_upper(self.degraded, self.n, delta)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        values = {name: value for name, value in asdict(self).items() if name != "data"}
        return {
            **values,
            "counts": list(self.counts),
            "data": self.data.to_dict(),
            "accuracy": self.accuracy,
            "full_accuracy": self.full_accuracy,
            "drop": self.drop,
        }

    def __str__(self) -> str:
        mark = f" [{_SAME}]" if self.same_data else ""
        return (
            f"top-1 {100 * self.accuracy:.2f} % ({self.drop:.2f} points below {100 * self.full_accuracy:.2f} %), "
            f"mean cost {self.cost:.6g} of {self.full_cost:.6g} ({100 * self.cost / self.full_cost:.1f} %) on "
            f"{self.data}{mark}"
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Thresholds, temperatures and flags for a gated network, with their origin.

    Attributes:
        policy: a built-in one; its ``on`` says what is judged.
        thresholds: (E-1,) float32, in the policy's unit.
        enabled: (E-1,) bool.
        temperatures: (E,) float32.
        weights: (E,) float32, the output weights that were calibrated.
        costs: (E,) cost of a sample that is answered at each exit.
        correct, full_correct, n, cost, full_cost, counts: on the calibration data, hence optimistic; see
            :meth:`evaluate`.
        budget: what was asked for, or None.
        feasible: whether it is met; False: these are the nearest thresholds that were found, or everything is off.
        exact: whether every combination of thresholds was tried.
        bound, gap: no thresholds do better on these data than the bound; how far this is from it. Or None.
        guarantee: what is promised on data of the same distribution, in words; empty where nothing is.
        data: identities of all data that were used.
        same_data: whether data for reporting were calibrated on, or a path was tested on its own data.
        seed: of splits and search.
        notice: what a user should be told.
        temperature_fits: how the temperatures were found, one dict per exit; empty where they were given.
        exit_ids: original numbers of the exits; empty where they are not known.
    """

    policy: Policy
    thresholds: Tensor
    enabled: Tensor
    temperatures: Tensor
    weights: Tensor
    costs: tuple[float, ...]
    correct: int
    full_correct: int
    n: int
    cost: float
    full_cost: float
    counts: tuple[int, ...]
    budget: Budget | None
    feasible: bool
    exact: bool
    bound: float | None
    gap: float | None
    guarantee: str
    data: tuple[DataIdentity, ...]
    same_data: bool
    seed: int
    notice: str = ""
    temperature_fits: tuple[dict[str, Any], ...] = ()
    exit_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        exits = len(self.temperatures)
        if (
            tuple(self.thresholds.shape) != (exits - 1,)
            or tuple(self.enabled.shape) != (exits - 1,)
            or tuple(self.weights.shape) != (exits,)
            or len(self.costs) != exits
        ):
            raise ValueError(
                f"Calibration: {exits} temperatures must come with {exits - 1} thresholds and flags and "
                f"{exits} weights and costs, got {list(self.thresholds.shape)}, "
                f"{list(self.enabled.shape)}, {list(self.weights.shape)} and {len(self.costs)}"
            )

    @property
    def accuracy(self) -> float:
        """Top-1 on the calibration data, as a fraction of 1."""
        return self.correct / self.n

    @property
    def full_accuracy(self) -> float:
        """Top-1 of the full ensemble on the calibration data."""
        return self.full_correct / self.n

    @property
    def drop(self) -> float:
        """Points of top-1 below the full ensemble, on the calibration data."""
        return 100 * (self.full_correct - self.correct) / self.n

    def evaluate(self, cache: ExitCache, *, allow_same_data: bool = False) -> GateReport:
        """What the thresholds do on other data, by the simulator.

        Args:
            cache: of the same network, at least one sample, with another role than the calibration data.
            allow_same_data: report on the calibration data (or their role) all the same; the report is marked.

        Raises:
            ValueError: the cache is of another network, or shares samples or role with the calibration data.
        """
        if cache.num_exits != len(self.temperatures) or not torch.equal(cache.weights, self.weights):
            raise ValueError(
                f"Calibration.evaluate: cache must have the output weights {self.weights.tolist()}, "
                f"got {cache.weights.tolist()}"
            )
        if self.exit_ids and cache.exit_ids != self.exit_ids:
            raise ValueError(
                f"Calibration.evaluate: cache must hold the exits {list(self.exit_ids)}, got {list(cache.exit_ids)}"
            )
        if not len(cache):
            raise ValueError("Calibration.evaluate: cache must hold at least one sample, got none")
        same = refuse_same_data("Calibration.evaluate", cache, self.data, allow_same_data) or self.same_data
        outcome = simulate(
            cache.logits,
            cache.weights,
            self.policy,
            self.thresholds,
            temperatures=self.temperatures,
            enabled=self.enabled,
            target=cache.target,
            costs=self.costs,
        )
        table = GateTable.of(cache.logits, cache.weights, cache.target, self.policy, self.temperatures)
        right, full = outcome.correct.numpy(), table.right[-1]
        near = near_threshold(
            cache.logits,
            cache.weights,
            self.policy,
            self.thresholds,
            temperatures=self.temperatures,
            enabled=self.enabled,
        )
        return GateReport(
            cache.identity,
            same,
            int(right.sum()),
            int(full.sum()),
            int((full & ~right).sum()),
            int((right & ~full).sum()),
            len(cache),
            float(outcome.mean_cost),
            float(self.costs[-1]),
            tuple(outcome.counts.tolist()),
            int(near.sum()),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "policy": {"name": self.policy.name, "on": self.policy.on},
            "thresholds": self.thresholds.tolist(),
            "enabled": self.enabled.tolist(),
            "temperatures": self.temperatures.tolist(),
            "weights": self.weights.tolist(),
            "costs": list(self.costs),
            "correct": self.correct,
            "full_correct": self.full_correct,
            "n": self.n,
            "cost": self.cost,
            "full_cost": self.full_cost,
            "counts": list(self.counts),
            "budget": None if self.budget is None else budget_to_dict(self.budget),
            "feasible": self.feasible,
            "exact": self.exact,
            "bound": self.bound,
            "gap": self.gap,
            "guarantee": self.guarantee,
            "data": [identity.to_dict() for identity in self.data],
            "same_data": self.same_data,
            "seed": self.seed,
            "notice": self.notice,
            "temperature_fits": [dict(fit) for fit in self.temperature_fits],
            "exit_ids": list(self.exit_ids),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The reverse of :meth:`to_dict`.

        Raises:
            ValueError: an entry is missing, the policy is unknown, or shapes do not fit.
        """
        try:
            return cls._from_dict(values)
        except KeyError as error:
            raise ValueError(f"Calibration.from_dict: values must have the entry {error}, got none") from error

    @classmethod
    def _from_dict(cls, values: dict[str, Any]) -> Calibration:
        name = values["policy"]["name"]
        if name not in POLICIES:
            raise ValueError(f"Calibration.from_dict: policy must be one of {', '.join(POLICIES)}, got {name!r}")
        rest = {
            key: values[key]
            for key in (
                "correct",
                "full_correct",
                "n",
                "cost",
                "full_cost",
                "feasible",
                "exact",
                "bound",
                "gap",
                "guarantee",
                "same_data",
                "seed",
                "notice",
            )
        }
        gates = len(values["temperatures"]) - 1
        return cls(
            policy=POLICIES[name](values["policy"]["on"]),
            thresholds=torch.tensor(values["thresholds"], dtype=torch.float32).reshape(gates),
            enabled=torch.tensor(values["enabled"], dtype=torch.bool).reshape(gates),
            temperatures=torch.tensor(values["temperatures"], dtype=torch.float32),
            weights=torch.tensor(values["weights"], dtype=torch.float32),
            costs=tuple(values["costs"]),
            counts=tuple(values["counts"]),
            budget=None if values["budget"] is None else budget_from_dict(values["budget"]),
            data=tuple(DataIdentity.from_dict(entry) for entry in values["data"]),
            temperature_fits=tuple(values["temperature_fits"]),
            exit_ids=tuple(values.get("exit_ids", ())),
            **rest,
        )

    def marked(self, notice: str) -> Calibration:
        """The same with one more notice."""
        return replace(self, notice="; ".join(part for part in (self.notice, notice) if part))

    def __str__(self) -> str:
        gates = ", ".join(
            f"{value:.4g}" if on else "off"
            for value, on in zip(self.thresholds.tolist(), self.enabled.tolist(), strict=True)
        )
        parts = [
            f"{self.policy.name} on {self.policy.on}: [{gates}]",
            f"{self.drop:.2f} points lost and mean cost {100 * self.cost / self.full_cost:.1f} % on the "
            f"calibration data ({self.n} samples)",
        ]
        parts += ["BUDGET NOT MET"] if not self.feasible else []
        parts += [self.guarantee] if self.guarantee else []
        parts += [_SAME.upper()] if self.same_data else []
        parts += [self.notice] if self.notice else []
        return "; ".join(parts)
