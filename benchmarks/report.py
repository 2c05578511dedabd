"""Writes the tables of README.md, docs/ and benchmarks/RESULTS.md from the committed result files: no figure enters
them any other way.

    python benchmarks/report.py                  # rewrite the tables
    python benchmarks/report.py --check          # exit status 1 if a document does not say what the files say
    python benchmarks/report.py --plot cpu-ops   # draw benchmarks/results/cpu-ops.png from cpu-ops.json

A table stands between ``<!-- KIND: NAME TABLE -->`` and ``<!-- /KIND -->``, KIND being ``benchmarks``, ``gated`` or
``results``, and comes from ``benchmarks/results/NAME.json``. TABLE is one of benchmarks/tables.py (goals, operators,
fallback, machine, trunk, engines, overhead, peer, curves), or, where the file is the ``results.json`` of a run, one of
aep_ext/report/tables.py (run, gates, bench); without TABLE it is ``run``. A goal that was missed needs a note in
benchmarks/notes.toml: ``--check`` sees to it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext._io import write_text  # noqa: E402
from aep_ext._utils import UserError  # noqa: E402
from aep_ext.report.results import check_results  # noqa: E402
from aep_ext.report.tables import bench_markdown, gates_markdown, results_markdown  # noqa: E402
from benchmarks.aggregate import ResultError, load  # noqa: E402
from benchmarks.goals import cpu_findings, load_goals  # noqa: E402
from benchmarks.plots import plot_goals  # noqa: E402
from benchmarks.tables import TABLES, UNEXPLAINED  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
RUN_TABLES = {"run": results_markdown, "gates": gates_markdown, "bench": bench_markdown}
_MARKERS = re.compile(
    r"(?P<head><!-- (?P<kind>benchmarks|gated|results): (?P<name>[\w-]+)(?: (?P<table>\w+))? -->\n)"
    r".*?(?P<tail><!-- /(?P=kind) -->)",
    re.DOTALL,
)


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _table(table: str, content: dict[str, Any]) -> str:
    if table in TABLES:
        return TABLES[table](content)
    if table not in RUN_TABLES:
        raise ResultError(f"there is no such table; there are {', '.join([*TABLES, *RUN_TABLES])}")
    check_results(content)
    return RUN_TABLES[table](content)


def _content(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"report: {path.name} cannot be read: {error}") from error


def rendered(text: str) -> str:
    """``text`` with every table made anew.

    Raises:
        ResultError: a result file cannot be read or is of another kind, or there is no such table.
    """

    def made(match: re.Match[str]) -> str:
        name, table = match["name"], match["table"] or "run"
        content = _content(name)
        try:
            return match["head"] + _table(table, content) + match["tail"]
        except (KeyError, TypeError, ResultError, UserError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ResultError(f"report: {name}.json, table {table}: {what}") from error

    return _MARKERS.sub(made, text)


def unexplained(text: str) -> Iterator[str]:
    """The goals that ``text`` shows as missed without saying what bounds them."""
    for name, table in sorted({(match["name"], match["table"] or "run") for match in _MARKERS.finditer(text)}):
        if table in UNEXPLAINED:
            yield from UNEXPLAINED[table](_content(name))


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Write the documents' tables from the committed result files.")
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    parser.add_argument("--plot", metavar="NAME", help="only draw benchmarks/results/NAME.png from NAME.json")
    arguments = parser.parse_args(argv)
    try:
        if arguments.plot:
            result = load(RESULTS / f"{arguments.plot}.json")
            print(plot_goals(cpu_findings(load_goals(), result, {}), RESULTS / f"{arguments.plot}.png"))
            return 0
        texts = {path: path.read_text(encoding="utf-8") for path in documents()}
        after = {path: rendered(text) for path, text in texts.items()}
        missing = list(unexplained("".join(texts.values())))
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    for goal in missing:
        print(f"report: missed, and benchmarks/notes.toml does not say what bounds it: {goal}", file=sys.stderr)
    stale = [path for path in texts if after[path] != texts[path]]
    if arguments.check:
        for path in stale:
            print(f"{path.name} does not say what benchmarks/results says: run benchmarks/report.py", file=sys.stderr)
        return int(bool(stale) or bool(missing))
    for path in stale:
        write_text(path, after[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
