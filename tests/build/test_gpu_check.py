"""benchmarks/gpu_check.sh with a GPU and a compute-sanitizer that are made up: verdicts, notes and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

_TORCH = """
__version__ = "9.9"
class version: cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda i: "Fake GPU")
    get_device_capability = staticmethod(lambda i: (9, 0))
"""


@pytest.fixture
def check(tmp_path, make_script):
    """Runs the stage `sanitize` in a tree of its own; returns the exit code and what was recorded."""
    script = tmp_path / "tree" / "benchmarks" / "gpu_check.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu_check.sh", script)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text(_TORCH, encoding="utf-8")
    make_script("python3", f'exec "{sys.executable}" "$@"')

    def run(sanitizer: str) -> tuple[int, dict]:
        folder = make_script("compute-sanitizer", sanitizer).parent
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(fake)}
        command = ["bash", str(script), "--stages", "sanitize"]
        status = subprocess.run(command, env=env, capture_output=True, check=False, timeout=120).returncode
        result = script.parent / "results" / "gpu-fake-gpu.json"
        return status, json.loads(result.read_text(encoding="utf-8"))["stages"]["sanitize"]

    return run


def test_the_sanitizers_own_last_line_does_not_hide_that_the_tests_passed(check):
    status, entry = check("echo '==== 2 passed in 0.10s ===='; echo '========= ERROR SUMMARY: 0 errors'")
    assert (status, entry["status"]) == (0, "passed")
    assert "memcheck: 2 passed" in entry["note"]
    assert "racecheck: 2 passed" in entry["note"]


def test_a_race_is_a_failure(check):
    passing = "echo '==== 2 passed in 0.10s ===='"
    racing = 'case "$*" in *racecheck*) echo "===== RACECHECK SUMMARY: 1 hazard"; exit 99;; esac'
    status, entry = check(f"{passing}; {racing}")
    assert (status, entry["status"]) == (1, "failed")
    assert "1 hazard" in entry["note"]


def test_nothing_to_run_is_neither(check):
    status, entry = check("echo '==== 7 deselected in 0.10s ===='; exit 5")
    assert (status, entry["status"]) == (0, "left out")
