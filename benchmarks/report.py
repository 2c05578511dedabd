"""Writes the tables of README.md and benchmarks/RESULTS.md from the committed result files: no figure enters them any
other way.

    python benchmarks/report.py            # rewrite the tables
    python benchmarks/report.py --check    # exit status 1 if a document does not say what the files say
    python benchmarks/report.py --figure cpu-ops   # draw benchmarks/results/cpu-ops.png from cpu-ops.json

A table between ``<!-- results: NAME -->`` and ``<!-- /results -->`` comes from ``benchmarks/results/NAME.json``, the
``results.json`` of an ``aep run``. One between ``<!-- benchmarks: NAME TABLE -->`` and ``<!-- /benchmarks -->`` comes
from a result of benchmarks/condense.py or matrix.py of that name; TABLE is goals, operators, fallback, machine, trunk
or engines. One between ``<!-- gated: NAME TABLE -->`` and ``<!-- /gated -->`` comes from the file of that name that
benchmarks/gated_tables.py speaks of; TABLE is gates, bench, peer or overhead. A goal that was missed needs a note in
benchmarks/notes.toml: ``--check`` sees to it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext._io import write_text  # noqa: E402
from aep_ext.report.numbers import exits, fewer, method_name, points  # noqa: E402
from aep_ext.report.tables import HEAD, model_rows  # noqa: E402
from benchmarks import figure, gated_tables, tables, trunk  # noqa: E402
from benchmarks.condense import ResultError, load  # noqa: E402
from benchmarks.goals import judge, load_goals, load_notes  # noqa: E402

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md")
RESULTS = ROOT / "benchmarks" / "results"
_TABLE = re.compile(r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)
_BENCHMARKS = re.compile(
    r"(?P<head><!-- benchmarks: (?P<name>[\w-]+) (?P<table>\w+) -->\n).*?(?P<tail><!-- /benchmarks -->)", re.DOTALL
)
_GATED = re.compile(
    r"(?P<head><!-- gated: (?P<name>[\w-]+) (?P<table>\w+) -->\n).*?(?P<tail><!-- /gated -->)", re.DOTALL
)
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
    """``text`` with every table made anew.

    Raises:
        ResultError: a benchmark result cannot be read, or there is no such table.
    """

    def run(match: re.Match[str]) -> str:
        results = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        return match[1] + table(results) + match[3]

    def benchmarks(match: re.Match[str]) -> str:
        if match["table"] not in tables.TABLES:
            raise ResultError(f"report: no such table: {match['table']}; there are {', '.join(tables.TABLES)}")
        made = tables.TABLES[match["table"]](load(RESULTS / f"{match['name']}.json"))
        return match["head"] + made + match["tail"]

    def gated(match: re.Match[str]) -> str:
        return match["head"] + gated_tables.made(match["table"], RESULTS / f"{match['name']}.json") + match["tail"]

    return _GATED.sub(gated, _BENCHMARKS.sub(benchmarks, _TABLE.sub(run, text)))


def unexplained(text: str) -> list[str]:
    """The goals that ``text`` shows as missed without saying what bounds them."""
    missing = []
    for name, kind in sorted({(match["name"], match["table"]) for match in _BENCHMARKS.finditer(text)}):
        result = load(RESULTS / f"{name}.json")
        if kind == "goals":
            verdicts = judge(load_goals(), result, load_notes())
            missing += [f"{v.goal.operator} {v.goal.case} {v.goal.measure}" for v in verdicts if v.unexplained]
        elif kind == "trunk":
            missing += trunk.unexplained(result)
    for name, kind in sorted({(match["name"], match["table"]) for match in _GATED.finditer(text)}):
        missing += gated_tables.unexplained(kind, RESULTS / f"{name}.json")
    return missing


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Write the documents' tables from the committed result files.")
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    parser.add_argument("--figure", metavar="NAME", help="only draw benchmarks/results/NAME.png from NAME.json")
    arguments = parser.parse_args(argv)
    try:
        if arguments.figure:
            result = load(RESULTS / f"{arguments.figure}.json")
            print(figure.draw(judge(load_goals(), result, {}), RESULTS / f"{arguments.figure}.png"))
            return 0
        texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
        after = {path: rendered(text) for path, text in texts.items()}
        missing = unexplained("".join(texts.values()))
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    for goal in missing:
        print(f"report: missed, and benchmarks/notes.toml does not say what bounds it: {goal}", file=sys.stderr)
    stale = [path for path in DOCUMENTS if after[path] != texts[path]]
    if arguments.check:
        for path in stale:
            print(f"{path.name} does not say what benchmarks/results says: run benchmarks/report.py", file=sys.stderr)
        return int(bool(stale) or bool(missing))
    for path in stale:
        write_text(path, after[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
