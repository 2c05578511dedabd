"""The GPU check: runs its stages, part by part, within a time limit, and keeps every result. See gpu_check.sh."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import result_file

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, BAD_ARGUMENT, NO_GPU, TIME_IS_UP = 0, 1, 2, 3, 4
_NATIVE = ("csrc", "cmake", "build_support", "CMakeLists.txt")
# The sources that a stage checks: a part that is finished is run again only where one of them changed.
SOURCES = {
    "build": _NATIVE,
    "tests": (*_NATIVE, "aep_ext", "tests"),
    "sanitize": (*_NATIVE, "aep_ext", "benchmarks/gpu/driver.py"),
    "ceilings": ("benchmarks/gpu/measure.py",),
    "ops": (*_NATIVE, "aep_ext", "benchmarks"),
    "graphed": (*_NATIVE, "aep_ext", "benchmarks/gpu"),
    "e2e": (*_NATIVE, "aep_ext", "benchmarks/gpu"),  # last: it ends with minutes of autotuning
}
STAGES = tuple(SOURCES)
BENCHMARKS = ("ops", "graphed", "e2e")
SANITIZERS = ("memcheck", "racecheck")
GRACE = 5.0  # seconds for what a process leaves in its pipe
_SUMMARY = re.compile(r"([0-9]+ (passed|failed|skipped|deselected|error)|no tests ran).* in [0-9.]+s")


@dataclass(frozen=True)
class Outcome:
    """What became of a command: its exit status (None: it was stopped at the limit) and what it printed."""

    code: int | None
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
    """One piece of a stage. ``status`` gives status and note; ``details`` is a JSON file that the command writes."""

    name: str
    command: tuple[str, ...]
    status: Callable[[Outcome], tuple[str, str]]
    environment: dict[str, str] | None = None
    details: Path | None = None


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
    stopped, lines = threading.Event(), []

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        stopped.set()
        kill()

    def read() -> None:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)

    timer, reader = threading.Timer(limit, stop), threading.Thread(target=read, daemon=True)
    timer.daemon = True
    timer.start()
    reader.start()
    try:
        code = process.wait()
        reader.join(GRACE)
        if reader.is_alive():  # something it started (compilers of inductor's, say) outlives it and keeps the pipe
            kill()
            reader.join(GRACE)
    except KeyboardInterrupt:
        kill()
        raise
    finally:
        timer.cancel()
    return Outcome(None if stopped.is_set() else code, "".join(lines))


def exit_status(outcome: Outcome) -> tuple[str, str]:
    """By the exit status; what passed needs no note."""
    return ("passed", "") if outcome.code == 0 else ("failed", outcome.last_line)


def pytest_status(outcome: Outcome) -> tuple[str, str]:
    """A run in which nothing was selected (status 5), or everything was skipped, is no success and no failure."""
    line = outcome.pytest_line
    if outcome.code == 0:
        return ("passed" if " passed" in f" {line}" else "left out"), line
    return ("left out" if outcome.code == 5 else "failed"), line


def collection_status(outcome: Outcome) -> tuple[str, str]:
    """Names the files that could not be imported."""
    broken = re.findall(r"^ERROR (\S+\.py)", outcome.output, re.MULTILINE)
    if outcome.code in (0, 5) or not broken:
        return exit_status(outcome)
    return "failed", "not imported: " + ", ".join(broken)


def sanitizer_status(outcome: Outcome) -> tuple[str, str]:
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
    return Part("build", (sys.executable, "-c", script), exit_status, wishes, work / "build.json")


def test_parts(run: Run, limit: float) -> Iterator[Part]:
    """The files that hold GPU tests, each in a process of its own: a kernel that crashes takes only its file along."""
    pytest = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu")
    found = run((*pytest, "tests", "--collect-only", "-q", "--no-header"), None, limit)
    named = re.findall(r"^(\S+\.py)::", found.output, re.MULTILINE)
    if found.code not in (0, 5):  # files that cannot be imported may hold GPU tests too
        yield Part("collection", (*pytest, "tests", "--collect-only", "-q"), collection_status)
    for file in dict.fromkeys(named):
        yield Part(file, (*pytest, file, "-q"), pytest_status)


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
            yield Part(f"{tool} {what}", (*command, *script), sanitizer_status, bare)


def ceilings_part(work: Path) -> Part:
    """Copy bandwidth and launch latencies."""
    file = work / "ceilings.json"
    return Part("ceilings", (sys.executable, "-m", "benchmarks.gpu.measure", str(file)), exit_status, None, file)


class Check:
    """One call of the check."""

    def __init__(
        self, result: Path, seconds: float, *, again: bool = False, retry: bool = False, run: Run = run_for_real
    ) -> None:
        self.result, self.again, self.retry, self._run = result, again, retry, run
        self.end = time.monotonic() + seconds
        self.out_of_time, self.failed = False, False

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.end - time.monotonic()

    def stages(self, names: Sequence[str], work: Path, torch_version: str) -> int:
        """Runs them in order; returns the exit status."""
        for name in names:
            source = result_file.source_hash(ROOT, SOURCES[name], torch_version)
            if name in BENCHMARKS:
                self._benchmarks(name, source)
            elif name == "sanitize" and find_sanitizer() is None:
                self._record(name, "compute-sanitizer", source, "left out", 0.0, "compute-sanitizer was not found")
            else:
                repeat = self.again or name == "build"
                done = {} if repeat else result_file.finished(self.result, name, source, retry=self.retry)
                for part in self._parts(name, work):
                    if part.name in done:
                        self.failed |= done[part.name] == "failed"
                        print(f"gpu_check: {name}: {part.name}: {done[part.name]} before on this source", flush=True)
                    else:
                        self._part(name, part, source)
            if name == "build" and self.failed:
                break  # the other stages would check something else
        return FAILED if self.failed else TIME_IS_UP if self.out_of_time else PASSED

    def _parts(self, name: str, work: Path) -> Iterator[Part] | list[Part]:
        if name == "tests":
            return test_parts(self._run, max(1.0, self.left))
        if name == "sanitize":
            return sanitizer_parts(find_sanitizer())
        return [build_part(work) if name == "build" else ceilings_part(work)]

    def _part(self, stage: str, part: Part, source: str) -> None:
        if self.left <= 0:
            self._no_time_left(stage, part.name)
            return
        start = time.monotonic()
        outcome = self._run(part.command, part.environment, self.left)
        seconds = time.monotonic() - start
        if outcome.code is None:
            self._record(stage, part.name, source, "unfinished", seconds, "stopped at the time limit")
            self.out_of_time = True
            return
        status, note = part.status(outcome)
        more = {}
        if part.details is not None and part.details.is_file():
            more["details"] = json.loads(part.details.read_text(encoding="utf-8"))
        self._record(stage, part.name, source, status, seconds, note, **more)

    def _benchmarks(self, stage: str, source: str) -> None:
        """One process until a case fails, then another for the rest: what broke the device must not break the others.

        Cases write themselves down (benchmarks/gpu/bench.py).
        """
        if self.again or self.retry:
            result_file.forget(self.result, stage, only_failed=not self.again)
        command = (sys.executable, "-m", "benchmarks.gpu.bench", stage)
        environment = {"AEP_GPU_RESULT": str(self.result), "AEP_GPU_SOURCE": source}
        while True:
            known = len(result_file.finished(self.result, stage, source))
            end = {"AEP_GPU_END": str(time.time() + self.left)}
            outcome = self._run(command, environment | end, self.left) if self.left > 0 else Outcome(None, "")
            if outcome.code in (None, TIME_IS_UP):
                self._no_time_left(stage, "the rest")
                break
            if outcome.code == 0:
                break
            if outcome.code != 1:  # it crashed
                why = f"its process ended with status {outcome.code}: {outcome.last_line}"[:300]
                result_file.fail_begun(self.result, stage, source, why)
            if len(result_file.finished(self.result, stage, source)) == known:
                # A failure that no case wrote down (in an import, say): it would come again.
                self._record(stage, "(process)", source, "failed", 0.0, outcome.last_line)
                break
        statuses = [entry["status"] for entry in result_file.read(self.result)["stages"].get(stage, {}).values()]
        self.failed |= "failed" in result_file.finished(self.result, stage, source).values()
        self.out_of_time |= "unfinished" in statuses
        counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
        print(f"gpu_check: {stage}: {counts or 'nothing ran'}", flush=True)

    def _record(self, stage: str, part: str, source: str, status: str, seconds: float, note: str, **more: Any) -> None:
        result_file.record(self.result, stage, part, source, status, seconds, note, **more)
        self.failed |= status == "failed"
        print(f"gpu_check: {stage}: {part}: {status}" + (f" ({note})" if note else ""), flush=True)

    def _no_time_left(self, stage: str, what: str) -> None:
        self.out_of_time = True
        print(f"gpu_check: {stage}: {what}: no time left; call again to go on", flush=True)


def machine_facts() -> dict[str, Any]:
    """What the results belong to. The machine's name is nobody's business."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    facts = {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "nvcc": _version(["nvcc", "--version"], r"release ([0-9.]+)"),
        "driver": _version(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"([0-9.]+)"),
    }
    for package in ("triton", "liger-kernel", "torchvision"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _version(command: list[str], pattern: str) -> str | None:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        return None
    found = re.search(pattern, text)
    return found.group(1) if found else None


def carry_wheels(folder: Path, site: Path) -> None:
    """Installs all wheels of a folder beside this Python's own packages, for this call alone."""
    wheels = sorted(str(file) for file in folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--find-links", str(folder), "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", str(site), *wheels], check=True)
    # Behind this tree and before the rest, for this process and those it starts.
    sys.path.insert(1, str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]).rstrip(":")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--name", help="of the result file, gpu-NAME.json; by default the GPU's")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ",".join(STAGES))
    parser.add_argument(
        "--seconds", type=float, default=24 * 3600.0, help="stop after about so long; call again to go on"
    )
    parser.add_argument("--again", action="store_true", help="repeat what is finished")
    parser.add_argument("--retry", action="store_true", help="repeat what failed")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to use, for peers that are missing here")
    arguments = parser.parse_args(argv)
    wanted = [name for name in arguments.stages.split(",") if name]
    unknown = [name for name in wanted if name not in STAGES]
    arguments.stages = [name for name in STAGES if name in wanted]
    if unknown:
        parser.error(f"no such stage: {unknown[0]}; there are {', '.join(STAGES)}")
    if arguments.wheels and not any(arguments.wheels.glob("*.whl")):
        parser.error(f"--wheels: no *.whl in {arguments.wheels}")
    if arguments.seconds <= 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds:g}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    except ImportError:
        gpu = ""
    if not gpu:
        print("gpu_check: this Python's torch sees no GPU here; nothing was run", file=sys.stderr)
        return NO_GPU
    name = arguments.name or re.sub(r"[^a-z0-9-]", "", gpu.lower().replace(" ", "-"))
    result = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if arguments.wheels:
            carry_wheels(arguments.wheels, work / "site")
        data = result_file.read(result)
        data["machine"] = machine_facts()
        result_file.write(result, data)
        check = Check(result, arguments.seconds, again=arguments.again, retry=arguments.retry)
        return check.stages(arguments.stages, work, torch.__version__)


if __name__ == "__main__":
    sys.exit(main())
