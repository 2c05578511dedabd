"""benchmarks/condense.py: what is kept of pytest-benchmark's JSON, and how result files are merged and written."""

from __future__ import annotations

import json

import pytest

from benchmarks.condense import ResultError, condense, condense_case, dumps, load, main, merge, save

EXTRA = {
    "operator": "gate",
    "case": {"size": "8"},
    "marks": ["goal"],
    "threads": 1,
    "rounds": 25,
    "fused_median_us": 12.345678,
    "eager_median_us": 24.7,
    "ratio_eager": 2.000123,
    "paired_ratio_eager": 1.9,
    "iqr_eager": 0.05,
    "ratio_best_rival": 2.0,
    "ratio_published": 1234.4,
    "calls_per_round": 3,
    "best_eager": "eager",
    "gb_per_s": 7.123456,
    "left_out": {"inductor": "no compiler"},
}


def _raw(*names: str) -> dict:
    info = {
        "node": "a-name",
        "system": "Linux",
        "machine": "x86_64",
        "python_version": "3.12",
        "aep_ext": {"torch": "9"},
    }
    benchmarks = [{"name": name, "extra_info": EXTRA, "stats": {"data": list(range(1000))}} for name in names]
    return {"machine_info": info, "benchmarks": benchmarks, "commit_info": {"id": "x"}}


def test_every_number_finds_its_place():
    case = condense_case(EXTRA)
    assert case["median_us"] == {"fused": 12.35, "eager": 24.7}
    assert case["ratio"] == {"best_rival": 2.0, "published": 1234.0}
    assert case["paired_ratio"] == {"eager": 1.9}
    assert case["iqr"] == {"eager": 0.05}
    assert case["more"] == {"best_eager": "eager", "gb_per_s": 7.123, "left_out": {"inductor": "no compiler"}}
    assert (case["operator"], case["threads"], case["rounds"], case["marks"]) == ("gate", 1, 25, ["goal"])


def test_the_machine_has_no_name():
    result = condense(_raw("test_gate[cpu-8]"))
    assert "a-name" not in json.dumps(result)
    assert result["machine"] == {"system": "Linux", "machine": "x86_64", "python_version": "3.12", "torch": "9"}


def test_a_name_that_comes_twice_is_refused():
    with pytest.raises(ResultError, match=r"two cases are called test_gate\[cpu-8\]"):
        condense(_raw("test_gate[cpu-8]", "test_gate[cpu-8]"))


def test_one_line_for_each_case_and_small(tmp_path):
    result = condense(_raw(*(f"test_gate[cpu-{i}]" for i in range(500))))
    text = dumps(result)
    assert json.loads(text) == result
    assert sum(line.startswith('"test_gate') for line in text.splitlines()) == 500
    assert len(text) < 300_000
    save(tmp_path / "new" / "r.json", result)
    assert load(tmp_path / "new" / "r.json") == result
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.json"]


def test_merging_keeps_the_newer_case_and_forgets_skips_that_ran(make_case, make_result):
    old = make_result({"a": make_case(best_eager=1.0), "b": make_case(best_eager=1.0)})
    old["skipped"] = {"c": "not there", "d": "not there"}
    new = make_result({"b": make_case(best_eager=2.0), "c": make_case(best_eager=3.0)})
    merged = merge(old, new)
    assert {name: case["ratio"]["best_eager"] for name, case in merged["cases"].items()} == {
        "a": 1.0,
        "b": 2.0,
        "c": 3.0,
    }
    assert merged["skipped"] == {"d": "not there"}
    assert merge(None, new) is new


def test_results_of_two_machines_are_not_mixed(make_result):
    with pytest.raises(ResultError, match="torch: '9.9', '10.0'"):
        merge(make_result({}), make_result({}, torch="10.0"))


@pytest.mark.parametrize("text", ["[]", "nothing", '{"format": 2, "cases": {}}', None])
def test_what_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultError, match="r.json"):
        load(path)


def test_the_command(tmp_path, capsys):
    raw, result = tmp_path / "raw.json", tmp_path / "r.json"
    raw.write_text(json.dumps(_raw("test_gate[cpu-8]")), encoding="utf-8")
    assert main([str(raw), str(result)]) == 0
    assert list(load(result)["cases"]) == ["test_gate[cpu-8]"]
    assert main([str(tmp_path / "none.json"), str(result)]) == 1
    assert main([str(raw)]) == 2
    assert "usage" in capsys.readouterr().err
