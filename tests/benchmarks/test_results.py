"""Result files: what is kept of pytest-benchmark's JSON, the resumable sweep, and what counts as slower."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.aggregate import ResultError, aggregate, load, main, merge, save
from benchmarks.sweep import pieces

ROOT = Path(__file__).resolve().parents[2]
EXTRA = {
    "operator": "gate", "case": {"size": "8"}, "marks": ["goal"], "threads": 1, "rounds": 25,
    "fused_median_us": 12.345678, "eager_median_us": 24.7, "ratio_eager": 2.000123, "paired_ratio_eager": 1.9,
    "iqr_eager": 0.05, "ratio_published": 1234.4, "calls_per_round": 3, "best_eager": "eager", "gb_per_s": 7.123456,
    "left_out": {"inductor": "no compiler"},
}  # fmt: skip


def raw(*names: str) -> dict:
    info = {"node": "a-name", "system": "Linux", "machine": "x86_64", "python_version": "3.12"}
    benchmarks = [{"name": name, "extra_info": EXTRA, "stats": {"data": list(range(1000))}} for name in names]
    return {"machine_info": info | {"aep_ext": {"torch": "9"}}, "benchmarks": benchmarks, "commit_info": {"id": "x"}}


def test_every_number_finds_its_place_and_the_machine_has_no_name(tmp_path):
    result = aggregate(raw("test_gate[cpu-8]"))
    case = result["cases"]["test_gate[cpu-8]"]
    assert case["median_us"] == {"fused": 12.35, "eager": 24.7} and case["ratio"] == {"published": 1234.0}
    assert (case["paired_ratio"], case["iqr"]) == ({"eager": 1.9}, {"eager": 0.05})
    assert case["more"] == {"best_eager": "eager", "gb_per_s": 7.123, "left_out": {"inductor": "no compiler"}}
    assert (case["operator"], case["threads"], case["rounds"], case["marks"]) == ("gate", 1, 25, ["goal"])
    assert result["machine"] == {"system": "Linux", "machine": "x86_64", "python_version": "3.12", "torch": "9"}
    with pytest.raises(ResultError, match=r"two cases are called test_gate\[cpu-8\]"):
        aggregate(raw("test_gate[cpu-8]", "test_gate[cpu-8]"))


def test_the_command_writes_one_line_for_each_case(tmp_path, capsys):
    file, result = tmp_path / "raw.json", tmp_path / "new" / "r.json"
    file.write_text(json.dumps(raw(*(f"test_gate[cpu-{i}]" for i in range(500)))), encoding="utf-8")
    assert main([str(file), str(result)]) == 0
    assert [path.name for path in result.parent.iterdir()] == ["r.json"] and result.stat().st_size < 300_000
    assert sum(line.startswith('"test_gate') for line in result.read_text().splitlines()) == 500
    assert len(load(result)["cases"]) == 500
    assert main([str(tmp_path / "none.json"), str(result)]) == 1 and main([str(file)]) == 2
    for text in ("[]", "nothing", '{"format": 2, "cases": {}}'):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ResultError, match=r"raw\.json"):
            load(file)


def test_merging_keeps_the_newer_case_and_forgets_skips_that_ran(make_case, make_result):
    old = make_result({"a": make_case(best_eager=1.0), "b": make_case(best_eager=1.0)})
    old["skipped"] = {"c": "not there", "d": "not there"}
    merged = merge(old, make_result({"b": make_case(best_eager=2.0), "c": make_case(best_eager=3.0)}))
    ratios = {name: case["ratio"]["best_eager"] for name, case in merged["cases"].items()}
    assert ratios == {"a": 1.0, "b": 2.0, "c": 3.0} and merged["skipped"] == {"d": "not there"}
    with pytest.raises(ResultError, match="torch: '9.9', '10.0'"):
        merge(old, make_result({}, torch="10.0"))


_CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--full", action="store_true")
    parser.addoption("--inductor")
def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: none")
"""
_BENCHMARK = """
import pathlib, time, pytest
@pytest.mark.parametrize("i", range(3))
def test_{name}(benchmark, i):
    with pathlib.Path("ran.txt").open("a") as file:
        file.write(f"test_{name}[{{i}}]\\n")
    time.sleep(0.05)
    if ("{name}", i) == ("b", 1):
        pytest.skip("not there")
    benchmark.extra_info.update(operator="{name}", threads=1, fused_median_us=1.0, paired_ratio_eager=2.0)
    benchmark.pedantic(int)
    assert ("{name}", i) != ("b", 2)
"""


