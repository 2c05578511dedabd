"""What the GPU check consists of: stages, their parts, and the verdict on each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_NATIVE = ("csrc", "cmake", "build_support", "CMakeLists.txt")
# The sources that a stage judges: a part that is finished is run again only where one of them changed.
SOURCES = {
    "build": _NATIVE,
    "tests": (*_NATIVE, "aep_ext", "tests"),
    "sanitize": (*_NATIVE, "aep_ext", "benchmarks/gpu/driver.py"),
    "ceilings": ("benchmarks/gpu/ceilings.py", "benchmarks/gpu/clock.py"),
    "ops": (*_NATIVE, "aep_ext", "benchmarks/gpu", "benchmarks/rivals.py"),
    "graphed": (*_NATIVE, "aep_ext", "benchmarks/gpu"),
    "e2e": (*_NATIVE, "aep_ext", "benchmarks/gpu"),  # last: it ends with minutes of autotuning
}
STAGES = tuple(SOURCES)
BENCHES = {
    "ops": "benchmarks/gpu/test_operators.py",
    "e2e": "benchmarks/gpu/test_end_to_end.py",
    "graphed": "benchmarks/gpu/test_graphed.py",
}
SANITIZERS = ("memcheck", "racecheck")
GRACE = 5.0  # seconds for what a process leaves in its pipe
_SUMMARY = re.compile(r"([0-9]+ (passed|failed|skipped|deselected|error)|no tests ran).* in [0-9.]+s")


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    code: int | None
    """Its exit status; None: it was stopped at the limit."""
    output: str

    @property
    def last_line(self) -> str:
        """The last one that says something."""
        lines = [line.strip().strip("=").strip() for line in self.output.splitlines()]
        return next((line for line in reversed(lines) if line), "")[:300]

    @property
    def pytest_line(self) -> str:
        """pytest's closing line; other lines may follow it."""
        lines = [line.strip().strip("=").strip() for line in self.output.splitlines() if _SUMMARY.search(line)]
        return lines[-1][:300] if lines else self.last_line


Run = Callable[[Sequence[str], dict[str, str] | None, float], Outcome]
"""``run(command, environment to add, limit in seconds)``."""


@dataclass(frozen=True)
class Part:
    """One piece of a stage. ``judge`` gives status and note."""

    name: str
    command: tuple[str, ...]
    judge: Callable[[Outcome], tuple[str, str]]
    environment: dict[str, str] | None = None
    details: Path | None = None
    """A JSON file that the command writes; it goes into the result."""


def run_for_real(command: Sequence[str], environment: dict[str, str] | None, limit: float) -> Outcome:
    """Runs, shows the output as it comes, and stops all that was started when the time is up."""
    process = subprocess.Popen(
        command,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    import signal
    import threading

    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    lines = []

    def read() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)

    timer = threading.Timer(limit, stop)
    reader = threading.Thread(target=read, daemon=True)
    timer.daemon = True
    timer.start()
    reader.start()
    try:
        code = process.wait()
        reader.join(GRACE)
        if reader.is_alive():  # something it started (compilers of inductor's, say) outlives it and keeps the pipe
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(GRACE)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        timer.cancel()
    return Outcome(None if stopped.is_set() else code, "".join(lines))


def judge_pytest(outcome: Outcome) -> tuple[str, str]:
    """A run in which nothing was selected (status 5), or everything was skipped, is no success and no failure."""
    line = outcome.pytest_line
    if outcome.code == 0:
        return ("passed" if " passed" in f" {line}" else "left out"), line
    return ("left out" if outcome.code == 5 else "failed"), line


def judge_collection(outcome: Outcome) -> tuple[str, str]:
    """Names the files that could not be imported."""
    broken = re.findall(r"^ERROR (\S+\.py)", outcome.output, re.MULTILINE)
    return (
        judge_exit(outcome)
        if outcome.code in (0, 5) or not broken
        else ("failed", "not imported: " + ", ".join(broken))
    )


def judge_exit(outcome: Outcome) -> tuple[str, str]:
    """By the exit status; what passed needs no note."""
    return ("passed", "") if outcome.code == 0 else ("failed", outcome.last_line)


def judge_sanitizer(outcome: Outcome) -> tuple[str, str]:
    """Clean is a driver that came to its end under a sanitizer that found nothing."""
    came_through = re.search(r"^driver: .*$", outcome.output, re.MULTILINE)
    note = "; ".join(filter(None, (came_through.group() if came_through else "", outcome.last_line)))
    return ("passed" if outcome.code == 0 and came_through else "failed"), note


def build_part(work: Path) -> Part:
    """A build without the CUDA kernels is a failure here, and not one with a notice."""
    script = (
        "from pathlib import Path; from build_support.native import build_into; build_into(Path('aep_ext')); "
        "import json, aep_ext; info = aep_ext.build_info(); print(info); "
        f"Path({str(work / 'build.json')!r}).write_text(json.dumps(info.to_dict()))"
    )
    wishes = {"FORCE_CUDA": "1"}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        import torch

        wishes["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability(0))  # this machine's alone
    return Part("build", (sys.executable, "-c", script), judge_exit, wishes, work / "build.json")


def test_parts(run: Run, limit: float) -> Iterator[Part]:
    """The files that hold GPU tests, each in a process of its own: a kernel that crashes takes only its file along."""
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu")
    found = run((*pytest, "tests", "--collect-only", "-q", "--no-header"), None, limit)
    named = re.findall(r"^(\S+\.py)::", found.output, re.MULTILINE)
    if found.code not in (0, 5):  # files that cannot be imported may hold GPU tests too
        yield Part("collection", (*pytest, "tests", "--collect-only", "-q"), judge_collection)
    for file in dict.fromkeys(named):
        yield Part(file, (*pytest, file, "-q"), judge_pytest)


def find_sanitizer() -> str | None:
    """compute-sanitizer, from the PATH or the toolkit."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    return shutil.which("compute-sanitizer", path=path)


def sanitizer_parts(sanitizer: str) -> Iterator[Part]:
    """The operators and, since sanitizers may not know conditional nodes, apart from them the gated graph."""
    for tool in SANITIZERS:
        # Races are ours to find, not torch's. Nor are calls that libraries make to ask what the driver knows, and which
        # fail by design: what fails of ours is raised, and the driver then does not come to its end.
        only = ("--report-api-errors", "no") if tool == "memcheck" else ("--kernel-name", "kernel_substring=aep")
        for what in ("operators", "graphed"):
            command = (sanitizer, "--tool", tool, *only, "--error-exitcode", "99", sys.executable)
            script = ("-m", "benchmarks.gpu.driver", what)
            # Without the cache every tensor has bounds of its own. Captures cannot do without it.
            bare = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "operators" else None
            yield Part(f"{tool} {what}", (*command, *script), judge_sanitizer, bare)


def ceilings_part(work: Path) -> Part:
    """Copy bandwidth and launch latencies."""
    file = work / "ceilings.json"
    return Part("ceilings", (sys.executable, "-m", "benchmarks.gpu.ceilings", str(file)), judge_exit, None, file)


def read_details(part: Part) -> dict | None:
    """What the part's command wrote down."""
    if part.details is None or not part.details.is_file():
        return None
    return json.loads(part.details.read_text(encoding="utf-8"))
