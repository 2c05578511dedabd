"""Keeps what a calibrated run found, for the documents' tables, among the committed result files.

    python benchmarks/keep.py RUN NAME

``RUN/gates.json`` becomes ``benchmarks/results/NAME.json`` without what only the run's own page shows (examples, most
points of the curves, the other choices that were weighed); ``RUN/bench.json``, where there is one, becomes
``NAME-bench.json`` as it is. A file that holds a path or this machine's name is refused.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext._io import write_json  # noqa: E402
from aep_ext._utils import UserError  # noqa: E402
from aep_ext.report.gates_file import check_gates, read_bench, read_gates  # noqa: E402
from benchmarks.condense import ResultError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
POINTS = 25  # of a curve
_PATH = re.compile(r"(^|[\s:'\"])(/|~/|[A-Za-z]:\\)\w")


def slim_gates(gates: dict[str, Any]) -> dict[str, Any]:
    """``gates`` as ``gates.json`` holds them, without what the tables do not need; still a valid file of gates."""
    methods = {
        family: {**method, "seeds": [_slim_seed(seed) for seed in method["seeds"]]}
        for family, method in gates["methods"].items()
    }
    kept = {name: value for name, value in gates.items() if name != "fingerprint"} | {"methods": methods}
    check_gates(kept)
    return kept


def _slim_seed(seed: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in seed.items() if name != "fingerprint"}
    kept |= {"curve": thinned(seed["curve"]), "examples": {"first": [], "last": []}}
    if isinstance(seed.get("choice"), dict):
        kept["choice"] = {name: value for name, value in seed["choice"].items() if name != "candidates"}
    return kept


def thinned(points: list[Any], most: int = POINTS) -> list[Any]:
    """At most ``most`` of the points, evenly, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def private(value: Any, place: str = "") -> Iterator[str]:
    """The places whose text names a path or this machine."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from private(part, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from private(part, f"{place}[{index}]")
    elif isinstance(value, str) and (_PATH.search(value) or (len(platform.node()) > 3 and platform.node() in value)):
        yield place


def keep(run: str | Path, name: str, results: Path | None = None) -> list[Path]:
    """Writes the result files of a run; where they are.

    Raises:
        ResultError: the run has no gates, a file is not valid, or holds something private.
    """
    results = RESULTS if results is None else results
    try:
        gates, bench = read_gates(run), read_bench(run)
        if gates is None:
            raise ResultError(f"{run} holds no gates.json: aep calibrate writes it")
        files = {f"{name}.json": slim_gates(gates)} | ({f"{name}-bench.json": bench} if bench else {})
    except UserError as error:
        raise ResultError(str(error)) from error
    for file, content in files.items():
        for place in private(content):
            raise ResultError(f"{file} would tell a path or a machine's name: {place}")
    return [write_json(results / file, content) for file, content in files.items()]


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description="Keep a calibrated run's gates among the result files.")
    parser.add_argument("run", metavar="RUN", help="a folder of aep run that was calibrated")
    parser.add_argument("name", metavar="NAME", help="of the result file in benchmarks/results, without .json")
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[\w-]+", arguments.name):
        parser.error(f"NAME must be of letters, digits, _ and -, got {arguments.name!r}")
    try:
        for path in keep(arguments.run, arguments.name):
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    except ResultError as error:
        print(f"keep: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
