"""The GPU benchmarks as far as they go without a GPU: cases, contestants, thresholds, goals, the result file."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from graphed_fake import FakeBackend
from rehearse import SIZES

from aep_ext import ops
from aep_ext.termination import GatedNet, GraphedGatedNet
from benchmarks.gpu import clock, end_to_end, goals, measure, operators, store

ROOT = Path(__file__).resolve().parents[2]


def test_every_case_has_a_name_of_its_own_and_a_setup():
    found = list(operators.all_cases())
    assert len({case.id for case in found}) == len(found) > 40
    assert "ensemble_stats-4x1024x21841" in {case.id for case in found}
    assert "global_avg_pool-64x2048x7-bfloat16-channels_last" in {case.id for case in found}
    assert {case.operator for case in found} <= set(operators._SETUPS) == set(SIZES)
    assert hasattr(ops, "linear_joint_cross_entropy") == any(c.operator.startswith("linear") for c in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operator", list(SIZES))
def test_all_contestants_of_an_operator_give_the_same(operator, dtype):
    if not hasattr(ops, operator):
        assert operator == "linear_joint_cross_entropy"
        return
    torch.manual_seed(0)
    case = operators.Case(operator, SIZES[operator], dtype)
    found = operators.setup(case, "cpu")
    running, left_out = measure.contestants(found, compile_too=False)
    assert left_out == {} or (list(left_out) == ["liger"] and "not installed" in left_out["liger"])
    running.pop("liger", None)  # it needs a GPU
    arguments = found.make()
    kept, broken = measure.compared(case, found, running, arguments)
    assert broken == {} and list(kept) == ["fused", *found.eager]
    around = found.around(found.compiled)
    assert list(measure.compared(case, found, {"compiled": around}, arguments)[0]) == ["compiled"]
    assert found.bytes_moved > 0 and operators.bytes_of(arguments) > 0


def test_who_differs_is_named_and_who_raises_is_left_out():
    case = operators.Case("ensemble", SIZES["ensemble"])
    found = operators.setup(case, "cpu")
    with pytest.raises(AssertionError, match="ensemble-3x4x11: liar"):
        measure.compared(case, found, {"liar": lambda x, w: ops.ensemble(x, w) + 1}, found.make())

    def breaks(*_: object) -> None:
        raise RuntimeError("no such thing\nand more")

    assert measure.compared(case, found, {"x": breaks}, found.make()) == ({}, {"x": "RuntimeError: no such thing"})
    with pytest.raises(RuntimeError, match="no such thing"):
        measure.compared(case, found, {"fused": breaks}, found.make())


def test_sets_reach_past_the_l2():
    assert clock.input_sets(1 << 30, 50 << 20) == 2
    assert clock.input_sets(10 << 20, 50 << 20) == 11
    assert clock.input_sets(40, 50 << 20) == clock.MOST_SETS


def test_ratios_are_of_medians():
    times = {name: {"median": value} for name, value in {"fused": 2.0, "a": 6.0, "b": 4.0, "inductor": 3.0}.items()}
    assert measure.ratios(times, ["a", "b"]) == {"inductor": 1.5, "best_eager": 2.0}
    assert store.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "iqr": 1.0, "raw": [3.0, 1.0, 2.0]}


def test_no_ratio_of_a_replay_to_a_call():
    times = {"fused": {"median": 2.0, "way": "graph replays"}, "a": {"median": 6.0, "way": "calls"}}
    assert measure.ratios(times, ["a"]) == {}


def test_small_values_are_compared_by_their_own_size():
    """Gradients of a mean over many rows are far below any fixed tolerance."""
    small = torch.full((4,), 1e-5)
    measure._close([small * (1 + 1e-4)], [small], "float32", "near")
    with pytest.raises(AssertionError, match="far: result 0"):
        measure._close([small * 2], [small], "bfloat16", "far")
    with pytest.raises(AssertionError, match="whole: result 0"):
        measure._close([torch.tensor([100, 201])], [torch.tensor([100, 200])], "bfloat16", "whole")


def test_a_profiler_that_sees_nothing_counts_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert clock.launches(lambda x: x + 1, (torch.ones(2),)) is None


def test_every_goal_is_about_cases_that_there_are():
    known = {"ops": {c.id for c in operators.all_cases()}, "graphed": {c.id for c in end_to_end.all_cases()}}
    if not hasattr(ops, "linear_joint_cross_entropy"):
        known["ops"].add("linear_joint_cross_entropy-4x1024x21841")
    for goal in goals.load():
        for pattern in goal.cases:
            assert fnmatch.filter(known[goal.stage], pattern), (goal.text, pattern)


def test_goals_beside_a_result():
    parts = {
        "ensemble-4x1024x21841": {"status": "passed", "details": {"fraction_of_copy": 0.9, "ratio": {"graph": {}}}},
        "gate-256": {"status": "passed", "details": {"fraction_of_copy": 0.5}},
        "gate-1": {"status": "failed"},
    }
    result = {"machine": {"gpu": "Made-up", "torch": "9.9"}, "stages": {"ops": parts}}
    text = goals.text(result)
    assert text.startswith("Made-up, torch 9.9")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "ensemble-4x1024x21841 0.9 met" in lines and "gate-256 0.5 missed" in lines
    assert "gate-1 - not measured (failed)" in lines and "- - not measured" in lines
    assert lines[-1].startswith("1 met, 1 missed, ")


def test_a_goal_needs_one_threshold(tmp_path):
    file = tmp_path / "goals.toml"
    file.write_text('[[goal]]\ntext = "x"\nstage = "ops"\ncases = []\nmeasure = "a"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="goals.toml: x: at_least or at_most, and not both"):
        goals.load(file)


@pytest.fixture(scope="module")
def small():
    return end_to_end.build(end_to_end.Case("resnet_small", 6), "cpu", pixels=16, classes=7)


@pytest.mark.parametrize("name, e, share", list(end_to_end.scenarios(4)))
def test_thresholds_let_the_share_go_at_the_exit(small, name, e, share):
    net, xs = small
    gated = GatedNet(net, "confidence", end_to_end.leaving(net, xs, e, share), mode="mask")
    graphed = GraphedGatedNet(gated, xs[0], backend=FakeBackend())
    exits = []
    for x in xs:
        answer = graphed(x)
        end_to_end.agree(gated, answer, x)
        exits.append(answer.exit)
    counts = torch.cat(exits).bincount(minlength=4).tolist()
    expected = [0] * 4
    expected[e], expected[3] = round(48 * share), 48 - round(48 * share)
    assert counts == expected, name


def test_a_prefix_is_the_network_up_to_its_exit(small):
    net, xs = small
    with torch.no_grad():
        for e in range(3):
            torch.testing.assert_close(end_to_end.prefix(net, e)(xs[0]), net.exit_logits(xs[0])[e])


def test_a_batch_of_one_can_leave_by_halves(small):
    net, xs = small
    ones = [x[:1] for x in xs]
    gated = GatedNet(net, "confidence", end_to_end.leaving(net, ones, 1, 0.5))
    assert sorted(int(gated(x).exit) for x in ones) == [1] * 4 + [3] * 4


CASES = """
import pytest

