"""The GPU check's stages from end to end, with the CPU in the GPU's place: everything but what a GPU alone can show."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from aep_ext import _load
from benchmarks import goals
from benchmarks.gpu import check as gpu_check
from benchmarks.gpu import result_file
from benchmarks.gpu.check import PASSED, Check, Outcome, run_for_real

ROOT = Path(__file__).resolve().parents[2]
GOALS = goals.load_goals(ROOT / "benchmarks" / "gpu" / "goals.toml")
# What only a GPU does: labels that no one checks, native classes, compilation, another process, opcheck's devices.
NOT_HERE = (
    "opcheck", "out_of_range", "native_class_refuses", "cannot_stand_in_an_if", "reads_a_value_back",
    "in_place_is_refused_under_compile", "dynamic_rows_compile_once", "test_label_checks", "two_launches",
)  # fmt: skip

pytestmark = pytest.mark.skipif(_load.extension is None, reason="the native module is not loaded")


def rehearsed(command, environment, limit) -> Outcome:
    """Runs a part's command, without a sanitizer, in pretence."""
    start = command.index(sys.executable)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    clean = {"PYTHONPATH": path, "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": "", "OMP_NUM_THREADS": "1"}
    run = (sys.executable, "-W", "ignore", "-m", "rehearse", *command[start + 1 :])
    return run_for_real(run, (environment or {}) | clean, limit)


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs a stage; gives its parts."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "compute-sanitizer")
    result = tmp_path / "gpu.json"

    def run(stage: str) -> dict[str, dict]:
        status = Check(result, 500, run=rehearsed).stages([stage], tmp_path, "9.9")
        parts = result_file.read(result)["stages"][stage]
        assert status == PASSED, parts
        assert {part["status"] for part in parts.values()} == {"passed"}, parts
        return parts

    return run


def test_operators(check):
    parts = check("ops")
    assert len(parts) == 8
    for name, part in parts.items():
        details = part["details"]
        assert details["graph_us"]["fused"]["way"] == "graph replays", name
        refused = {who for who, times in details["graph_us"].items() if "no_graph" in times}
        assert refused == ({"naive", "eager", "inductor"} if name.startswith("gate") else set()), name
        measures = {goal.measure for goal in GOALS if goal.subject == "ops"} - {"launches.fused"}
        absent = {measure for measure in measures if goals.value_at(details, measure) is None}
        assert absent == ({"ratio.graph.inductor"} if name.startswith("gate") else set()), name


def test_gated_graphs(check):
    (part,) = check("graphed").values()
    assert part["details"]["left_at"]["100% at exit 0"][0] == 1
    for goal in GOALS:
        assert goal.subject != "graphed" or goals.value_at(part["details"], goal.measure) is not None


@pytest.mark.slow
def test_networks(check):
    assert len(check("e2e")) == 2


@pytest.mark.slow
def test_ceilings_and_driver(check):
    assert check("ceilings")["ceilings"]["details"]["copy_gb_per_s"]
    parts = check("sanitize")
    assert len(parts) == 4 and "agree with the reference" in parts["memcheck graphed"]["note"]


@pytest.mark.slow
def test_the_tests_of_the_gpu():
    """All that are marked ``gpu``, but for what no CPU can stand for."""
    folders = [f"tests/{name}" for name in ("ops", "gpu", "pruning", "inference")]
    wanted = " and ".join(f"not {name}" for name in NOT_HERE)
    command = (sys.executable, "-m", "pytest", *folders, "-m", "gpu", "-q", "-p", "no:cacheprovider", "-k", wanted)
    outcome = rehearsed(command, None, 500)
    assert outcome.code == 0 and " passed" in outcome.pytest_line, outcome.pytest_line
