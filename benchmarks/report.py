"""Writes README.md's tables from the committed result files: no figure enters the document any other way.

    python benchmarks/report.py            # rewrite the tables in README.md
    python benchmarks/report.py --check    # exit status 1 if README.md does not say what the files say

A table stands between ``<!-- results: NAME -->`` and ``<!-- /results -->`` and comes from
``benchmarks/results/NAME.json``, the ``results.json`` of an ``aep run``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from aep_ext.report.files import write_text
from aep_ext.report.numbers import exits, fewer, method_name, points
from aep_ext.report.tables import HEAD, model_rows

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
# Latency is left out: absolute times of one machine mean little elsewhere. The report of a run has them.
_COLUMNS = tuple(name for name in HEAD if not name.startswith("latency"))


def verdicts(results: dict[str, Any]) -> list[str]:
    """One sentence for each method: its smallest subset inside the margin, and what the test images say of it."""
    baseline, margin = results["summary"]["baseline"], results["config"]["margin"]
    lines = []
    for family, method in results["summary"]["methods"].items():
        name, compact = method_name(family), method["compact"]
        if compact is None:
            lines.append(f"- {name}: no subset is inside the margin of {margin:g} point on the validation images.")
            continue
        cost = fewer(compact["macs"]["mean"], baseline["macs"]["mean"], "multiply-adds")
        found = "inside the margin" if compact["verdict"]["non_inferior"] else "not shown to be inside the margin"
        lines.append(
            f"- {name}: the smallest subset inside a margin of {margin:g} point on the validation images is exit "
            f"{exits(compact['exits'])} with {cost}; on the test images it lies {points(compact['verdict'])} points "
            f"from the baseline: {found}."
        )
    return lines


def table(results: dict[str, Any]) -> str:
    """The models of a run as a Markdown table, without latencies, and the verdicts below."""
    rows = [row[: len(_COLUMNS)] for row in model_rows(results)]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(_COLUMNS) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *verdicts(results)]) + "\n"


def rendered(text: str) -> str:
    """``text`` with every table made anew."""

    def one(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        return match[1] + table(results) + match[3]

    return _TABLE.sub(one, text)


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Write README.md's tables from the committed result files.")
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    check = parser.parse_args(argv).check
    before = README.read_text(encoding="utf-8")
    after = rendered(before)
    if check:
        if before != after:
            print("README.md does not say what benchmarks/results says: run benchmarks/report.py", file=sys.stderr)
        return int(before != after)
    write_text(README, after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
