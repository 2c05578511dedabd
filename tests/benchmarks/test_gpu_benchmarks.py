"""The GPU benchmarks as far as they go without a GPU: cases, comparisons, thresholds, the result file."""

from __future__ import annotations

import time

import pytest
import torch
from graphed_fake import FakeBackend
from rehearse import SIZES

from aep_ext import ops
from aep_ext.inference.cuda_graph import CudaGraphGatedNet
from benchmarks.gpu import bench, cases, measure, result_file


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


def test_cases_write_themselves_down_and_are_not_run_twice(tmp_path, monkeypatch):
    result, ran = tmp_path / "gpu.json", []
    monkeypatch.setenv("AEP_GPU_SOURCE", "abc")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def part(name):
        def measured():
            ran.append(name)
            if name == "left":
                raise bench.LeftOut("a peer is missing")
            assert name == "good", "it is bad\nand more"
            return {"x": 1}

        return name, measured

    def run(end: float) -> int:
        monkeypatch.setenv("AEP_GPU_END", str(end))
        return bench.run("ops", [part(name) for name in ("good", "left", "bad", "last")], result)

    assert run(time.time() - 1) == bench.TIME_IS_UP and not ran
    assert run(time.time() + 100) == bench.FAILED and ran == ["good", "left", "bad"]
    found = result_file.read(result)["stages"]["ops"]
    assert {name: e["status"] for name, e in found.items()} == {"good": "passed", "left": "left out", "bad": "failed"}
    assert found["good"]["details"] == {"x": 1} and found["left"]["note"] == "a peer is missing"
    assert found["bad"]["note"] == "AssertionError: it is bad"
    assert run(time.time() + 100) == bench.FAILED and ran == ["good", "left", "bad", "last"]
