"""Instructions per call at small sizes, counted by valgrind's callgrind: a second opinion that no neighbour disturbs.

    python -m benchmarks.callgrind                    counts and prints
    python -m benchmarks.callgrind --output FILE      writes FILE (JSON) too
    python -m benchmarks.callgrind --only kernels     without torch; `--only calls`: the Python calls alone

Two counts. *kernels*: the C++ kernels, called by benchmarks/callgrind_kernels.cpp without torch, on every instruction
set that is built and that valgrind can emulate: it knows no AVX-512, so AVX2 is the best it shows of an x86 processor.
*calls*: whole Python calls of the operators against what eager torch needs for the same result, in one process, with
the counters that torch has for `torch.utils.benchmark.Timer.collect_callgrind` (which starts a process for every
function). Results are compared before anything is counted.

An instruction count is no time: caches, memory and the width of the processor do not enter. Two runs agree within 1 %.
It needs valgrind on the PATH, a C++ compiler for the kernels and a torch with counters (Linux) for the calls.
"""

from __future__ import annotations

import argparse
import gc
import json
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

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `benchmarks` and `build_support` are found from the root
    sys.path[0] = str(ROOT)

ISAS = ("scalar", "avx2", "neon")
NO_AVX512 = "valgrind emulates no AVX-512: kernels and torch run with AVX2 at most"
# Valgrind counts every byte of a `rep movsb`, with which the C library copies much, as an instruction of its own:
# copies by vectors are counted instead.
_TUNABLES = ":".join(f"glibc.cpu.x86_rep_{name}_threshold=1073741824" for name in ("movsb", "stosb"))
_INSIDE = "--inside"


class CountError(Exception):
    """Nothing can be counted here; the message is one line."""


def tool(name: str) -> str:
    """The path of a program.

    Raises:
        CountError: it is not installed.
    """
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        raise CountError(f"callgrind: {name} is not installed")
    return path


