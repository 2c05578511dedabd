"""The GPU benchmarks as far as they go without a GPU: cases, comparisons, thresholds, the result file."""

from __future__ import annotations

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
from aep_ext.inference.cuda_graph import CudaGraphGatedNet
from benchmarks.gpu import cases, measure, result_file

ROOT = Path(__file__).resolve().parents[2]


def test_cases_have_names_of_their_own():
    found = list(cases.operator_cases())
    ids = {case.id for case in found}
    assert len(ids) == len(found) > 40 and {case.operator for case in found} == set(cases.COMPARISONS) == set(SIZES)
    assert {"ensemble_stats-4x1024x21841", "global_avg_pool-64x2048x7-forward-bfloat16-channels_last"} <= ids


def test_a_function_that_differs_is_named_and_one_that_raises_is_left_out():
    comparison = cases.OperatorCase("ensemble", SIZES["ensemble"]).comparison("cpu")

    def compared(**functions):
        return measure.compared("case", "float32", comparison, functions, comparison.make())

    with pytest.raises(AssertionError, match="case: liar: result 0"):
        compared(liar=lambda x, w: ops.ensemble(x, w) + 1)

    def breaks(*_: object) -> None:
        raise RuntimeError("no such thing\nand more")

    assert compared(x=breaks) == ({}, {"x": "RuntimeError: no such thing"})
    with pytest.raises(RuntimeError, match="no such thing"):
        compared(fused=breaks)


def test_small_values_are_compared_by_their_own_size():
    """Gradients of a mean over many rows are far below any fixed tolerance."""
    small = torch.full((4,), 1e-5)
    measure.assert_close([small * (1 + 1e-4)], [small], "float32", "near")
    with pytest.raises(AssertionError, match="far: result 0"):
        measure.assert_close([small * 2], [small], "bfloat16", "far")
    with pytest.raises(AssertionError, match="whole: result 0"):
        measure.assert_close([torch.tensor([100, 201])], [torch.tensor([100, 200])], "bfloat16", "whole")


def test_ratios_are_of_medians_and_none_of_a_replay_to_a_call():
    times = {name: {"median": value} for name, value in {"fused": 2.0, "a": 6.0, "b": 4.0, "inductor": 3.0}.items()}
    assert measure.ratios(times, ["a", "b"]) == {"inductor": 1.5, "best_eager": 2.0}
    times = {"fused": {"median": 2.0, "way": "graph replays"}, "a": {"median": 6.0, "way": "calls"}}
    assert measure.ratios(times, ["a"]) == {}
    assert result_file.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "iqr": 1.0, "raw": [3.0, 1.0, 2.0]}


def test_input_sets_reach_past_the_l2():
    assert [measure.input_sets(n, 50 << 20) for n in (1 << 30, 10 << 20, 40)] == [2, 11, measure.MAX_SETS]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cases, "PIXELS", 16)
    monkeypatch.setattr(cases, "CLASSES", 7)
    return cases.build(cases.NetworkCase("resnet_small", 6), "cpu")


def test_thresholds_let_the_share_go_at_the_exit(small):
    net, xs = small
    gated = cases.gated(net)
    graphed = CudaGraphGatedNet(gated, xs[0], backend=FakeBackend())
    for name, e, share in cases.scenarios(4):
        gated.thresholds.copy_(torch.tensor(cases.leaving(net, xs, e, share)))
        exits = []
        for x in xs:
            answer = graphed(x)
            cases.assert_simulated(gated, answer, x)
            exits.append(answer.exit)
        expected = [0] * 4
        expected[e], expected[3] = round(48 * share), 48 - round(48 * share)
        assert torch.cat(exits).bincount(minlength=4).tolist() == expected, name
    ones = [x[:1] for x in xs]
    gated = cases.gated(net, cases.leaving(net, ones, 1, 0.5))
    assert sorted(int(gated(x).exit) for x in ones) == [1] * 4 + [3] * 4
    with torch.no_grad():
        for e in range(3):
            torch.testing.assert_close(cases.prefix(net, e)(xs[0]), net.exit_logits(xs[0])[e])


CASES = """
import pytest

@pytest.mark.parametrize("case", ["good", "bad", "left"], ids=str)
def test_it(record, case):
    if case == "left":
        pytest.skip("a peer is missing")
    record({"x": 1}, lambda: None)
    assert case == "good", "it is bad\\nand more"
"""


def test_cases_write_themselves_down_and_are_not_run_twice(tmp_path):
    pytest.importorskip("pytest_benchmark")
    folder, result = tmp_path / "benchmarks" / "gpu", tmp_path / "gpu.json"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("__init__", "conftest", "result_file"):
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
    assert {e["status"] for e in result_file.read(result)["stages"]["ops"].values()} == {"unfinished"}
    assert "1 failed, 1 passed, 1 skipped" in run(time.time() + 100)
    found = json.loads(result.read_text(encoding="utf-8"))["stages"]["ops"]
    assert {name: e["status"] for name, e in found.items()} == {"good": "passed", "bad": "failed", "left": "left out"}
    assert found["good"]["details"] == {"x": 1} and found["left"]["note"] == "a peer is missing"
    assert found["bad"]["note"].startswith("AssertionError: it is bad")
    assert "3 deselected" in run(time.time() + 100)
