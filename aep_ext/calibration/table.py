"""What every gate sees on cached logits: the score by which it judges each sample, and whether the answer is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.inference._old_criteria import Custom, Policy, as_policy

_COLUMNS = {"confidence": 0, "entropy": 1, "margin": 2}


@dataclass(frozen=True, eq=False)
class GateTable:
    """Scores and answers of N samples at E exits, computed by the step that simulator and executors take.

    Attributes:
        policy: a built-in one.
        scores: (E-1, N) float64, larger leaves sooner (the entropy with its sign changed); NaN never leaves. The values
            are float32 numbers, or whole numbers for patience and vote, so that comparisons are the gate's own.
        predictions: (E, N) int64, the answer at each exit.
        right: (E, N) bool, whether it is right.
        classes: K.
    """

    policy: Policy
    scores: NDArray[np.float64]
    predictions: NDArray[np.int64]
    right: NDArray[np.bool_]
    classes: int

    @classmethod
    def of(
        cls,
        exit_logits: Tensor,
        weights: Sequence[float] | Tensor,
        target: Tensor,
        policy: Policy | str,
        temperatures: Sequence[float] | Tensor,
        on: str | None = None,
    ) -> GateTable:
        """Walk all samples through all gates, with nobody leaving.

        Args:
            exit_logits: (E, N, K).
            weights: (E,) output weights.
            target: (N,) int64.
            policy: a built-in policy or its name.
            temperatures: (E,).

        Raises:
            ValueError: the policy is a user's own rule, whose thresholds mean what only the user knows.
        """
        rule = as_policy(policy, on)
        if isinstance(rule, Custom) or not rule.built_in:
            raise ValueError(
                "thresholds: policy must be a built-in one (confidence, entropy, margin, patience, vote), "
                f"got {type(rule).__name__}"
            )
        exits, samples, classes = exit_logits.shape
        acc = torch.float64 if exit_logits.dtype == torch.float64 else torch.float32
        factors, scales = _floats(weights), _floats(temperatures)
        indices = torch.arange(samples)
        nothing = torch.zeros(samples, 1)
        running, state = torch.zeros(samples, classes, dtype=acc), rule.initial_state(samples, classes)
        weight_sum: float | Tensor = 0.0
        scores = np.empty((exits - 1, samples))
        predictions = np.empty((exits, samples), dtype=np.int64)
        right = np.empty((exits, samples), dtype=bool)
        with torch.no_grad():
            for e in range(exits):
                step = rule.gate(
                    nothing,
                    running,
                    weight_sum,
                    indices,
                    state,
                    exit_logits[e],
                    exit_index=e,
                    weight=factors[e],
                    threshold=0.0,
                    temperature=scales[e],
                    enabled=False,
                )
                running, state, weight_sum = step.running, step.state, step.weight_sum
                predictions[e] = step.argmax.numpy()
                right[e] = ((step.argmax == target) & ~running.isnan().any(dim=1)).numpy()
                if e < exits - 1:
                    scores[e] = _score(rule.name, step.stats, state)
        return cls(rule, scores, predictions, right, classes)

    def values(self, e: int) -> NDArray[np.float64]:
        """The different scores at gate e, descending, without NaN."""
        found = np.unique(self.scores[e])
        return found[~np.isnan(found)][::-1]

    def threshold(self, e: int, limit: int) -> tuple[float, bool]:
        """The threshold in the policy's unit by which the best ``limit`` groups leave gate e, and whether it is on.

        Midway between the last score that leaves and the first that stays, as a float32 number. With everybody leaving
        it is beyond every possible score. A gate that is off gets the strictest sensible number, which is not used.
        """
        if limit == 0:
            return {"entropy": 0.0, "patience": float(len(self.right)), "vote": float(len(self.right))}.get(
                self.policy.name, 1.0
            ), False
        values = self.values(e)
        sign = -1.0 if self.policy.name == "entropy" else 1.0
        if self.policy.name in ("patience", "vote"):
            return float(values[limit - 1]), True
        if limit == len(values):
            return (math.log(self.classes) + 1.0 if sign < 0 else 0.0), True
        leaves, stays = values[limit - 1], values[limit]
        middle = float(np.float32((leaves + stays) / 2))
        # Neighbours in float32 have no number between them; the score that leaves is then the threshold.
        return sign * (middle if middle > stays else float(leaves)), True

    def against_the_ensemble(self, loss: str) -> GateTable:
        """The same, with ``right`` saying whether an exit's answer is no loss against the full ensemble's.

        "drop": as it is. "degradation": right, or the full ensemble is wrong too. "disagreement": the full ensemble's
        answer. So the last exit loses nothing under the latter two.
        """
        if loss == "drop":
            return self
        kept = self.predictions == self.predictions[-1] if loss == "disagreement" else self.right | ~self.right[-1]
        return replace(self, right=kept)

    def leaving(self, thresholds: NDArray[np.float64], enabled: NDArray[np.bool_]) -> NDArray[np.int64]:
        """(N,) the exit at which each sample is answered, for (E-1,) thresholds in the policy's unit."""
        taken = np.full(self.right.shape[1], len(self.right) - 1, dtype=np.int64)
        for e in range(len(self.scores) - 1, -1, -1):
            if enabled[e]:
                taken[self.leaves(e, float(thresholds[e]))] = e
        return taken

    def leaves(self, e: int, threshold: float) -> NDArray[np.bool_]:
        """(N,) bool: whose score reaches ``threshold`` at gate e."""
        if self.policy.name not in _COLUMNS:
            return self.scores[e] >= threshold
        limit = float(np.float32(threshold))  # the gate compares in float32
        return self.scores[e] >= (-limit if self.policy.name == "entropy" else limit)


def _floats(values: Sequence[float] | Tensor) -> list[float]:
    return [float(v) for v in (values.tolist() if isinstance(values, Tensor) else values)]


def _score(name: str, stats: Tensor, state: Tensor) -> NDArray[np.float64]:
    """What the gate compares, larger is surer; NaN where the sample has no distribution to judge."""
    if name in _COLUMNS:
        score = stats[:, _COLUMNS[name]].double()
        return (-score if name == "entropy" else score).numpy()
    counted = state[:, 1] if name == "patience" else state.amax(dim=1)
    return counted.double().masked_fill(stats[:, 0].isnan(), math.nan).numpy()
