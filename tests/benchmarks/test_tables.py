"""Goals, notes, tables and the markers in a document: every figure comes from a result file."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from importlib import import_module
from typing import Any

import pytest

from benchmarks import goals, plots, report, tables
from benchmarks.aggregate import ResultError, save
from benchmarks.goals import Goal, cpu_findings, load_goals, load_notes
from benchmarks.gpu.cases import network_cases, operator_cases

GATE = Goal("gate", "8", "best eager", "paired_ratio.best_eager", at_least=2.0, stretch=3.0)
MEMORY = Goal("gate", "8", "peak memory", "more.peak", at_most=1.0)
SCRIPTS = ("ensemble", "gate", "head", "linear_loss", "loss", "pool", "subsets")


@pytest.fixture
def result(make_case, make_result):
    case = make_case(naive=2.5, best_eager=1.5, inductor=4.0, reference=6.0, copy=0.9, spread=0.25)
    case["more"] = {"peak": 0.5, "read_gb_per_s": 20.0, "copy_gb_per_s": 17.0}
    return make_result({"test_gate[cpu-8]": case})


def make_trunk(make_result) -> dict[str, Any]:
    """One network on two engines: OpenVINO is the quicker one, staged too, and misses the goal."""

    def case(backend: str, staged: float, whole: float, met: bool) -> dict:
        more = {"network": "resnet50", "pixels": 64, "batch": 1, "backend": backend, "boundaries": 3}
        more |= {"best_engine": "openvino", "best_engine_us": 7000.0, "excess_percent": staged / 70 - 100}
        more |= {"excess_per_boundary_us": (staged - 7000) / 3, "goal_met": met}
        times = {"fused": staged, "whole": whole, "with_heads": staged + 100, "eager": 22000.0}
        return {"operator": "trunk", "marks": [], "threads": 2, "median_us": times, "more": more, "ratio": {}}

    return make_result({"a": case("openvino", 7700.0, 7000.0, False), "b": case("onnxruntime", 9900.0, 9700.0, True)})


def make_overhead(make_case, make_result) -> dict[str, Any]:
    """What benchmarks/sweep.py writes of benchmarks/test_gated.py."""
    about = {"network": "resnet50", "pixels": 224, "batch": 1, "engine": "eager"}
    nobody = make_case("gated_nobody_leaves", ungated=0.98)
    nobody["more"] = {**about, "overhead_percent": 2.041, "overhead_interval": [1.5, None]}
    nobody["more"] |= {"goal_percent": 1.0, "goal_met": False}
    half = make_case("gated_half_leave_at_the_first_exit", spread=0.2, ungated=1.5, mask=1.25)
    half["more"] = {**about, "batch": 64}
    return make_result({"a": half, "b": nobody, "c": make_case("gate", best_eager=2.0)})


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_every_goal_names_a_case_that_exists_and_is_marked():
    """The data files and the cases cannot drift apart: the ids in them are those of the tests."""
    marked = set()
    for script in SCRIPTS:
        for name, function in vars(import_module(f"benchmarks.test_{script}")).items():
            for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
                for parameter in mark.args[1] if mark.args[:1] == ("case",) else []:
                    if any(m.name == "goal" for m in parameter.marks):
                        marked.add(f"{name}[{parameter.id}]")
    assert {goal.name for goal in load_goals()} == marked
    known = {"ops": [case.id for case in operator_cases()], "graphed": [case.id for case in network_cases()]}
    for goal in load_goals(goals.FOLDER / "gpu" / "goals.toml"):
        assert fnmatch.filter(known[goal.subject], goal.case), goal


def test_notes_are_of_goals_and_a_goal_has_one_threshold(tmp_path):
    keys = {f"{goal.subject} {goal.case}" for goal in load_goals()}
    keys |= {f"{goal.subject} {goal.case} {goal.measure}" for goal in load_goals()}
    assert {key for key in load_notes() if not key.startswith(("trunk ", "gated_"))} <= keys
    path = tmp_path / "goals.toml"
    path.write_text('[[goal]]\noperator = "gate"\ncases = ["8"]\nchecks = [{ text = "x", measure = "more.y" }]\n')
    with pytest.raises(ValueError, match="gate 8, more.y: at_least or at_most"):
        load_goals(path)


def test_findings(result, make_result):
    missed, met = cpu_findings([GATE, MEMORY], result, {"gate 8": "memory"})
    assert (missed.met, missed.value, missed.spread, missed.note) == (False, 1.5, 0.25, "memory")
    assert (met.met, met.value, met.spread, met.note) == (True, 0.5, None, "")
    notes = {"gate 8": "in general", "gate 8 paired_ratio.best_eager": "in particular"}
    assert cpu_findings([GATE], result, notes)[0].note == "in particular"
    assert cpu_findings([GATE], result, {})[0].unexplained
    empty = make_result({}) | {"skipped": {"test_gate[cpu-8]": "no such argument"}}
    finding = cpu_findings([GATE], empty, {})[0]
    assert (finding.met, finding.note, finding.unexplained) == (None, "no such argument", False)
    result["cases"]["test_gate[cpu-8]"]["more"]["left_out"] = {"other": "no compiler"}
    others = [Goal("gate", "8", "x", "paired_ratio.other", at_least=1.0), Goal("x", "8", "x", "more.y", at_most=1.0)]
    assert [finding.note for finding in cpu_findings(others, result, {})] == ["no compiler"]


def test_gpu_goals_beside_a_result():
    parts = {
        "ensemble-4x1024x21841": {"status": "passed", "details": {"fraction_of_copy": 0.9, "ratio": {"graph": {}}}},
        "gate-256x1000": {"status": "passed", "details": {"fraction_of_copy": 0.5}},
        "gate-1x1000": {"status": "failed"},
    }
    text = goals.gpu_text({"machine": {"gpu": "Made-up", "torch": "9.9"}, "stages": {"ops": parts}})
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Made-up, torch 9.9" and lines[-1].startswith("1 met, 1 missed, ")
    assert "ensemble-4x1024x21841 0.9 met" in lines and "gate-256x1000 0.5 missed" in lines
    assert "gate-1x1000 - not measured (failed)" in lines and "*-1 - not measured" in lines


def test_tables_of_operators(monkeypatch, result, tmp_path):
    monkeypatch.setattr(tables, "load_goals", lambda: [GATE, MEMORY])
    monkeypatch.setattr(tables, "load_notes", dict)
    head, _, missed, met = tables.goals(result).splitlines()
    assert missed == "| gate | (8) | best eager | >= 2 (3) | 1.50 (IQR 0.25) | **missed** | unexplained |"
    assert met == "| gate | (8) | peak memory | <= 1 | 0.50 | met |  |" and head.count("|") == met.count("|")
    assert tables.operators(result).splitlines()[-1] == "| gate | (8) | 1 | 10.0 | 2.50 | 1.50 | 4.00 | 6.00 |"
    assert "| gate | 1 | 6.00 (6.00 to 6.00) | 4.00 (4.00 to 4.00) |" in tables.fallback(result)
    assert "copy with 1 thread 17 GB/s; read with 1 thread 20 GB/s" in tables.machine(result)
    pytest.importorskip("matplotlib", reason="plots need the extra [train]")
    path = plots.plot_goals(cpu_findings([GATE, MEMORY], result, {}), tmp_path / "goals.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_of_the_trunk(monkeypatch, make_result):
    result = make_trunk(make_result)
    row = "| resnet50 | 64 | 1 | 7.00 (openvino) | 7.70 (openvino) | 7.80 | +10.0 % | +233 | **missed** | unexplained |"
    monkeypatch.setattr(tables, "load_notes", dict)
    assert tables.trunk(result).splitlines()[2] == row
    assert list(tables.UNEXPLAINED["trunk"](result)) == ["trunk resnet50 64 1"]
    monkeypatch.setattr(tables, "load_notes", lambda: {"trunk resnet50 64 1": "copies"})
    assert tables.trunk(result).splitlines()[2] == row.replace("unexplained", "copies")
    assert list(tables.UNEXPLAINED["trunk"](result)) == []
    assert tables.engines(result).splitlines()[2] == "| resnet50 | 64 | 1 | 22.0 | 7.00 / 7.70 | 9.70 / 9.90 |  |  |"


def test_table_of_the_overhead_of_gates(monkeypatch, make_case, make_result):
    result, key = make_overhead(make_case, make_result), "gated_nobody_leaves resnet50 eager 1"
    monkeypatch.setattr(tables, "load_notes", dict)
    rows = rows_of(tables.overhead(result))
    about = ["nobody leaves", "resnet50", "224", "eager", "1"]
    assert rows[2] == [*about, "+2.04 [+1.50, ?]", "<= 1", "**missed**", "unexplained"]
    notch = 1.57 * 0.2 / math.sqrt(11)
    gain = [f"{ratio:.2f} [{ratio - notch:.2f}, {ratio + notch:.2f}]" for ratio in (1.5, 1.25)]
    assert rows[5] == ["half leave at the first exit", "resnet50", "224", "eager", "64", gain[0], "", gain[1], ""]
    assert list(tables.UNEXPLAINED["overhead"](result)) == [key]
    monkeypatch.setattr(tables, "load_notes", lambda: {key: "the call"})
    assert rows_of(tables.overhead(result))[2][-1] == "the call"
    del result["cases"]["b"]["more"]["engine"]
    with pytest.raises(ResultError, match="gated_nobody_leaves does not say its engine"):
        tables.overhead(result)


def test_documents_are_rendered_and_checked(monkeypatch, tmp_path, result, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "load_goals", lambda: [GATE])
    monkeypatch.setattr(tables, "load_notes", dict)
    save(tmp_path / "cpu-ops.json", result)
    text = "a\n<!-- benchmarks: cpu-ops goals -->\nold\n<!-- /benchmarks -->\nb\n"
    made = report.rendered(text)
    assert re.search(
        r"a\n<!-- benchmarks: cpu-ops goals -->\n\| operator .*\n<!-- /benchmarks -->\nb\n", made, re.DOTALL
    )
    assert report.rendered(made) == made
    with pytest.raises(ResultError, match=r"other\.json"):
        report.rendered(text.replace("cpu-ops", "other"))
    with pytest.raises(ResultError, match="cpu-ops.json, table nothing: there is no such table; there are goals, "):
        report.rendered(text.replace("goals", "nothing"))
    with pytest.raises(ResultError, match=r"cpu-ops\.json, table peer: not a comparison"):
        report.rendered(text.replace("goals", "peer"))

    document = tmp_path / "R.md"
    document.write_text(text)
    monkeypatch.setattr(report, "documents", lambda: [document])
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "R.md does not say" in said and "what bounds it: gate 8 paired_ratio.best_eager" in said
    report.main([])
    monkeypatch.setattr(tables, "load_notes", lambda: {"gate 8": "memory"})
    assert report.main([]) == 0 and report.main(["--check"]) == 0


def test_every_committed_result_of_a_benchmark_has_its_tables():
    for name, kinds in {
        "cpu-ops": ("goals", "operators", "fallback", "machine"),
        "cpu-linear-loss": ("goals", "operators", "machine"),
        "cpu-trunk": ("trunk", "engines", "machine"),
        "cpu-gated": ("overhead",),
        "cifar10-best-curves": ("curves",),
        "cifar10-earlyon": ("peer",),
    }.items():
        content = json.loads((report.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for kind in kinds:
            assert len(tables.TABLES[kind](content)) > 50, (name, kind)
            assert not list(tables.UNEXPLAINED.get(kind, lambda content: ())(content)), (name, kind)
