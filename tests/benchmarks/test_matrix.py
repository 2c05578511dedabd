"""benchmarks/matrix.py: in pieces, resumable, nothing that is done is run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.condense import ResultError, load
from benchmarks.matrix import case_name, outcomes, pieces, run_all

ROOT = Path(__file__).resolve().parents[2]
NODES = [f"benchmarks/test_{file}.py::test_{file}[{i}]" for file in "ab" for i in range(3)]
NAMES = [case_name(node) for node in NODES]


@pytest.fixture
def runner(make_case, make_result):
    """Stands for pytest: remembers what it ran, and is killed before a case of the caller's choice."""

    class Runner:
        def __init__(self) -> None:
            self.ran: list[str] = []
            self.killed_at = self.skips = self.fails = ""

        def __call__(self, piece):
            names = [case_name(node) for node in piece]
            if self.killed_at in names:
                raise KeyboardInterrupt
            self.ran += names
            ran = [name for name in names if name not in (self.skips, self.fails)]
            result = make_result({name: make_case(best_eager=2.0) for name in ran}) if ran else None
            skipped = {self.skips: "not there"} if self.skips in names else {}
            return result, skipped, [self.fails] if self.fails in names else []

    return Runner()


def test_pieces_are_of_one_file_and_keep_the_order():
    assert pieces(NODES, 2) == [NODES[:2], NODES[2:3], NODES[3:5], NODES[5:]]


def test_after_a_kill_it_goes_on_where_it_was(tmp_path, runner):
    runner.killed_at = NAMES[3]
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "r.json", NODES, 2, runner, lambda text: None)
    assert sorted(load(tmp_path / "r.json")["cases"]) == NAMES[:3]
    runner.killed_at = ""
    assert run_all(tmp_path / "r.json", NODES, 2, runner, lambda text: None) == 0
    assert runner.ran == NAMES  # each once
    assert sorted(load(tmp_path / "r.json")["cases"]) == NAMES


def test_what_was_skipped_or_failed_is_tried_again(tmp_path, runner):
    said: list[str] = []
    runner.skips, runner.fails = NAMES[0], NAMES[4]
    assert run_all(tmp_path / "r.json", NODES, 3, runner, said.append) == 1
    result = load(tmp_path / "r.json")
    assert result["skipped"] == {NAMES[0]: "not there"}
    assert NAMES[4] not in result["cases"]
    assert "1 skipped" in said[1]
    assert f"FAILED: {NAMES[4]}" in said[2]
    runner.skips, runner.fails, runner.ran = "", "", []
    assert run_all(tmp_path / "r.json", NODES, 3, runner, said.append) == 0
    assert runner.ran == [NAMES[0], NAMES[4]]
    assert load(tmp_path / "r.json")["skipped"] == {}


def test_another_machine_is_not_mixed_in(tmp_path, runner, make_result, make_case):
    run_all(tmp_path / "r.json", NODES[:2], 2, runner, lambda text: None)
    other = make_result({NAMES[2]: make_case(best_eager=1.0)}, processor="another")
    with pytest.raises(ResultError, match="processor"):
        run_all(tmp_path / "r.json", NODES, 2, lambda piece: (other, {}, []), lambda text: None)
    assert sorted(load(tmp_path / "r.json")["cases"]) == NAMES[:2]


def test_outcomes_are_read_from_junit(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase name="test_a[1]"/><testcase name="test_a[2]">'
        '<skipped message="why"/></testcase>'
        '<testcase name="test_a[3]"><failure message="x"/></testcase><testcase name="test_a[4]"><error/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    assert outcomes(path) == ({"test_a[2]": "why"}, ["test_a[3]", "test_a[4]"])


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
    benchmark.extra_info.update(operator="{name}", threads=1, fused_median_us=1.0, paired_ratio_eager=2.0)
    benchmark.pedantic(int)
    assert ("{name}", i) != ("b", 2)
"""


def test_a_real_run_is_killed_and_goes_on(tmp_path):
    """pytest itself on small benchmarks; the process group is killed as soon as the first piece is in the file."""
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(_BENCHMARK.format(name=name), encoding="utf-8")
    code = "import sys; from pathlib import Path; from benchmarks import matrix; matrix.ROOT = Path.cwd(); "
    code += "sys.exit(matrix.main(['--output', 'r.json', '--folder', '.', '--piece', '3']))"
    # Other plugins than the one that is needed would only take their time at every start of pytest.
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p pytest_benchmark.plugin"}
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist, as this process may be one.
    around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST_")}
    options = {"cwd": tmp_path, "env": around | plugins | {"PYTHONPATH": str(ROOT)}}
    output = tmp_path / "r.json"

    process = subprocess.Popen(
        [sys.executable, "-c", code],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **options,
    )
    deadline = time.monotonic() + 60
    while not output.is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    before = set(load(output)["cases"])
    assert before and len(before) < 5
    (tmp_path / "ran.txt").unlink()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 1, done.stderr  # the one that fails
    assert f"6 cases, {len(before)} done before" in done.stdout
    assert "FAILED: test_b[2]" in done.stdout
    ran = (tmp_path / "ran.txt").read_text(encoding="utf-8").split()
    everything = {f"test_{name}[{i}]" for name in "ab" for i in range(3)}
    assert sorted(ran) == sorted(everything - before)
    assert set(load(output)["cases"]) == everything - {"test_b[2]"}