def test_a_sweep_is_killed_and_goes_on_and_tries_again_what_failed(tmp_path):
    """pytest itself on small benchmarks; the process group is killed as soon as the first piece is in the file."""
    assert pieces(["a::1", "a::2", "a::3", "b::1"], 2) == [["a::1", "a::2"], ["a::3"], ["b::1"]]
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(_BENCHMARK.format(name=name), encoding="utf-8")
    code = "import sys; from pathlib import Path; from benchmarks import sweep; sweep.ROOT = Path.cwd(); "
    code += "sys.exit(sweep.main(['--output', 'r.json', '--folder', '.', '--piece', '3']))"
    # Other plugins than the one that is needed would only take their time at every start of pytest.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p pytest_benchmark.plugin"}
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist, as this process may be one.
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    options = {"cwd": tmp_path, "env": around | plugins | {"PYTHONPATH": str(ROOT)}}
    command, output = [sys.executable, "-c", code], tmp_path / "r.json"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    process = subprocess.Popen(command, start_new_session=True, **silent, **options)
    deadline = time.monotonic() + 60
    while not output.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    before = set(load(output)["cases"])
    assert before and len(before) < 5
    everything = {f"test_{name}[{i}]" for name in "ab" for i in range(3)}
    open_ends = {"test_b[1]", "test_b[2]"}
    for done_before, runs_now in ((before, everything - before), (everything - open_ends, open_ends)):
        (tmp_path / "ran.txt").unlink()
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 1, done.stderr  # the one that fails
        assert f"6 cases, {len(done_before)} done before" in done.stdout
        assert "1 skipped, FAILED: test_b[2]" in done.stdout
        assert set((tmp_path / "ran.txt").read_text(encoding="utf-8").split()) == runs_now
        assert set(load(output)["cases"]) == everything - open_ends
        assert load(output)["skipped"] == {"test_b[1]": "not there"}


@pytest.fixture
def compared(tmp_path, make_case, make_result, capsys):
    """``compared(old case, new case, *options)``: exit status and what was printed."""

    def go(old: dict, new: dict | None, *options: str, **machine: object) -> tuple[int, str]:
        save(tmp_path / "old.json", make_result({"case": old}))
        save(tmp_path / "new.json", make_result({} if new is None else {"case": new}, **machine))
        status = compare.main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        output = capsys.readouterr()
        return status, output.out + output.err

    return go


def test_slower_is_what_fell_by_more_than_the_threshold_and_both_spreads(compared, make_case):
    old, new = make_case(best_eager=4.0), make_case(best_eager=3.0)
    status, text = compared(old, new)
    assert status == 1 and "SLOWER  case  against best_eager: 4 -> 3 (x 0.75" in text
    assert compared(old, new, "--threshold", "0.3")[0] == 0
    assert compared(new, old)[1].startswith("faster  case") and compared(new, old)[0] == 0
    noisy = compared(make_case(best_eager=4.0, spread=1.5), make_case(best_eager=3.0, spread=1.0))
    assert (noisy[0], noisy[1].strip()) == (0, "1 of 1 cases unchanged")
    assert "same    case" in compared(old, old, "--all")[1]


def test_the_baseline_is_one_that_both_have_and_a_case_may_be_gone(compared, make_case):
    old, new = make_case(best_eager=3.0, inductor=2.0), make_case(inductor=1.0)
    assert "against inductor: 2 -> 1" in compared(old, new)[1]
    assert compared(old, make_case(best_eager=3.0, inductor=1.0), "--baseline", "inductor")[0] == 1
    status, text = compared(old, None)
    assert status == 1 and "GONE    case" in text


def test_another_machine_or_other_threads_are_refused_unless_asked_for(compared, make_case):
    case = make_case(best_eager=3.0)
    status, text = compared(case, case, processor="another")
    assert status == 2 and "processor: 'made up', 'another'" in text
    assert compared(case, case, "--anyway", processor="another")[0] == 0
    assert compared(case, case, version="0.2")[0] == 0  # what one wants to compare
    status, text = compared(case, make_case(best_eager=3.0, threads=2))
    assert status == 2 and "case: 1 and 2 threads" in text
