"""The tables of the trunk: the quickest staged engine against the goal, and all of them side by side."""

from __future__ import annotations

import pytest

from benchmarks import tables, trunk


@pytest.fixture
def result(make_result):
    """One network on two engines: OpenVINO is the quicker one, staged too, and misses the goal."""

    def case(backend: str, staged: float, whole: float, met: bool) -> dict:
        more = {"network": "resnet50", "pixels": 64, "batch": 1, "backend": backend, "boundaries": 3}
        more |= {"best_engine": "openvino", "best_engine_us": 7000.0, "excess_percent": staged / 70 - 100}
        more |= {"excess_per_boundary_us": (staged - 7000) / 3, "goal_met": met}
        times = {"fused": staged, "whole": whole, "with_heads": staged + 100, "eager": 22000.0}
        return {"operator": "trunk", "marks": [], "threads": 2, "median_us": times, "more": more, "ratio": {}}

    return make_result({"a": case("openvino", 7700.0, 7000.0, False), "b": case("onnxruntime", 9900.0, 9700.0, True)})


def test_the_quickest_staged_trunk_is_judged(monkeypatch, result):
    row = "| resnet50 | 64 | 1 | 7.00 (openvino) | 7.70 (openvino) | 7.80 | +10.0 % | +233 | **missed** | unexplained |"
    monkeypatch.setattr(trunk, "load_notes", dict)
    assert tables.TABLES["trunk"](result).splitlines()[2] == row
    assert trunk.unexplained(result) == ["trunk resnet50 64 1"]
    monkeypatch.setattr(trunk, "load_notes", lambda: {"trunk resnet50 64 1": "copies"})
    assert tables.TABLES["trunk"](result).splitlines()[2] == row.replace("unexplained", "copies")
    assert trunk.unexplained(result) == []


def test_all_engines_side_by_side(result):
    row = "| resnet50 | 64 | 1 | 22.0 | 7.00 / 7.70 | 9.70 / 9.90 |  |  |"
    assert tables.TABLES["engines"](result).splitlines()[2] == row


def test_other_cases_are_left_out(make_case, make_result):
    other = make_result({"test_gate[cpu-8]": make_case(best_eager=2.0)})
    assert len(tables.TABLES["trunk"](other).splitlines()) == 2
