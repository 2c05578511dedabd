"""Did something get slower? Compares two result files by their ratios, not by their times.

    python benchmarks/compare.py OLD.json NEW.json [--threshold 0.1] [--baseline best_eager] [--all] [--anyway]

The baseline is torch, which both runs have met on their day: its paired ratio hardly feels how quick the machine was. A
case counts as slower when the ratio fell by more than the threshold (a fraction) *and* by more than both runs' own
spread: half a quartile range to either side of each median. Exit status: 0 nothing is slower, 1 something is, or a
case of OLD is gone, 2 the files cannot be compared (another machine, torch, instruction set or thread count; --anyway
does it all the same).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks.aggregate import ResultError, load, machine_differences  # noqa: E402

# May differ without making ratios incomparable: the version under test is what one wants to compare.
_FREE = ("version", "python_version")


@dataclass(frozen=True)
class Change:
    """One case in both files. Ratios are the baseline's time over the fused operator's."""

    name: str
    baseline: str
    old: float
    new: float
    spread: float

    def verdict(self, threshold: float) -> str:
        """``SLOWER`` where the ratio fell by more than the threshold and both spreads, ``faster``, or ``same``."""
        if self.new < self.old * (1 - threshold) and self.old - self.new > self.spread:
            return "SLOWER"
        return "faster" if self.new > self.old / (1 - threshold) and self.new - self.old > self.spread else "same"


def compare(
    old: dict[str, Any], new: dict[str, Any], baseline: str | None = None, *, same_threads: bool = True
) -> tuple[list[Change], list[str]]:
    """The cases that both files have, and the names of those that ``new`` has lost.

    The baseline is, for each case, the first that both have of: the one asked for, ``best_eager``, ``inductor``,
    ``reference``, any other.

    Raises:
        ResultError: the thread counts of a case differ, and ``same_threads``.
    """
    changes, gone = [], []
    for name, before in old["cases"].items():
        after = new["cases"].get(name)
        if after is None:
            gone.append(name)
            continue
        if same_threads and before["threads"] != after["threads"]:
            raise ResultError(f"{name}: {before['threads']} and {after['threads']} threads")
        both = [key for key in before["paired_ratio"] if key in after["paired_ratio"]]
        wanted = [baseline] if baseline else ["best_eager", "inductor", "reference", *both]
        key = next((key for key in wanted if key in both), None)
        if key is not None:
            # Half a quartile range to either side of each median.
            spread = (before["iqr"].get(key, 0.0) + after["iqr"].get(key, 0.0)) / 2
            changes.append(Change(name, key, before["paired_ratio"][key], after["paired_ratio"][key], spread))
    return changes, gone


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What forbids comparing: everything about the machine but the versions of aep_ext and Python."""
    kept = [{k: v for k, v in result["machine"].items() if k not in _FREE} for result in (old, new)]
    return machine_differences(*kept)


def table(changes: list[Change], threshold: float, everything: bool = False) -> str:
    """The cases that changed, or all of them, the slowest first, and how many did not change."""
    changed = [change for change in changes if change.verdict(threshold) != "same"]
    shown = sorted(changes if everything else changed, key=lambda change: change.new / change.old)
    width = max([len(change.name) for change in shown], default=0)
    lines = [
        f"{c.verdict(threshold):6}  {c.name:{width}}  against {c.baseline}: "
        f"{c.old:.3g} -> {c.new:.3g} (x {c.new / c.old:.2f}, spread {c.spread:.2g})"
        for c in shown
    ]
    return "\n".join([*lines, f"{len(changes) - len(changed)} of {len(changes)} cases unchanged"])


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Compare two benchmark results by their ratios.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="a fall of this fraction counts (default 0.1)")
    parser.add_argument("--baseline", help="compare the ratios to this baseline (default: best_eager)")
    parser.add_argument("--all", action="store_true", help="show the unchanged cases too")
    parser.add_argument("--anyway", action="store_true", help="even if machine or threads differ")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.threshold < 1:
        parser.error(f"--threshold must be within 0..1, got {arguments.threshold}")
    try:
        old, new = load(arguments.old), load(arguments.new)
        differ = differences(old, new)
        if differ and not arguments.anyway:
            raise ResultError("the files come from different surroundings: " + "; ".join(differ))
        changes, gone = compare(old, new, arguments.baseline, same_threads=not arguments.anyway)
    except ResultError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(table(changes, arguments.threshold, arguments.all))
    for name in gone:
        print(f"GONE    {name}")
    return int(bool(gone) or any(change.verdict(arguments.threshold) == "SLOWER" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
