"""Instructions per call at small sizes, counted by valgrind's callgrind: a second opinion that no neighbour disturbs.

    python -m benchmarks.callgrind                    counts and prints
    python -m benchmarks.callgrind --output FILE      writes FILE (JSON) too

Whole Python calls of the operators against what eager torch needs for the same result, in one process, with the
counters that torch has for `torch.utils.benchmark.Timer.collect_callgrind` (which starts a process for every
function). Results are compared before anything is counted.

An instruction count is no time: caches, memory and the width of the processor do not enter. Two runs agree within 1 %.
It needs valgrind on the PATH and a torch with counters (Linux). Valgrind emulates no AVX-512: kernels and torch run
with AVX2 at most.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aep_ext import __version__, _load
from aep_ext._io import write_json
from benchmarks.cases import Case
from benchmarks.paired_timing import Comparison, assert_same
from benchmarks.test_ensemble import ensemble_stats
from benchmarks.test_gate import gate
from benchmarks.test_head import multi_exit_linear_head
from benchmarks.test_loss import joint_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("scalar", "avx2", "neon")  # that valgrind can emulate
# Valgrind counts every byte of a `rep movsb`, with which the C library copies much, as an instruction of its own:
# copies by vectors are counted instead.
_TUNABLES = ":".join(f"glibc.cpu.x86_rep_{name}_threshold=1073741824" for name in ("movsb", "stosb"))


class CountError(Exception):
    """Nothing can be counted here; the message is one line."""


def comparisons() -> dict[str, Comparison]:
    """The cases whose calls are counted."""
    return {
        "ensemble_stats-4-1-10": ensemble_stats(Case((4, 1, 10)), "cpu"),
        "gate-1-512-8-8": gate(Case((1,)), "cpu"),
        "multi_exit_linear_head-1-64px": multi_exit_linear_head(Case((1, 64)), "cpu"),
        "joint_cross_entropy-4-64-10-with-backward": joint_cross_entropy(Case((4, 64, 10)), "cpu"),
    }


def count_here(calls: int) -> None:
    """What runs under valgrind: compares, then counts function by function. Prints what was counted, in order."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    functions: dict[str, tuple[Callable[..., object], tuple[Any, ...]]] = {"empty fused": (lambda: None, ())}
    for case, comparison in comparisons().items():
        arguments = comparison.make()
        expected = comparison.fused(*arguments)
        for name, function in {"fused": comparison.fused, **comparison.baselines}.items():
            assert_same(name, function(*arguments), expected, comparison)
            functions[f"{case} {name}"] = function, arguments
    gc.disable()
    print(torch.backends.cpu.get_cpu_capability())
    for name, (function, arguments) in functions.items():
        for _ in range(5):
            function(*arguments)
        gc.collect()
        torch._C._valgrind_toggle()
        for _ in range(calls):
            function(*arguments)
        torch._C._valgrind_toggle_and_dump_stats()
        print(name)


def _run(command: list[str], **environment: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise CountError(f"callgrind: {Path(command[0]).name} failed with status {run.returncode}: {last}")
    return run.stdout


def count(calls: int) -> dict[str, Any]:
    """Instructions of one call, for each case and function, with the ratio of the best eager baseline to the operator
    (above 1: the operator needs fewer), and the vector instructions that torch used.

    Raises:
        CountError: valgrind is missing, this torch has no counters, there is no native module, or the process failed.
    """
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise CountError("callgrind: valgrind is not installed")
    if not getattr(torch._C, "_valgrind_supported_platform", lambda: False)():
        raise CountError("callgrind: this torch has no valgrind counters (only its Linux builds have)")
    if _load.extension is None:
        raise CountError(f"callgrind: there is no native module to count: {_load.reason}")
    isa = [isa for isa in _load.extension.isa_supported().split(",") if isa in ISAS][-1]
    settings = {"AEP_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": _TUNABLES}
    with tempfile.TemporaryDirectory(prefix="aep-callgrind-") as folder:
        base = Path(folder, "out")
        flags = ["--tool=callgrind", f"--callgrind-out-file={base}", "--collect-atstart=no"]
        script = [sys.executable, "-m", "benchmarks.callgrind", "--here", "--calls", str(calls)]
        capability, *names = _run([valgrind, *flags, *script], **settings).splitlines()
        dumps = sorted(base.parent.glob("out.*"), key=lambda file: int(file.suffix[1:]))
        found = [re.search(r"^totals: (\d+)", dump.read_text(encoding="utf-8"), re.MULTILINE) for dump in dumps]
    totals = [int(total[1]) for total in found if total]
    if len(names) != len(totals):
        raise CountError(f"callgrind: {len(names)} functions but {len(totals)} counts")
    counts: dict[str, dict[str, float]] = {}
    for line, total in zip(names, totals, strict=True):
        case, name = line.split()
        counts.setdefault(case, {})[name] = round(total / calls, 1)
    empty = counts.pop("empty")["fused"]
    cases: dict[str, Any] = {}
    for case, members in counts.items():
        ratio = {name: round(value / members["fused"], 3) for name, value in members.items() if name != "fused"}
        cases[case] = {"count": members, "ratio": ratio, "ratio_best_eager": min(ratio.values())}
    machine = {"machine": platform.machine(), "libc": " ".join(platform.libc_ver()), "torch": torch.__version__}
    machine |= {"valgrind": _run([valgrind, "--version"]).strip(), "aep_ext": __version__}
    calls_found = {"isa": isa, "torch_capability": capability, "empty": empty, "cases": cases}
    return {"format": 1, "calls_counted": calls, "machine": machine, "calls": calls_found}


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="callgrind", description="Instructions per call, counted by valgrind.")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--calls", type=int, default=100, help="calls to count for each function (default 100)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        count_here(arguments.calls)
        return 0
    try:
        result = count(arguments.calls)
    except CountError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'instructions of one call':44}{'fused':>12}{'best eager':>12}{'ratio':>8}")
    for case, values in result["calls"]["cases"].items():
        own = values["count"]["fused"]
        print(f"{case:44}{own:12,.0f}{values['ratio_best_eager'] * own:12,.0f}{values['ratio_best_eager']:8.2f}")
    if arguments.output:
        write_json(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
