"""The goals beside their results: goals.toml for the CPU's benchmarks, gpu/goals.toml for the GPU check.

python -m benchmarks.goals benchmarks/results/gpu-NAME.json     prints the GPU's goals beside a result of gpu_check.sh
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

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Goal:
    """One threshold.

    Attributes:
        subject: an operator, or a stage of the GPU check.
        case: its case; a pattern of cases in the GPU's goals.
        text: what is compared with, or a sentence in the GPU's goals.
        measure: a dotted path into a case of the result file, ``paired_ratio.best_eager``.
        at_least, at_most: exactly one of them is set.
        stretch: what would be better still.
    """

    subject: str
    case: str
    text: str
    measure: str
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None

    @property
    def name(self) -> str:
        """The case's name in a result file of the CPU's benchmarks."""
        return f"test_{self.subject}[cpu-{self.case}]"

    @property
    def bound(self) -> str:
        """``>= 5 (6)``, with the stretch in brackets."""
        bound = f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"
        return bound + ("" if self.stretch is None else f" ({self.stretch:g})")

    def met(self, value: float) -> bool:
        """Whether ``value`` is on the right side."""
        return value >= self.at_least if self.at_least is not None else value <= self.at_most


@dataclass(frozen=True)
class Finding:
    """A goal with its result.

    Attributes:
        goal: the goal.
        case: the case's name.
        value: None where it was not measured.
        spread: the quartile range of a paired ratio.
        note: what bounds a miss, or why it was not measured.
    """

    goal: Goal
    case: str
    value: float | None
    spread: float | None = None
    note: str = ""

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
                goal = Goal(entry.get("operator") or entry["stage"], case, **check)
                if (goal.at_least is None) == (goal.at_most is None):
                    raise ValueError(
                        f"{path.name}: {goal.subject} {case}, {goal.measure}: at_least or at_most, not both"
                    )
                goals.append(goal)
    return goals


def load_notes(path: Path = FOLDER / "notes.toml") -> dict[str, str]:
    """What bounds the goals that were missed."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["bounded_by"]


def value_at(entry: dict[str, Any], path: str) -> float | None:
    """What lies at a dotted path, or None."""
    found: Any = entry
    for key in path.split("."):
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return found


def cpu_findings(goals: Iterable[Goal], result: dict[str, Any], notes: dict[str, str]) -> list[Finding]:
    """Every goal with what ``result`` says of it. Operators of which it holds no case belong to another file."""
    names = [*result["cases"], *result["skipped"]]
    findings = []
    for goal in goals:
        if not any(name.startswith(f"test_{goal.subject}[") for name in names):
            continue
        case, key = result["cases"].get(goal.name), goal.measure.rpartition(".")[2]
        value = None if case is None else value_at(case, goal.measure)
        if case is None:
            note = result["skipped"].get(goal.name, "not in the result file")
        elif value is None:
            note = case["more"].get("left_out", {}).get(key, "not measured")
        else:
            about = f"{goal.subject} {goal.case}"
            note = "" if goal.met(value) else notes.get(f"{about} {goal.measure}", notes.get(about, ""))
        paired = value is not None and goal.measure.startswith("paired_ratio.")
        findings.append(Finding(goal, goal.case, value, case["iqr"].get(key) if paired else None, note))
    return findings


def gpu_findings(goals: Iterable[Goal], result: dict[str, Any]) -> Iterator[Finding]:
    """Every goal with each case of the GPU check that it speaks of."""
    for goal in goals:
        parts = result["stages"].get(goal.subject, {})
        names = [name for name in parts if fnmatch.fnmatchcase(name, goal.case)]
        if not names:
            yield Finding(goal, goal.case, None, note="not measured")
        for name in names:
            value = value_at(parts[name].get("details", {}), goal.measure)
            note = f"not measured ({parts[name]['status']})" if value is None else ""
            yield Finding(goal, name, value, note=note)


def gpu_text(result: dict[str, Any], goals: Sequence[Goal] | None = None) -> str:
    """A table for each of the GPU's goals, and how many were met."""
    goals = load_goals(FOLDER / "gpu" / "goals.toml") if goals is None else goals
    machine, last, findings = result.get("machine", {}), None, list(gpu_findings(goals, result))
    lines = [f"{machine.get('gpu', 'unknown GPU')}, torch {machine.get('torch', '?')}"]
    for finding in findings:
        if finding.goal.text != last:
            last = finding.goal.text
            lines += ["", f"{last}: {finding.goal.bound}"]
        value = "-" if finding.value is None else f"{finding.value:g}"
        told = {True: "met", False: "missed", None: finding.note}[finding.met]
        lines.append(f"  {finding.case:<52} {value:>10}  {told}")
    met = [finding.met for finding in findings]
    lines += ["", f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(gpu_text(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
