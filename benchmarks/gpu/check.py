"""The GPU check: runs its stages, part by part, within a time limit, and keeps every result. See gpu_check.sh."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import stages, store
from benchmarks.gpu.stages import BENCHES, STAGES, Part, Run

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, BAD_ARGUMENT, NO_GPU, TIME_IS_UP = 0, 1, 2, 3, 4


def machine_facts() -> dict[str, Any]:
    """What the figures belong to. The machine's name is nobody's business."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    facts = {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if hasattr(torch, "backends") else None,
        "python": sys.version.split()[0],
        "nvcc": _version(["nvcc", "--version"], r"release ([0-9.]+)"),
        "driver": _version(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], r"([0-9.]+)"),
    }
    for package in ("triton", "liger-kernel", "torchvision"):
        facts[package] = _package(package)
    return facts


def _version(command: list[str], pattern: str) -> str | None:
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    except OSError:
        return None
    found = re.search(pattern, text)
    return found.group(1) if found else None


def _package(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Check:
    """One call of the check."""

    def __init__(
        self, result: Path, seconds: float, *, again: bool = False, retry: bool = False, run: Run = stages.run_for_real
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
            source = store.source_hash(ROOT, stages.SOURCES[name], torch_version)
            done = {} if self.again or name == "build" else store.finished(self.result, name, source, retry=self.retry)
            if name in BENCHES:
                self._benches(name, source, done)
            elif name == "sanitize" and stages.find_sanitizer() is None:
                self._record(name, "compute-sanitizer", source, "left out", 0.0, "compute-sanitizer was not found")
            else:
                for part in self._parts(name, work):
                    if part.name in done:
                        self.failed |= done[part.name] == "failed"
                        print(f"gpu_check: {name}: {part.name}: {done[part.name]} before on this source", flush=True)
                    else:
                        self._part(name, part, source)
            if name == "build" and self.failed:
                break  # the other stages would judge something else
        return FAILED if self.failed else TIME_IS_UP if self.out_of_time else PASSED

    def _parts(self, name: str, work: Path):  # noqa: ANN202  (an iterable of parts)
        if name == "build":
            return [stages.build_part(work)]
        if name == "tests":
            return stages.test_parts(self._run, max(1.0, self.left))
        if name == "sanitize":
            return stages.sanitizer_parts(stages.find_sanitizer())
        return [stages.ceilings_part(work)]

    def _part(self, stage: str, part: Part, source: str) -> None:
        if self.left <= 0:
            self._out_of_time(stage, part.name)
            return
        start = time.monotonic()
        outcome = self._run(part.command, part.environment, self.left)
        seconds = time.monotonic() - start
        if outcome.code is None:
            self._record(stage, part.name, source, "unfinished", seconds, "stopped at the time limit")
            self.out_of_time = True
            return
        status, note = part.judge(outcome)
        details = stages.read_details(part)
        self._record(
            stage, part.name, source, status, seconds, note, **({} if details is None else {"details": details})
        )

    def _benches(self, stage: str, source: str, done: dict[str, str]) -> None:
        """One process until a case fails, then another for the rest: what broke the device must not break the others.

        Cases write themselves down (benchmarks/gpu/conftest.py).
        """
        if self.again:
            data = store.read(self.result)
            data["stages"].pop(stage, None)
            store.write(self.result, data)
        elif self.retry:
            data = store.read(self.result)
            kept = data["stages"].get(stage, {})
            data["stages"][stage] = {name: e for name, e in kept.items() if e["status"] != "failed"}
            store.write(self.result, data)
        while True:
            if self.left <= 0:
                self._out_of_time(stage, "the rest")
                break
            known = len(store.finished(self.result, stage, source))
            outcome = self._run(
                (sys.executable, "-m", "pytest", BENCHES[stage], "-m", "gpu", "-x", "-q", "-p", "no:cacheprovider"),
                {
                    "AEP_GPU_RESULT": str(self.result),
                    "AEP_GPU_STAGE": stage,
                    "AEP_GPU_SOURCE": source,
                    "AEP_GPU_END": str(time.time() + self.left),
                },
                max(1.0, self.left),
            )
            if outcome.code is None:
                self._out_of_time(stage, "the rest")
                break
            crashed = outcome.code not in (0, 1, 5)
            if crashed:
                why = f"its process ended with status {outcome.code}: {outcome.last_line}"[:300]
                store.fail_the_begun(self.result, stage, source, why)
            if outcome.code in (0, 5):
                break
            if len(store.finished(self.result, stage, source)) == known:
                # A failure that no case wrote down (in collection, say): it would come again.
                self._record(stage, "(process)", source, "failed", 0.0, outcome.last_line)
                break
        ended = store.finished(self.result, stage, source)
        self.failed |= "failed" in ended.values()
        pending = [
            n for n, e in store.read(self.result)["stages"].get(stage, {}).items() if e["status"] == "unfinished"
        ]
        self.out_of_time |= bool(pending)
        counts = {status: list(ended.values()).count(status) for status in dict.fromkeys(ended.values())}
        print(f"gpu_check: {stage}: {counts or 'nothing ran'}" + (f", {len(pending)} unfinished" if pending else ""))

    def _record(self, stage: str, part: str, source: str, status: str, seconds: float, note: str, **more: Any) -> None:
        store.record(self.result, stage, part, source, status, seconds, note, **more)
        self.failed |= status == "failed"
        print(f"gpu_check: {stage}: {part}: {status}" + (f" ({note})" if note else ""), flush=True)

    def _out_of_time(self, stage: str, what: str) -> None:
        self.out_of_time = True
        print(f"gpu_check: {stage}: {what}: no time left; call again to go on", flush=True)


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
        data = store.read(result)
        data["machine"] = machine_facts()
        store.write(result, data)
        check = Check(result, arguments.seconds, again=arguments.again, retry=arguments.retry)
        return check.stages(arguments.stages, work, torch.__version__)


if __name__ == "__main__":
    sys.exit(main())