@pytest.mark.parametrize("case", ["good", "bad", "left"], ids=str)
def test_it(figures, case):
    if case == "left":
        pytest.skip("a peer is missing")
    figures({"x": 1}, lambda: None)
    assert case == "good", "it is bad\\nand more"
"""


def test_cases_write_themselves_down_and_are_not_run_twice(tmp_path):
    pytest.importorskip("pytest_benchmark")
    folder, result = tmp_path / "benchmarks" / "gpu", tmp_path / "gpu.json"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("__init__", "conftest", "store"):
        shutil.copy(ROOT / "benchmarks" / "gpu" / f"{name}.py", folder)
    (folder / "test_some.py").write_text(CASES, encoding="utf-8")

    def run(end: float) -> str:
        env = os.environ | {
            "PYTHONPATH": str(tmp_path),
            "AEP_GPU_RESULT": str(result),
            "AEP_GPU_STAGE": "ops",
            "AEP_GPU_SOURCE": "abc",
            "AEP_GPU_END": str(end),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",  # of the run around this one: options of plugins that are not loaded here
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        # Without pytest-benchmark's timing: describing the machine takes it seconds.
        command += ["-p", "pytest_benchmark.plugin", "--benchmark-disable", "--rootdir", str(tmp_path)]
        command += [str(folder / "test_some.py")]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout

    assert "3 skipped" in run(time.time() - 1)
    assert {e["status"] for e in store.read(result)["stages"]["ops"].values()} == {"unfinished"}
    assert "1 failed, 1 passed, 1 skipped" in run(time.time() + 100)
    found = json.loads(result.read_text(encoding="utf-8"))["stages"]["ops"]
    assert {name: e["status"] for name, e in found.items()} == {"good": "passed", "bad": "failed", "left": "left out"}
    assert found["good"]["details"] == {"x": 1} and found["left"]["note"] == "a peer is missing"
    assert found["bad"]["note"].startswith("AssertionError: it is bad")
    assert "3 deselected" in run(time.time() + 100)
