"""benchmarks/gpu_check.sh with a made-up GPU and compute-sanitizer: statuses, notes, resuming, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import result_file
from benchmarks.gpu.check import FAILED, PASSED, TIME_IS_UP, Check, Outcome, main, parse

ROOT = Path(__file__).resolve().parents[2]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

_TORCH = """
import types
__version__ = "9.9"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: {there})
    get_device_name = staticmethod(lambda i: "Fake GPU")
    get_device_capability = staticmethod(lambda i: (9, 0))
    get_device_properties = staticmethod(lambda i: types.SimpleNamespace(
        name="Fake GPU", major=9, minor=0, multi_processor_count=1, L2_cache_size=1, total_memory=1))
"""


@pytest.fixture
def check(tmp_path, make_script):
    """Runs the script in a tree of its own; returns the exit code, what was recorded, and what was printed."""
    script = tmp_path / "tree" / "benchmarks" / "gpu_check.sh"
    shutil.copytree(ROOT / "benchmarks" / "gpu", script.parent / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "benchmarks" / "__init__.py", script.parent)
    shutil.copy(ROOT / "benchmarks" / "gpu_check.sh", script)
    fake = tmp_path / "fake"
    fake.mkdir()
    make_script("python3", f'exec "{sys.executable}" "$@"')

    def run(*arguments: str, sanitizer: str = "exit 1", there: bool = True) -> tuple[int, dict, str]:
        (fake / "torch.py").write_text(_TORCH.format(there=there), encoding="utf-8")
        folder = make_script("compute-sanitizer", sanitizer).parent
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(fake)}
        command = ["bash", str(script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
        result = script.parent / "results" / "gpu-fake-gpu.json"
        data = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        return done.returncode, data, done.stdout + done.stderr

    return run


CLEAN = "echo 'driver: 9 results agree'; echo '========= ERROR SUMMARY: 0 errors'"


@needs_bash
def test_without_a_gpu_nothing_is_run(check):
    status, data, printed = check(there=False)
    assert (status, data) == (3, {}) and "sees no GPU here; nothing was run" in printed


@needs_bash
def test_bad_arguments(check):
    assert check("--stages", "sing")[0] == 2
    status, _, printed = check("--seconds", "0")
    assert status == 2 and "--seconds must be positive, got 0" in printed


@needs_bash
def test_a_clean_run_is_written_down_and_not_repeated(check):
    status, data, _ = check("--stages", "sanitize", sanitizer=CLEAN)
    parts = data["stages"]["sanitize"]
    assert status == 0 and data["machine"]["gpu"] == "Fake GPU"
    assert list(parts) == ["memcheck operators", "memcheck graphed", "racecheck operators", "racecheck graphed"]
    assert all(part["status"] == "passed" for part in parts.values())
    assert "driver: 9 results agree; ERROR SUMMARY: 0 errors" in parts["memcheck operators"]["note"].replace("=", "")
    status, _, printed = check("--stages", "sanitize", sanitizer="exit 1")
    assert status == 0 and "passed before on this source" in printed
    assert check("--stages", "sanitize", "--again", sanitizer="exit 1")[0] == 1


@needs_bash
def test_a_race_is_a_failure_that_keeps_the_others(check):
    racing = f'case "$*" in *racecheck*operators*) echo "===== RACECHECK SUMMARY: 1 hazard"; exit 99;; esac; {CLEAN}'
    status, data, _ = check("--stages", "sanitize", sanitizer=racing)
    parts = data["stages"]["sanitize"]
    assert status == 1 and [p["status"] for p in parts.values()] == ["passed", "passed", "failed", "passed"]
    assert "1 hazard" in parts["racecheck operators"]["note"]
    assert check("--stages", "sanitize", sanitizer=CLEAN)[0] == 1  # known, and not repeated
    assert check("--stages", "sanitize", "--retry", sanitizer=CLEAN)[0] == 0


@needs_bash
def test_a_driver_that_never_came_to_its_end_is_no_success(check):
    status, data, _ = check("--stages", "sanitize", sanitizer="echo '========= ERROR SUMMARY: 0 errors'")
    assert status == 1 and data["stages"]["sanitize"]["memcheck operators"]["status"] == "failed"


@needs_bash
def test_a_part_that_runs_past_the_limit_is_stopped_and_asked_for_again(check):
    status, data, printed = check("--stages", "sanitize", "--seconds", "1.5", sanitizer=f"sleep 60; {CLEAN}")
    assert status == 4 and "no time left; call again to go on" in printed
    assert data["stages"]["sanitize"]["memcheck operators"]["status"] == "unfinished"
    status, data, _ = check("--stages", "sanitize", sanitizer=CLEAN)
    assert status == 0 and data["stages"]["sanitize"]["memcheck operators"]["status"] == "passed"


@needs_bash
def test_wheels_are_carried_for_one_call(check, tmp_path):
    pytest.importorskip("pip")
    folder = tmp_path / "wheels"
    folder.mkdir()
    status, _, printed = check("--stages", "sanitize", "--wheels", str(folder))
    assert status == 2 and "--wheels: no *.whl in" in printed
    about = "aep_made_up_peer-1.0.dist-info"
    with zipfile.ZipFile(folder / "aep_made_up_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("aep_made_up_peer.py", "print('driver: a peer is here')")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: aep-made-up-peer\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    using = "python3 -c 'import aep_made_up_peer'"
    status, data, _ = check("--stages", "sanitize", "--wheels", str(folder), sanitizer=using)
    assert status == 0 and "a peer is here" in data["stages"]["sanitize"]["memcheck operators"]["note"]
    assert check("--stages", "sanitize", "--again", sanitizer=using)[0] == 1


def test_what_pytest_says():
    assert gpu_check.pytest_status(Outcome(0, "== 2 passed in 0.10s ==\nERROR SUMMARY: 0")) == (
        "passed",
        "2 passed in 0.10s",
    )
    assert gpu_check.pytest_status(Outcome(0, "3 skipped in 1.0s"))[0] == "left out"
    assert gpu_check.pytest_status(Outcome(5, "7 deselected in 0.10s"))[0] == "left out"
    assert gpu_check.pytest_status(Outcome(1, "1 failed, 2 passed in 0.10s")) == (
        "failed",
        "1 failed, 2 passed in 0.10s",
    )
    assert gpu_check.pytest_status(Outcome(2, "boom"))[0] == "failed"


class Commands:
    """In place of processes: answers by what the command holds, and keeps what was run."""

    def __init__(self, answers) -> None:
        self.answers, self.seen = answers, []

    def __call__(self, command, environment, limit) -> Outcome:
        text = " ".join(command)
        self.seen.append((text, environment))
        for key, answer in self.answers.items():
            if key in text:
                return answer(environment) if callable(answer) else answer
        return Outcome(0, "1 passed in 0.1s")


COLLECTED = Outcome(0, "tests/a.py::test_x\ntests/a.py::test_y\ntests/b.py::test_z\n")


def test_every_file_of_gpu_tests_is_a_part(tmp_path):
    run = Commands({"--collect-only": COLLECTED, "tests/a.py": Outcome(1, "1 failed in 0.1s")})
    result = tmp_path / "gpu.json"
    assert Check(result, 60, run=run).stages(["tests"], tmp_path, "9.9") == FAILED
    parts = result_file.read(result)["stages"]["tests"]
    assert {name: part["status"] for name, part in parts.items()} == {"tests/a.py": "failed", "tests/b.py": "passed"}
    again = Commands({"--collect-only": COLLECTED})
    assert Check(result, 60, run=again).stages(["tests"], tmp_path, "9.9") == FAILED and len(again.seen) == 1
    assert Check(result, 60, run=again, retry=True).stages(["tests"], tmp_path, "9.9") == PASSED


def test_a_failed_build_ends_the_check(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    run = Commands({"build_into": Outcome(1, "nvcc: command not found")})
    result = tmp_path / "gpu.json"
    assert Check(result, 60, run=run).stages(["build", "ceilings"], tmp_path, "9.9") == FAILED
    assert result_file.read(result)["stages"]["build"]["build"]["note"] == "nvcc: command not found"
    assert len(run.seen) == 1 and run.seen[0][1] == {"FORCE_CUDA": "1"}


def test_a_case_that_breaks_its_process_does_not_keep_the_rest(tmp_path):
    """The process records its cases and stops at the first failure; the next one takes up the rest."""
    result, rounds = tmp_path / "gpu.json", []

    def pytest_run(environment) -> Outcome:
        rounds.append(environment)
        done = result_file.finished(result, "ops", environment["AEP_GPU_SOURCE"])
        for part in ("a", "b", "c"):
            if part not in done:
                status = "failed" if part == "b" else "passed"
                result_file.record(result, "ops", part, environment["AEP_GPU_SOURCE"], status, 1.0)
                if status == "failed":
                    return Outcome(1, "1 failed in 1.0s")
        return Outcome(0, "1 passed in 1.0s")

    run = Commands({"benchmarks.gpu.bench ops": pytest_run})
    assert Check(result, 60, run=run).stages(["ops"], tmp_path, "9.9") == FAILED
    assert {n: p["status"] for n, p in result_file.read(result)["stages"]["ops"].items()} == {
        "a": "passed",
        "b": "failed",
        "c": "passed",
    }
    assert len(rounds) == 2 and rounds[0]["AEP_GPU_RESULT"] == str(result)


def test_a_crash_fails_the_case_that_was_running_alone(tmp_path):
    """The process wrote down which case it began; the next one goes on behind it."""
    result, source = tmp_path / "gpu.json", []

    def pytest_run(environment) -> Outcome:
        source.append(environment["AEP_GPU_SOURCE"])
        if len(source) == 1:
            result_file.record(result, "ops", "a", source[0], "passed", 1.0)
            result_file.record(result, "ops", "b", source[0], "unfinished", 0.0, result_file.BEGUN)
            return Outcome(-11, "Fatal Python error: Segmentation fault")
        result_file.record(result, "ops", "c", source[0], "passed", 1.0)
        return Outcome(0, "1 passed in 1.0s")

    assert (
        Check(result, 60, run=Commands({"benchmarks.gpu.bench ops": pytest_run})).stages(["ops"], tmp_path, "9.9")
        == FAILED
    )
    parts = result_file.read(result)["stages"]["ops"]
    assert {n: p["status"] for n, p in parts.items()} == {"a": "passed", "b": "failed", "c": "passed"}
    assert parts["b"]["note"] == "its process ended with status -11: Fatal Python error: Segmentation fault"


def test_files_that_cannot_be_imported_are_named(tmp_path):
    """They may hold GPU tests; the others are run all the same."""
    broken = Outcome(2, "tests/a.py::test_x\nERROR tests/c.py - ImportError: x\n1 test collected, 1 error in 1.0s")
    result = tmp_path / "gpu.json"
    assert Check(result, 60, run=Commands({"--collect-only": broken})).stages(["tests"], tmp_path, "9.9") == FAILED
    parts = result_file.read(result)["stages"]["tests"]
    assert {n: p["status"] for n, p in parts.items()} == {"collection": "failed", "tests/a.py": "passed"}
    assert parts["collection"]["note"] == "not imported: tests/c.py"


def test_sanitizers_leave_graphs_their_allocator_and_check_no_calls():
    parts = {part.name: part for part in gpu_check.sanitizer_parts("cs")}
    assert parts["memcheck operators"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert parts["memcheck graphed"].environment is None
    assert "--report-api-errors no --error-exitcode 99" in " ".join(parts["memcheck graphed"].command)


def test_stages_run_in_their_order():
    assert parse(["--stages", "e2e,graphed,build"]).stages == ["build", "graphed", "e2e"]


def test_a_benchmark_that_cannot_even_be_collected_is_one_failure(tmp_path):
    run = Commands({"benchmarks.gpu.bench graphed": Outcome(2, "ImportError: no such thing")})
    result = tmp_path / "gpu.json"
    assert Check(result, 60, run=run).stages(["graphed"], tmp_path, "9.9") == FAILED
    assert result_file.read(result)["stages"]["graphed"]["(process)"]["note"] == "ImportError: no such thing"
    assert len(run.seen) == 1


def test_benchmarks_stopped_at_the_limit_go_on_next_time(tmp_path):
    run = Commands({"benchmarks.gpu.bench e2e": Outcome(None, "")})
    assert Check(tmp_path / "gpu.json", 60, run=run).stages(["e2e"], tmp_path, "9.9") == TIME_IS_UP


def test_another_source_is_another_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1", encoding="utf-8")
    one = result_file.source_hash(tmp_path, ["a"], "9.9")
    assert one == result_file.source_hash(tmp_path, ["a"], "9.9") != result_file.source_hash(tmp_path, ["a"], "9.8")
    (tmp_path / "a" / "x.py").write_text("2", encoding="utf-8")
    assert result_file.source_hash(tmp_path, ["a"], "9.9") != one
    path = tmp_path / "gpu.json"
    result_file.record(path, "ops", "p", one, "passed", 1.0)
    assert (
        result_file.finished(path, "ops", one) == {"p": "passed"} and result_file.finished(path, "ops", "other") == {}
    )


def test_the_result_file_is_ours_or_an_error(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"format": "another"}', encoding="utf-8")
    with pytest.raises(ValueError, match="must have format aep_ext.gpu_check"):
        result_file.read(path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_real_process_is_stopped_with_all_it_started(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.2)
    outcome = gpu_check.run_for_real(["sh", "-c", "echo begun; sleep 30 | cat"], None, 0.5)
    assert outcome.code is None and outcome.output == "begun\n"
    began = time.monotonic()
    outliving = gpu_check.run_for_real(["sh", "-c", "sleep 60 & echo done"], None, 50)
    assert outliving == Outcome(0, "done\n") and time.monotonic() - began < 30
    assert gpu_check.run_for_real(["sh", "-c", "echo $AEP_X; exit 3"], {"AEP_X": "7"}, 10) == Outcome(3, "7\n")


def test_every_source_that_a_stage_checks_is_there():
    for folders in gpu_check.SOURCES.values():
        assert all((ROOT / folder).exists() for folder in folders)
    assert parse([]).stages == list(gpu_check.STAGES)


def test_without_a_gpu_the_module_says_so_too(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--stages", "build"]) == 3
    assert "sees no GPU here" in capsys.readouterr().err
