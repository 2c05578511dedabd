"""benchmarks/compare.py: slower is what fell by more than the threshold and both spreads."""

from __future__ import annotations

import pytest

from benchmarks.compare import main
from benchmarks.condense import save


@pytest.fixture
def run(tmp_path, make_case, make_result, capsys):
    """``run(old case, new case, *options)``: exit status and what was printed."""

    def go(old: dict, new: dict | None, *options: str, **machine: object) -> tuple[int, str]:
        save(tmp_path / "old.json", make_result({"case": old}))
        save(tmp_path / "new.json", make_result({} if new is None else {"case": new}, **machine))
        status = main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        output = capsys.readouterr()
        return status, output.out + output.err

    return go


def test_a_fall_beyond_the_spread_is_slower(run, make_case):
    status, text = run(make_case(best_eager=4.0), make_case(best_eager=3.0))
    assert status == 1
    assert "SLOWER  case  against best_eager: 4 -> 3 (x 0.75" in text


def test_a_fall_inside_the_spread_is_not(run, make_case):
    status, text = run(make_case(best_eager=4.0, spread=1.5), make_case(best_eager=3.0, spread=1.0))
    assert (status, text.strip()) == (0, "1 of 1 cases unchanged")


def test_a_fall_inside_the_threshold_is_not(run, make_case):
    old, new = make_case(best_eager=4.0, spread=0.0), make_case(best_eager=3.0, spread=0.0)
    assert run(old, new, "--threshold", "0.3")[0] == 0
    assert run(old, new, "--threshold", "0.2")[0] == 1


def test_faster_is_no_failure(run, make_case):
    status, text = run(make_case(best_eager=3.0), make_case(best_eager=4.0))
    assert status == 0
    assert text.startswith("faster  case")


def test_a_case_that_is_gone_is_one(run, make_case):
    status, text = run(make_case(best_eager=3.0), None)
    assert status == 1
    assert "GONE    case" in text


def test_the_rival_is_one_that_both_have(run, make_case):
    old, new = make_case(best_eager=3.0, inductor=2.0), make_case(inductor=1.0)
    assert "against inductor: 2 -> 1" in run(old, new)[1]
    new = make_case(best_eager=3.0, inductor=1.0)
    assert run(old, new)[0] == 0
    assert run(old, new, "--rival", "inductor")[0] == 1


def test_another_machine_is_refused_unless_asked_for(run, make_case):
    case = make_case(best_eager=3.0)
    status, text = run(case, case, processor="another")
    assert status == 2
    assert "processor: 'made up', 'another'" in text
    assert run(case, case, "--anyway", processor="another")[0] == 0
    assert run(case, case, version="0.2")[0] == 0  # what one wants to compare


def test_other_threads_are_refused_unless_asked_for(run, make_case):
    old, new = make_case(best_eager=3.0), make_case(best_eager=3.0, threads=2)
    status, text = run(old, new)
    assert status == 2
    assert "case: 1 and 2 threads" in text
    assert run(old, new, "--anyway")[0] == 0
