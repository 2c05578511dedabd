"""A path of thresholds, fixed before the data that test it are looked at: what a guarantee is given along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aep_ext.calibration.budgets import LOSSES
from aep_ext.calibration.cached_logits import ExitCache
from aep_ext.calibration.curve import ThresholdCurve
from aep_ext.calibration.identity import DataIdentity
from aep_ext.calibration.table import GateTable
from aep_ext.inference._old_criteria import Custom, Policy, as_policy


@dataclass(frozen=True, eq=False)
class ThresholdPath:
    """Steps from careful to bold, each a full set of thresholds.

    Attributes:
        policy: a built-in one.
        thresholds, enabled: (M, E-1) float32 and bool.
        temperatures: (E,) float32.
        sources: the data from which path or temperatures were made; none for a path made without data. The data that
            test it must be others.
        description: how the path was made.
    """

    policy: Policy
    thresholds: Tensor
    enabled: Tensor
    temperatures: Tensor
    sources: tuple[DataIdentity, ...]
    description: str

    def __post_init__(self) -> None:
        if isinstance(self.policy, Custom) or not self.policy.built_in:
            raise ValueError(f"ThresholdPath: policy must be a built-in one, got {type(self.policy).__name__}")
        gates = len(self.temperatures) - 1
        if (
            self.thresholds.dim() != 2
            or self.thresholds.shape[1] != gates
            or len(self.thresholds) < 1
            or self.enabled.shape != self.thresholds.shape
        ):
            raise ValueError(
                f"ThresholdPath: thresholds and enabled must have shape [M, {gates}] with M >= 1, "
                f"got {list(self.thresholds.shape)} and {list(self.enabled.shape)}"
            )

    def __len__(self) -> int:
        return len(self.thresholds)

    @classmethod
    def parametric(
        cls,
        policy: Policy | str,
        exits: int,
        *,
        classes: int | None = None,
        steps: int = 50,
        on: str | None = None,
        temperatures: Sequence[float] | Tensor | None = None,
        sources: Sequence[DataIdentity] = (),
    ) -> ThresholdPath:
        """The same threshold at every gate, from strict to lax, in equal steps; uses no data.

        Confidence and margin go down from 1, the entropy up from 0 (``classes`` is needed for its range), patience and
        vote down from the number of exits.

        Args:
            policy: a built-in policy or its name.
            exits: E.
            classes: K.
            steps: of a policy with a continuous threshold.
            temperatures: (E,), 1 by default. If they were fitted, name the data in ``sources``.

        Raises:
            ValueError: the entropy without ``classes``, or as the class.
        """
        rule = as_policy(policy, on)
        if exits < 1 or steps < 1:
            raise ValueError(f"ThresholdPath.parametric: exits and steps must be at least 1, got {exits} and {steps}")
        floor = 0.0 if classes is None or rule.name == "margin" else 1.0 / classes
        if rule.name == "entropy":
            if classes is None:
                raise ValueError("ThresholdPath.parametric: classes must be given for the entropy, got None")
            values = np.linspace(0, math.log(classes), steps + 1)[1:]
        elif rule.name in ("patience", "vote"):
            values = np.arange(exits, 0, -1, dtype=float)
        else:
            values = np.linspace(1, floor, steps + 1)[1:]
        thresholds = torch.tensor(values, dtype=torch.float32)[:, None].repeat(1, exits - 1)
        return cls(
            rule,
            thresholds,
            torch.ones_like(thresholds, dtype=torch.bool),
            _temperatures(temperatures, exits),
            tuple(sources),
            f"one threshold for all gates, {len(thresholds)} steps",
        )

    @classmethod
    def from_curve(cls, curve: ThresholdCurve, sources: Sequence[DataIdentity], *, steps: int = 100) -> ThresholdPath:
        """The accuracy-cost curve of OTHER data, from the dearest point to the cheapest.

        Args:
            curve: of a :class:`ThresholdSearch`, best one with the ``loss`` that will be controlled.
            sources: identities of the data behind the curve and its temperatures; at least one. The data on which the
                curve was found are added if they are missing.

        Raises:
            ValueError: no source is named.
        """
        if not sources:
            raise ValueError("ThresholdPath.from_curve: sources must name the data behind the curve, got none")
        some = curve.thinned(max(2, steps))
        used = tuple(sources)
        if curve.data is not None and curve.data not in used:
            used = (*used, curve.data)
        return cls(
            curve.policy,
            some.thresholds.flip(0),
            some.enabled.flip(0),
            curve.temperatures,
            used,
            f"accuracy-cost curve of {sources[0]}, {len(some)} steps",
        )

    def exits(self, cache: ExitCache) -> tuple[NDArray[np.int64], GateTable]:
        """(M, N) the exit at which each sample is answered at each step, and the answers; nothing is run again."""
        if cache.num_exits != len(self.temperatures):
            raise ValueError(
                f"ThresholdPath: the cache must have {len(self.temperatures)} exits, got {cache.num_exits}"
            )
        table = GateTable.of(cache.logits, cache.weights, cache.target, self.policy, self.temperatures)
        taken = [
            table.leaving(row.double().numpy(), on.numpy())
            for row, on in zip(self.thresholds, self.enabled, strict=True)
        ]
        return np.stack(taken), table


def _temperatures(values: Sequence[float] | Tensor | None, exits: int) -> Tensor:
    scales = torch.ones(exits) if values is None else torch.as_tensor(values, dtype=torch.float32).cpu().clone()
    if tuple(scales.shape) != (exits,) or not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(f"ThresholdPath: temperatures must be {exits} positive numbers, got {scales.tolist()}")
    return scales


def losses_at(taken: NDArray[np.int64], table: GateTable, loss: str) -> NDArray[np.int8]:
    """The loss of every sample at every step, against the full ensemble: (M, N) of -1, 0 and 1.

    - "degradation": 1 where the full ensemble is right and the early answer wrong, else 0. Its mean is at least the
      loss of accuracy.
    - "drop": right answers of the full ensemble less those of the early answer, -1, 0 or 1. Its mean is the loss of
      accuracy.
    - "disagreement": 1 where the early answer differs from the full ensemble's, right or not, else 0; needs no labels
      (M. Jazbec et al., "Fast yet safe: early-exiting with risk control", 2024).

    Args:
        taken: (M, N) exits taken.
        table: the answers at all exits.
    """
    if loss not in LOSSES:
        raise ValueError(f"losses_at: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    samples = np.arange(taken.shape[1])
    if loss == "disagreement":
        return (table.predictions[taken, samples] != table.predictions[-1]).astype(np.int8)
    full, early = table.right[-1].astype(np.int8), table.right[taken, samples].astype(np.int8)
    return full - early if loss == "drop" else full & ~early & np.int8(1)


def path_losses(cache: ExitCache, path: ThresholdPath, loss: str) -> NDArray[np.int8]:
    """:func:`losses_at` for every step of a path on a cache: (M, N)."""
    taken, table = path.exits(cache)
    return losses_at(taken, table, loss)
