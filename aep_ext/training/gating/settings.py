"""What a user asks of a run's gate."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from aep_ext._utils import UserError
from aep_ext.termination import POLICIES

FOLDS = 5
SPARE_LIMIT = 20_000
"""So many spare images are used."""
TEMPERATURE_SHARE = 0.2
TEST_SHARE = 0.5


@dataclass(frozen=True)
class CalibrationSettings:
    """One way to calibrate a run.

    Attributes:
        budget: points of top-1 that may be lost against the pruned ensemble.
        risk: instead of a budget: the largest loss of top-1 against the pruned ensemble, a fraction of 1, that is kept
            with probability ``1 - delta``.
        delta: see ``risk``.
        policy: a built-in policy.
        judge: "ensemble" or "exit": what the policy judges; the answer is the ensemble's in either case.
        caution: so many standard errors are added to the cross-validated drop before it is held against the budget; 0:
            the plain estimate, which is missed as often as it is kept. The default asks for about 98 %, for one network
            alone; the choice among many gates and the test images' own chance take their part of that.
        output_weights: "fitted": those of the gated exits are fitted with the temperatures
            (:func:`aep_ext.ensemble.fit_output_weights`); "run": as the network was trained and pruned with.
        images: "select": choose on the run's images to select on. "spare": on the training images that it left aside
            (``train_samples``), which had no part in anything: the network passes over them once. "auto": on the spare
            ones where they are at least as many.
        seed: of the splits and the search.
    """

    budget: float = 0.5
    risk: float | None = None
    delta: float = 0.1
    policy: str = "confidence"
    judge: str = "ensemble"
    caution: float = 2.0
    output_weights: str = "fitted"
    images: str = "auto"
    seed: int = 0

    def checked(self) -> CalibrationSettings:
        """The same.

        Raises:
            UserError: a value is out of its range.
        """
        if self.policy not in POLICIES:
            raise UserError(f"no such policy: {self.policy!r} (there are: {', '.join(POLICIES)})")
        if self.judge not in ("ensemble", "exit"):
            raise UserError(f"judge must be ensemble or exit, got {self.judge!r}")
        if self.output_weights not in ("fitted", "run"):
            raise UserError(f"output_weights must be fitted or run, got {self.output_weights!r}")
        if self.images not in ("auto", "select", "spare"):
            raise UserError(f"images must be auto, select or spare, got {self.images!r}")
        if not math.isfinite(self.budget) or abs(self.budget) > 100:
            raise UserError(f"budget must be points within -100..100, got {self.budget}")
        if self.risk is not None and not 0 < self.risk < 1:
            raise UserError(f"risk must be a fraction within 0..1, got {self.risk}")
        if not 0 < self.delta < 1:
            raise UserError(f"delta must be within 0..1, got {self.delta}")
        if not 0 <= self.caution <= 10:
            raise UserError(f"caution must be standard errors within 0..10, got {self.caution}")
        return self

    @property
    def points(self) -> float:
        """The accuracy, in points, that may be lost."""
        return self.budget if self.risk is None else 100 * self.risk

    def to_dict(self) -> dict[str, Any]:
        """As plain values for ``gates.json``."""
        values = asdict(self)
        budget, risk, delta = (values.pop(name) for name in ("budget", "risk", "delta"))
        kept = (
            {"kind": "accuracy", "points": budget}
            if risk is None
            else {"kind": "risk", "epsilon": risk, "delta": delta, "loss": "drop", "method": "ltt"}
        )
        shares = {"temperatures": TEMPERATURE_SHARE}
        if risk is not None:
            shares["test"] = TEST_SHARE
        return {**values, "budget": kept, "folds": FOLDS, "shares": shares}