def _run(command: list[str], **environment: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise CountError(f"callgrind: {Path(command[0]).name} failed with status {run.returncode}: {last}")
    return run.stdout


def build_driver(folder: Path) -> Path:
    """Compiles benchmarks/callgrind_kernels.cpp and the kernels, optimised, in ``folder``.

    Raises:
        CountError: a tool is missing, or it does not compile.
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DAEP_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    _run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *options])
    _run([cmake, "--build", str(folder), "--parallel", "2", "--target", "callgrind_kernels"])
    return folder / "callgrind_kernels"


def _under_valgrind(options: list[str], command: list[str], **environment: str) -> tuple[str, list[int]]:
    """What ``command`` printed, and the instructions in each of the dumps that it asked for, in order.

    Raises:
        CountError: it failed.
    """
    settings = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": _TUNABLES} | environment
    with tempfile.TemporaryDirectory(prefix="aep-callgrind-") as folder:
        base = Path(folder, "out")
        flags = ["--tool=callgrind", f"--callgrind-out-file={base}", *options]
        printed = _run([tool("valgrind"), *flags, *command], **settings)
        dumps = sorted(base.parent.glob("out.*"), key=lambda file: int(file.suffix[1:]))
        totals = [re.search(r"^totals: (\d+)", dump.read_text(encoding="utf-8"), re.MULTILINE) for dump in dumps]
    return printed, [int(total[1]) for total in totals if total]


def count_kernels(driver: Path, isa: str, calls: int = 100) -> dict[str, float]:
    """Instructions of one call of every case of the driver on one instruction set; ``empty`` is the loop around them.

    Raises:
        CountError: the set is not built, or not to be had under valgrind.
    """
    marks = ["--zero-before=aep_count_begin", "--dump-before=aep_count_end"]
    printed, totals = _under_valgrind(marks, [str(driver), str(calls)], AEP_ISA=isa)
    names = printed.splitlines()[1:]
    if len(names) != len(totals):
        raise CountError(f"callgrind: {len(names)} cases but {len(totals)} counts")
    return {name: round(total / calls, 1) for name, total in zip(names, totals, strict=True)}


def comparisons() -> dict[str, Any]:
    """The cases whose Python calls are counted."""
    from benchmarks.cases import Case
    from benchmarks.test_ensemble import ensemble_stats
    from benchmarks.test_gate import gate
    from benchmarks.test_head import multi_exit_linear_head
    from benchmarks.test_loss import joint_cross_entropy

    return {
        "ensemble_stats-4-1-10": ensemble_stats(Case((4, 1, 10)), "cpu"),
        "gate-1-512-8-8": gate(Case((1,)), "cpu"),
        "multi_exit_linear_head-1-64px": multi_exit_linear_head(Case((1, 64)), "cpu"),
        "joint_cross_entropy-4-64-10-with-backward": joint_cross_entropy(Case((4, 64, 10)), "cpu"),
    }


def _inside(calls: int) -> None:
    """What runs under valgrind: compares, then counts function by function. Prints what was counted, in order."""
    import torch

    from benchmarks.paired_timing import assert_same

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


def count_calls(calls: int = 100) -> dict[str, Any]:
    """Instructions of one Python call, for each case and function, with the ratio of the best eager baseline to the
    operator (above 1: the operator needs fewer), and the vector instructions that torch used.

    Raises:
        CountError: this torch has no counters, there is no native module, or the process failed.
    """
    import torch

    from aep_ext import _load

    if not getattr(torch._C, "_valgrind_supported_platform", lambda: False)():
        raise CountError("callgrind: this torch has no valgrind counters (only its Linux builds have)")
    if _load.extension is None:
        raise CountError(f"callgrind: there is no native module to count: {_load.reason}")
    best = [isa for isa in _load.extension.isa_supported().split(",") if isa in ISAS][-1]
    command = [sys.executable, "-m", "benchmarks.callgrind", _INSIDE, str(calls)]
    printed, totals = _under_valgrind(["--collect-atstart=no"], command, AEP_ISA=best)
    capability, *names = printed.splitlines()
    if len(names) != len(totals):
        raise CountError(f"callgrind: {len(names)} functions but {len(totals)} counts")
    counts: dict[str, dict[str, float]] = {}
    for line, total in zip(names, totals, strict=True):
        case, name = line.split()
        counts.setdefault(case, {})[name] = round(total / calls, 1)
    empty = counts.pop("empty")["fused"]
    cases: dict[str, Any] = {}
    for case, members in counts.items():
        ratio = {name: round(count / members["fused"], 3) for name, count in members.items() if name != "fused"}
        cases[case] = {"count": members, "ratio": ratio, "ratio_best_eager": min(ratio.values())}
    return {"isa": best, "torch_capability": capability, "empty": empty, "cases": cases}


def machine() -> dict[str, str]:
    """What the counts depend on, beside the code."""
    from importlib import metadata

    found = {"machine": platform.machine(), "libc": " ".join(platform.libc_ver()), "python": platform.python_version()}
    found["valgrind"] = _run([tool("valgrind"), "--version"]).strip()
    for name in ("torch", "aep_ext"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def show(result: dict[str, Any]) -> str:
    """The counts as text."""
    lines = []
    kernels = result.get("kernels", {})
    if kernels:
        lines.append(f"{'instructions of one kernel call':44}" + "".join(f"{isa:>12}" for isa in kernels))
        for case in next(iter(kernels.values())):
            lines.append(f"{case:44}" + "".join(f"{counts[case]:12,.0f}" for counts in kernels.values()))
    if "calls" in result:
        lines.append(f"{'instructions of one Python call':44}{'fused':>12}{'best eager':>12}{'ratio':>8}")
        for case, values in result["calls"]["cases"].items():
            own = values["count"]["fused"]
            best = min(count for name, count in values["count"].items() if name != "fused")
            lines.append(f"{case:44}{own:12,.0f}{best:12,.0f}{best / own:8.2f}")
    return "\n".join([*lines, *result["notes"]])


def count(calls: int, only: str | None, folder: Path) -> dict[str, Any]:
    """The whole result.

    Raises:
        CountError: nothing can be counted here.
    """
    result: dict[str, Any] = {"format": 1, "calls_counted": calls, "machine": machine(), "notes": [NO_AVX512]}
    if only != "calls":
        driver = build_driver(folder)
        facts = json.loads((folder / "aep_facts.json").read_text(encoding="utf-8"))
        result["machine"]["compiler"] = facts["compiler"]
        result["kernels"] = {"scalar": count_kernels(driver, "scalar", calls)}
        for isa in (isa for isa in ISAS[1:] if isa in facts["isa_built"]):
            try:
                result["kernels"][isa] = count_kernels(driver, isa, calls)
            except CountError as error:
                result["notes"].append(str(error))
    if only != "kernels":
        result["calls"] = count_calls(calls)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="callgrind", description="Instructions per call, counted by valgrind.")
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--only", choices=("kernels", "calls"), help="one of the two counts")
    parser.add_argument("--calls", type=int, default=100, help="calls to count for each function (default 100)")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "callgrind", help="where the kernels are built")
    parser.add_argument(_INSIDE, type=int, metavar="CALLS", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.inside:
        _inside(arguments.inside)
        return 0
    try:
        result = count(arguments.calls, arguments.only, arguments.build.resolve())
    except CountError as error:
        print(error, file=sys.stderr)
        return 1
    print(show(result))
    if arguments.output:
        from aep_ext._io import write_json

        write_json(arguments.output, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
