"""Result files: what is kept of pytest-benchmark's JSON, the resumable sweep, and what counts as slower."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.aggregate import ResultError, aggregate_case, load, open_result, save

ROOT = Path(__file__).resolve().parents[2]
EXTRA = {
    "operator": "gate", "case": {"size": "8"}, "marks": ["goal"], "threads": 1, "rounds": 25,
    "fused_median_us": 12.345678, "eager_median_us": 24.7, "ratio_eager": 2.000123, "paired_ratio_eager": 1.9,
    "iqr_eager": 0.05, "ratio_published": 1234.4, "calls_per_round": 3, "best_eager": "eager", "gb_per_s": 7.123456,
    "left_out": {"inductor": "no compiler"},
}  # fmt: skip


def test_every_number_finds_its_place():
    case = aggregate_case(EXTRA)
    assert case["median_us"] == {"fused": 12.35, "eager": 24.7} and case["ratio"] == {"published": 1234.0}
    assert (case["paired_ratio"], case["iqr"]) == ({"eager": 1.9}, {"eager": 0.05})
    assert case["more"] == {"best_eager": "eager", "gb_per_s": 7.123, "left_out": {"inductor": "no compiler"}}
    assert (case["operator"], case["threads"], case["rounds"], case["marks"]) == ("gate", 1, 25, ["goal"])


def test_a_file_has_one_line_for_each_case_and_one_machine(tmp_path, make_case, make_result):
    path = tmp_path / "new" / "r.json"
    result = make_result({f"test_gate[cpu-{i}]": make_case(best_eager=1.0) for i in range(100)})
    save(path, result)
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]
    assert sum(line.startswith('"test_gate') for line in path.read_text().splitlines()) == 100
    assert load(path) == open_result(path, result["machine"]) == result
    with pytest.raises(ResultError, match="torch: '9.9', '10.0'"):
        open_result(path, result["machine"] | {"torch": "10.0"})
    for text in ("[]", "nothing", '{"format": 2, "cases": {}}'):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ResultError, match=r"r\.json"):
            load(path)


BENCHMARK = """
import pathlib, pytest
from benchmarks.paired_timing import Comparison

@pytest.mark.quick
@pytest.mark.parametrize("i", range(4))
def test_it(paired_timing, i):
    with pathlib.Path({ran!r}).open("a") as file:
        file.write(f"{{i}} ")
    if i == 1:
        pytest.skip("not there")
    paired_timing(Comparison(lambda: 1, {{"eager": lambda: 1 + (i == 2)}}))
    if i == 0 and {killed}:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_sweep_is_killed_and_goes_on_and_tries_again_what_failed(tmp_path):
    """pytest itself on small benchmarks; the process is killed in the middle of a case."""
    pytest.importorskip("pytest_benchmark")
    folder, output, ran = tmp_path / "benchmarks", tmp_path / "r.json", tmp_path / "ran.txt"
    folder.mkdir()
    (folder / "conftest.py").write_text("from benchmarks_conftest import *\n", encoding="utf-8")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path / "benchmarks_conftest.py")
    # Other plugins than the one that is needed would only take their time at every start of pytest; pytest-benchmark
    # measures nothing where it takes itself for a worker of pytest-xdist, as this process may be one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    command = [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "-p", "no:cacheprovider", "-q"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), str(folder / "test_some.py")]
    command += ["--benchmark-only", "--case-seconds=0.01", f"--result={output}"]

    def sweep(killed: bool) -> tuple[int, str]:
        ran.write_text("")
        (folder / "test_some.py").write_text(BENCHMARK.format(ran=str(ran), killed=killed), encoding="utf-8")
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert sweep(killed=True)[0] < 0 and not output.exists()
    status, text = sweep(killed=False)
    assert (status, ran.read_text()) == (1, "0 1 2 3 "), text
    assert set(load(output)["cases"]) == {"test_it[0]", "test_it[3]"}
    assert load(output)["skipped"] == {"test_it[1]": "not there"}
    assert sweep(killed=False)[0] == 1 and ran.read_text() == "1 2 "


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
