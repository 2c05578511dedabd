"""The goals of the GPU half beside a result file.

python3 -m benchmarks.gpu.goals benchmarks/results/gpu-NAME.json
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("goals.toml")


@dataclass(frozen=True)
class Goal:
    """``measure``: a path into a case's details. Exactly one of the thresholds is set."""

    text: str
    stage: str
    cases: tuple[str, ...]
    measure: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """``>= 0.85``."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def met(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


def load(file: Path = FILE) -> list[Goal]:
    """The goals in the file's order.

    Raises:
        ValueError: a goal has no threshold, or two.
    """
    goals = []
    for entry in tomllib.loads(file.read_text(encoding="utf-8"))["goal"]:
        goal = Goal(**(entry | {"cases": tuple(entry["cases"])}))
        if (goal.at_least is None) == (goal.at_most is None):
            raise ValueError(f"{file.name}: {goal.text}: at_least or at_most, and not both")
        goals.append(goal)
    return goals


def value_at(details: dict[str, Any], measure: str) -> float | None:
    """What lies at a dotted path, or None."""
    found: Any = details
    for key in measure.split("."):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def judge(goals: Iterable[Goal], result: dict[str, Any]) -> Iterator[tuple[Goal, str, float | None, str]]:
    """Goal, case, value (None: not measured) and verdict: "met", "missed", or why there is none."""
    for goal in goals:
        parts = result["stages"].get(goal.stage, {})
        names = [name for name in parts if any(fnmatch.fnmatchcase(name, pattern) for pattern in goal.cases)]
        if not names:
            yield goal, "-", None, "not measured"
        for name in names:
            value = value_at(parts[name].get("details", {}), goal.measure)
            if value is None:
                yield goal, name, None, f"not measured ({parts[name]['status']})"
            else:
                yield goal, name, value, "met" if goal.met(value) else "missed"


def text(result: dict[str, Any], goals: Sequence[Goal] | None = None) -> str:
    """A table for each goal, and how many were met."""
    machine, lines, verdicts, last = result.get("machine", {}), [], [], None
    lines.append(f"{machine.get('gpu', 'unknown GPU')}, torch {machine.get('torch', '?')}")
    for goal, case, value, verdict in judge(load() if goals is None else goals, result):
        if goal is not last:
            lines += ["", f"{goal.text}: {goal.bound}"]
            last = goal
        shown = "-" if value is None else f"{value:g}"
        lines.append(f"  {case:<52} {shown:>10}  {verdict}")
        verdicts.append(verdict)
    met, missed = verdicts.count("met"), verdicts.count("missed")
    lines += ["", f"{met} met, {missed} missed, {len(verdicts) - met - missed} not measured"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(text(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
