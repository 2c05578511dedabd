"""Runs the benchmarks in pieces and keeps what is done: stopped at any moment, it goes on where it was.

    python benchmarks/sweep.py --output FILE.json                  all cases (hours)
    python benchmarks/sweep.py --output FILE.json -m "quick or goal" -- --inductor auto
    python benchmarks/sweep.py --output FILE.json -k "stats and not bfloat16" -- --case-seconds 2

Each piece is a pytest process of its own over a few cases of one file; its results are merged into FILE.json
(benchmarks/aggregate.py says what is in it) before the next one begins. Cases that are in the file are not run again;
cases that were skipped or failed are. What follows ``--`` goes to pytest (torch.compile is a baseline everywhere unless
``--inductor`` says otherwise). Exit status: 0 all cases are in the file or were skipped for a reason, 1 some failed,
2 a bad argument.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks.aggregate import ResultError, aggregate, load, merge, save  # noqa: E402

ALWAYS = ("--full", "--inductor=always")
Piece = tuple[dict[str, Any] | None, dict[str, str], list[str]]
"""The results of some cases (None if none ran), the skipped ones' reasons, the failed ones' names."""


def case_name(node: str) -> str:
    """``test_x[a-b]`` of ``benchmarks/test_file.py::test_x[a-b]``."""
    return node.split("::", 1)[1]


def pieces(nodes: Iterable[str], size: int) -> list[list[str]]:
    """Cases in their order, at most ``size`` together, all of one file."""
    found = []
    for _, group in groupby(nodes, key=lambda node: node.split("::", 1)[0]):
        of_file = list(group)
        found += [of_file[i : i + size] for i in range(0, len(of_file), size)]
    return found


def outcomes(junit: Path) -> tuple[dict[str, str], list[str]]:
    """From pytest's JUnit file: the reasons of the skipped cases, and the names of the failed ones."""
    skipped, failed = {}, []
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        name = case.get("name", "")
        if (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
    return skipped, failed


def _pytest(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]


def _run(command: Sequence[str], **options: Any) -> int:
    """The exit status; a pytest that outlives this process would disturb the next measurement, so it is ended."""
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()


def collect(folder: str, expression: str, marks: str, extra: Sequence[str]) -> list[str]:
    """The cases' node ids; pytest chooses them.

    Raises:
        ResultError: pytest found none, or could not look.
    """
    command = _pytest([folder, *ALWAYS, "--collect-only", "-m", marks, "-k", expression, *extra])
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    nodes = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if done.returncode not in (0, 5):
        raise ResultError(f"pytest could not collect the cases:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if not nodes:
        raise ResultError("no case is selected")
    return nodes


def run_piece(nodes: Sequence[str], extra: Sequence[str]) -> Piece:
    """Runs some cases in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        raw, junit, log = (Path(folder) / name for name in ("raw.json", "junit.xml", "log"))
        options = [*ALWAYS, "--benchmark-only", f"--benchmark-json={raw}", f"--junitxml={junit}", *extra]
        with log.open("wb") as file:
            status = _run(_pytest([*nodes, *options]), stdout=file, stderr=subprocess.STDOUT)
        if status != 0:
            print(log.read_text(encoding="utf-8", errors="replace")[-3000:], file=sys.stderr)
        if status not in (0, 1) or not junit.is_file():  # 1: some failed; else pytest itself did
            return None, {}, [case_name(node) for node in nodes]
        skipped, failed = outcomes(junit)
        text = raw.read_text(encoding="utf-8") if raw.is_file() else ""
        result = aggregate(json.loads(text)) if text.strip() else None
    for name in failed:  # a comparison after the timing may fail
        if result is not None:
            result["cases"].pop(name, None)
    return (result if result and result["cases"] else None), skipped, failed


def run_all(
    output: Path, nodes: Sequence[str], size: int, runner: Callable[[Sequence[str]], Piece], say: Callable[[str], None]
) -> int:
    """Runs what is not in ``output`` yet, piece by piece; the number of failed cases."""
    result = load(output) if output.is_file() else None
    done = set(result["cases"]) if result else set()
    waiting = [node for node in nodes if case_name(node) not in done]
    say(f"sweep: {len(nodes)} cases, {len(nodes) - len(waiting)} done before")
    failures, finished, start = 0, 0, time.monotonic()
    for piece in pieces(waiting, size):
        new, skipped, failed = runner(piece)
        failures += len(failed)
        if new is not None:
            new["skipped"] = skipped
            result = merge(result, new)
        elif result is not None:
            result["skipped"] |= skipped
        if result is not None:
            save(output, result)
        finished += len(piece)
        left = (time.monotonic() - start) / finished * (len(waiting) - finished)
        trouble = f", {len(skipped)} skipped" * bool(skipped) + f", FAILED: {' '.join(failed)}" * bool(failed)
        say(f"sweep: {len(nodes) - len(waiting) + finished} of {len(nodes)}, about {left / 60:.0f} min left{trouble}")
    return failures


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Run the benchmarks in pieces; stopped, it goes on where it was.")
    parser.add_argument("--output", type=Path, required=True, help="the result file; what is in it is not run again")
    parser.add_argument("-k", dest="expression", default="", help="as pytest's -k")
    parser.add_argument("-m", dest="marks", default="not gpu", help="as pytest's -m (default: not gpu)")
    parser.add_argument("--piece", type=int, default=10, help="cases in one process (default 10)")
    parser.add_argument("--folder", default="benchmarks", help="file or folder with the benchmarks")
    parser.add_argument("pytest", nargs="*", help="after --: more arguments for pytest")
    arguments = parser.parse_args(argv)
    if arguments.piece < 1:
        parser.error(f"--piece must be at least 1, got {arguments.piece}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        marks = f"({arguments.marks}) and not gpu"
        nodes = collect(arguments.folder, arguments.expression, marks, arguments.pytest)

        def runner(piece: Sequence[str]) -> Piece:
            return run_piece(piece, arguments.pytest)

        failures = run_all(arguments.output, nodes, arguments.piece, runner, lambda text: print(text, flush=True))
    except ResultError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
