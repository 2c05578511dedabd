"""benchmarks/goals.toml, the tables made of it, and the notes on what was missed."""

from __future__ import annotations

import re

import pytest

from benchmarks import figure, tables
from benchmarks.goals import Goal, judge, load_goals, load_notes

GATE = Goal("gate", "8", "best eager", "paired_ratio.best_eager", at_least=2.0, stretch=3.0)
MEMORY = Goal("gate", "8", "peak memory", "more.peak", at_most=1.0)


@pytest.fixture
def result(make_case, make_result):
    case = make_case(naive=2.5, best_eager=1.5, inductor=4.0, reference=6.0, copy=0.9, spread=0.25)
    case["more"] = {"peak": 0.5, "read_gb_per_s": 20.0, "copy_gb_per_s": 17.0}
    return make_result({"test_gate[cpu-8]": case})


def test_every_goal_names_a_case_that_exists_and_is_marked():
    """The data file and the cases cannot drift apart: the ids in it are those of the tests."""
    from benchmarks import test_ensemble, test_gate, test_head, test_linear_loss, test_loss, test_pool, test_subsets

    marked = set()
    for module in (test_ensemble, test_gate, test_head, test_linear_loss, test_loss, test_pool, test_subsets):
        for name, function in vars(module).items():
            for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
                for parameter in mark.args[1] if mark.args[:1] == ("case",) else []:
                    if any(m.name == "goal" for m in parameter.marks):
                        marked.add(f"{name}[cpu-{parameter.id}]")
    assert {goal.name for goal in load_goals()} <= marked


def test_goals_are_judged(result):
    missed, met = judge([GATE, MEMORY], result, {"gate 8": "memory"})
    assert (missed.met, missed.value, missed.spread, missed.note) == (False, 1.5, 0.25, "memory")
    assert (met.met, met.value, met.spread, met.note) == (True, 0.5, None, "")


def test_a_note_may_be_for_one_measure_only(result):
    notes = {"gate 8": "in general", "gate 8 paired_ratio.best_eager": "in particular"}
    assert judge([GATE], result, notes)[0].note == "in particular"
    verdict = judge([GATE], result, {})[0]
    assert verdict.unexplained


def test_what_was_not_measured_is_neither_met_nor_missed(result, make_result):
    empty = make_result({})
    empty["skipped"] = {"test_gate[cpu-8]": "no such argument"}
    verdict = judge([GATE], empty, {})[0]
    assert (verdict.met, verdict.note, verdict.unexplained) == (None, "no such argument", False)
    result["cases"]["test_gate[cpu-8]"]["more"]["left_out"] = {"other": "no compiler"}
    verdict = judge([Goal("gate", "8", "x", "paired_ratio.other", at_least=1.0)], result, {})[0]
    assert (verdict.met, verdict.note) == (None, "no compiler")


def test_goals_of_another_files_operators_are_left_out(result):
    elsewhere = Goal("other", "8", "x", "more.peak", at_most=1.0)
    assert [verdict.goal for verdict in judge([GATE, elsewhere, MEMORY], result, {})] == [GATE, MEMORY]
    missing = judge([Goal("gate", "9", "x", "more.peak", at_most=1.0)], result, {})[0]
    assert (missing.met, missing.note) == (None, "not in the result file")


def test_a_goal_has_one_threshold(tmp_path):
    path = tmp_path / "goals.toml"
    path.write_text('[[goal]]\noperator = "gate"\ncases = ["8"]\nchecks = [{ against = "x", measure = "more.y" }]\n')
    with pytest.raises(ValueError, match=r"test_gate\[cpu-8\], more.y: at_least or at_most"):
        load_goals(path)


def test_the_table_has_goal_and_result_side_by_side(monkeypatch, result):
    monkeypatch.setattr(tables, "load_goals", lambda: [GATE, MEMORY])
    monkeypatch.setattr(tables, "load_notes", dict)
    head, _, missed, met = tables.goals(result).splitlines()
    assert missed == "| gate | (8) | best eager | >= 2 (3) | 1.50 (IQR 0.25) | **missed** | unexplained |"
    assert met == "| gate | (8) | peak memory | <= 1 | 0.50 | met |  |"
    assert head.count("|") == missed.count("|")


def test_the_other_tables(result):
    assert tables.operators(result).splitlines()[-1] == "| gate | (8) | 1 | 10.0 | 2.50 | 1.50 | 4.00 | 6.00 |"
    assert "| gate | 1 | 6.00 (6.00 to 6.00) | 4.00 (4.00 to 4.00) |" in tables.fallback(result)
    assert "copy with 1 thread 17 GB/s; read with 1 thread 20 GB/s" in tables.machine(result)


def test_the_committed_notes_are_of_goals():
    keys = {f"{goal.operator} {goal.case}" for goal in load_goals()}
    keys |= {f"{goal.operator} {goal.case} {goal.measure}" for goal in load_goals()}
    assert {key for key in load_notes() if not key.startswith(("trunk ", "gated_"))} <= keys


def test_the_figure(tmp_path, result):
    pytest.importorskip("matplotlib", reason="the figure needs the extra [train]")
    path = figure.draw(judge([GATE, MEMORY], result, {}), tmp_path / "goals.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_markers_in_a_document(monkeypatch, tmp_path, result):
    pytest.importorskip("matplotlib", reason="aep_ext.report needs the extra [train]")
    from benchmarks import report
    from benchmarks.condense import ResultError, save

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    save(tmp_path / "cpu-ops.json", result)
    text = "a\n<!-- benchmarks: cpu-ops fallback -->\nold\n<!-- /benchmarks -->\nb\n"
    made = report.rendered(text)
    assert re.search(
        r"a\n<!-- benchmarks: cpu-ops fallback -->\n\| operator .*\n<!-- /benchmarks -->\nb\n", made, re.DOTALL
    )
    assert report.rendered(made) == made
    assert report.unexplained(made) == []
    with pytest.raises(ResultError, match="no such table: nothing"):
        report.rendered(text.replace("fallback", "nothing"))
    with pytest.raises(ResultError, match="other.json"):
        report.rendered(text.replace("cpu-ops", "other"))
    goals = text.replace("fallback", "goals")
    monkeypatch.setattr(report, "load_goals", lambda: [GATE])
    monkeypatch.setattr(report, "load_notes", dict)
    assert report.unexplained(goals) == ["gate 8 paired_ratio.best_eager"]
