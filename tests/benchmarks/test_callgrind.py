"""benchmarks/callgrind.py: counts that repeat, a file that is whole, and one line where nothing can be counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import callgrind


def test_without_valgrind_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(callgrind.shutil, "which", lambda *_, **__: None)
    assert callgrind.main(["--only", "kernels"]) == 1
    assert capsys.readouterr().err == "callgrind: valgrind is not installed\n"


def test_result_is_written_and_shown(monkeypatch, capsys, tmp_path: Path):
    result = {
        "format": 1,
        "notes": ["a note"],
        "kernels": {"scalar": {"empty": 3.0, "gate": 1234.5}},
        "calls": {"cases": {"gate": {"count": {"fused": 100.0, "naive": 450.0, "eager": 300.0}}}},
    }
    monkeypatch.setattr(callgrind, "count", lambda *_: result)
    file = tmp_path / "new" / "counts.json"
    assert callgrind.main(["--output", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8")) == result
    assert [path.name for path in file.parent.iterdir()] == ["counts.json"]
    shown = capsys.readouterr().out
    assert "1,234" in shown and "3.00" in shown and "a note" in shown


@pytest.mark.slow
def test_counts_of_two_runs_agree(tmp_path: Path):
    """Within 1 %, as the module promises; and the cases are those that the driver has."""
    for name in ("valgrind", "cmake", "ninja"):
        try:
            callgrind.tool(name)
        except callgrind.CountError as error:
            pytest.skip(str(error))
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    first, second = (callgrind.count(20, "kernels", tmp_path) for _ in range(2))
    assert first["kernels"].keys() == second["kernels"].keys()
    for isa, counts in first["kernels"].items():
        assert counts["empty"] < 20
        for case, value in counts.items():
            assert second["kernels"][isa][case] == pytest.approx(value, rel=0.01), f"{isa} {case}"
    for isa in first["kernels"].keys() - {"scalar"}:  # what valgrind shows are vectors indeed
        assert first["kernels"][isa]["ensemble-4-64-100"] < 0.5 * first["kernels"]["scalar"]["ensemble-4-64-100"]
