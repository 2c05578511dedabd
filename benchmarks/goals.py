"""The kernels' goals beside their results: goals.toml, judged by a result file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Goal:
    """One threshold. ``measure``: a path into a case of a result file, ``paired_ratio.best_eager``."""

    operator: str
    case: str
    against: str
    measure: str
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None

    @property
    def name(self) -> str:
        """The case's name in the result file."""
        return f"test_{self.operator}[cpu-{self.case}]"

    @property
    def text(self) -> str:
        """``>= 5 (6)``, with the stretch in brackets."""
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return bound + ("" if self.stretch is None else f" ({self.stretch:g})")

    def met(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


@dataclass(frozen=True)
class Verdict:
    """A goal with its result (``value`` None: not measured) and a ``note``: what bounds a miss, or why not measured."""

    goal: Goal
    value: float | None
    spread: float | None
    note: str

    @property
    def met(self) -> bool | None:
        """None where it was not measured."""
        return None if self.value is None else self.goal.met(self.value)

    @property
    def unexplained(self) -> bool:
        """A miss without a note."""
        return self.met is False and not self.note


def load_goals(path: Path = FOLDER / "goals.toml") -> list[Goal]:
    """The goals in the file's order.

    Raises:
        ValueError: an entry has no threshold, or two.
    """
    goals = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["goal"]:
        for case in entry["cases"]:
            for check in entry["checks"]:
                goal = Goal(entry["operator"], case, **check)
                if (goal.at_least is None) == (goal.at_most is None):
                    raise ValueError(f"{path.name}: {goal.name}, {goal.measure}: at_least or at_most, and not both")
                goals.append(goal)
    return goals


def load_notes(path: Path = FOLDER / "notes.toml") -> dict[str, str]:
    """What bounds the goals that were missed."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["bounded_by"]


def judge(goals: Iterable[Goal], result: dict[str, Any], notes: dict[str, str]) -> list[Verdict]:
    """Every goal with what ``result`` says of it. Operators of which it holds no case belong to another file."""
    names = [*result["cases"], *result["skipped"]]
    verdicts = []
    for goal in goals:
        if not any(name.startswith(f"test_{goal.operator}[") for name in names):
            continue
        case = result["cases"].get(goal.name)
        if case is None:
            verdicts.append(Verdict(goal, None, None, result["skipped"].get(goal.name, "not in the result file")))
            continue
        group, key = goal.measure.split(".", 1)
        value = case[group].get(key)
        if value is None:
            verdicts.append(Verdict(goal, None, None, case["more"].get("left_out", {}).get(key, "not measured")))
            continue
        spread = case["iqr"].get(key) if group == "paired_ratio" else None
        key = f"{goal.operator} {goal.case}"
        note = notes.get(f"{key} {goal.measure}", notes.get(key, "")) if not goal.met(value) else ""
        verdicts.append(Verdict(goal, value, spread, note))
    return verdicts
