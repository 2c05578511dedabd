"""Tables and sentences say what the results say."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("jsonschema", reason="the report needs the extra [train]")

from made_results import make_results

from aep_ext.report import bench_markdown, gates_markdown, numbers, results_markdown, summary, tables, text_table


def found(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (77_800, "77.8 k"),
        (3_971_424, "3.97 M"),
        (999_900, "1000 k"),
        (4e9, "4 G"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert numbers.amount(value) == text


def test_numbers() -> None:
    assert numbers.exits((0, 2)) == "1+3"
    assert numbers.exits_of_seeds([[0], [0]]) == "1" and numbers.exits_of_seeds([[0], [1, 2]]) == "1, 2+3"
    assert numbers.relative(75, 100) == "-25 %" and numbers.relative(1, 0) == ""
    assert numbers.method_name("mixed") == "MIX" and numbers.method_name("learned") == "learned"
    assert numbers.percent_spread({"mean": 0.5, "std": None}) == "50.00 %"
    assert numbers.decimal(None) == "" and numbers.decimal(0.5) == "0.500"


def test_outcome() -> None:
    results = make_results()
    table = tables.outcome_table(results)
    assert [row[0] for row in table.rows] == [
        "baseline (single exit)",
        "MIX, all exits",
        "MIX, pruned",
        "MIX, smallest within 0.5 pt",
        "MIX, gated",
        "half width",
    ]
    assert table.marked == {4} and table.left == 2
    kinds = results["summary"]["methods"]["mixed"]
    for row, model in zip(
        table.rows[1:5], (kinds[kind] for kind in ("full", "pruned", "smallest", "gated")), strict=True
    ):
        cells = dict(zip(table.head, row, strict=True))
        assert found(cells["test top-1"])[0] == pytest.approx(100 * model["top1"]["mean"], abs=0.005)
        difference = [100 * model["non_inferiority"][name] for name in ("difference", "low", "high")]
        assert found(cells["vs baseline, points"]) == pytest.approx(difference, abs=0.005)
        macs, change = found(cells["multiply-adds"])
        assert 1e6 * macs == pytest.approx(model["macs"]["mean"], rel=5e-3)
        assert change == pytest.approx(100 * (model["macs"]["mean"] / 16e6 - 1), abs=0.5)
    assert table.rows[2][1] == "4, 2+4" and dict(zip(table.head, table.rows[4], strict=True))[
        "latency, ms (ratio)"
    ] == ("0.5 (0.80)")


def test_what_is_not_known_leaves_no_column() -> None:
    results = make_results(seeds=(0,))
    for model in [results["summary"]["baseline"], *results["summary"]["methods"]["mixed"].values()]:
        if isinstance(model, dict) and "top1" in model:
            model.update(top5=None, latency=None, non_inferiority=None)
    head = tables.outcome_table(results).head
    assert list(head) == ["model", "exits", "test top-1", "multiply-adds", "parameters"]


def test_gates() -> None:
    results = make_results()
    gated = results["seeds"][1]["methods"]["mixed"]["gated"]
    row = tables.gates_table(results, "mixed").rows[1]
    assert row[:2] == ["1", "2+3+4"] and found(row[2]) == pytest.approx(
        [count / 10 for count in gated["test"]["exit_counts"]], abs=0.5
    )
    assert found(row[-1]) == pytest.approx([-0.2, -0.8, 0.4])  # a loss of 0.2 points is a difference of -0.2
    gated["policy"]["enabled"][0] = False
    rows = tables.policy_table(results, "mixed").rows[3:]
    assert [row[2] for row in rows] == ["off", "0.7000", "answers the rest"]
    count, right = gated["right_by_exit"][0]
    assert found(rows[0][6])[0] == count and found(rows[0][7])[0] == pytest.approx(100 * right / count, abs=0.005)


def test_bench() -> None:
    results = make_results()
    table = tables.bench_table(results)
    assert [row[0] for row in table.rows] == ["1", "", "64", ""]
    first, last = (dict(zip(table.head, table.rows[index], strict=True)) for index in (1, 3))
    assert found(first["ratio"]) == pytest.approx([1.4, 1.38, 1.42]) and first["share of saving"] == "70 %"
    assert last["predicted"] == "gates shut" and last["share of saving"] == ""
    assert "eager, 1 thread; 512 test images; torch 2. Ratio:" in bench_markdown(results)
    results["bench"] = None
    assert "was not timed" in bench_markdown(results)


def test_texts_and_documents() -> None:
    results = make_results()
    lines = text_table(results).splitlines()
    assert lines[0].startswith("model") and set(lines[1]) == {"-"} and len(lines[:2]) + 6 == lines.index("")
    written = results_markdown(results)
    assert written.startswith("| model | exits | test top-1 |") and written.splitlines()[1].startswith(
        "| --- | --- | ---: |"
    )
    assert written.count("\n| ") == 7 and summary.headline(results) in written
    gates = gates_markdown(results)
    assert "differ on 0 of 2,000 answers; 2 lie at a threshold; one image at a time 0 of 512 differ" in gates
    assert "Budget: at most 0.5 points of top-1 below the single-exit network. Calibrated on 500 validation" in gates
    assert "This run has no gates" in gates_markdown(make_results(gates=False))
    piped = tables.Table(("a",), [("x|y",)]).markdown()
    assert r"x\|y" in piped


def test_headline() -> None:
    results = make_results()
    gated = results["summary"]["methods"]["mixed"]["gated"]
    text = summary.headline(results)
    assert text.startswith("Delivered: MIX, gated (seed 0, exits 2+3+4): ")
    assert numbers.percent_spread(gated["top1"]) in text and "latency -20 %." in text
    assert f"multiply-adds {round(100 * (gated['macs']['mean'] / 16e6 - 1)):+d} %" in text
    assert summary.headline(make_results(gates=False)).startswith("Delivered: MIX, pruned (seed 0, exits 4): ")


def test_the_interval_of_the_calibration_is_said() -> None:
    line = "Cross-validation on 500 images expected -0.20 points against the single-exit network "
    assert f"{line}(95 % interval -0.80 to +0.40).\n" in tables.text_table(make_results())
    assert "expected" not in tables.text_table(make_results(gates=False))


def weaken(place: str, value: Any) -> dict[str, Any]:
    results = make_results()
    gated = results["summary"]["methods"]["mixed"]["gated"]
    gated["non_inferiority"].update(difference=0.0, low=-0.001, high=0.001, non_inferior=True)
    assert summary.caveats(results) == []
    entry: Any = results
    *way, last = place.split(".")
    for part in way:
        entry = entry[int(part) if part.isdigit() else part]
    entry.update({last: value}) if not isinstance(value, dict) else entry[last].update(value)
    return results


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("test_looks", 3, "The test images were looked at 3 times"),
        ("notices", ["few images"], "Few images"),
        ("delivered.notice", "nothing qualified", "Nothing qualified"),
        (
            "summary.methods.mixed.gated.non_inferiority",
            {"difference": -0.003, "low": -0.008, "high": 0.002, "non_inferior": False},
            "is not shown to be inside the margin of 0.5 points: -0.30 [-0.80, +0.20].",
        ),
        (
            "summary.methods.mixed.gated.non_inferiority",
            {"difference": -0.01, "low": -0.012, "high": -0.008, "non_inferior": False},
            "is worse than the margin of 0.5 points: -1.00",
        ),
        (
            "seeds.1.methods.mixed.gated.agreement.differing_elsewhere",
            4,
            "seed 1: live network and simulator differ on 4",
        ),
        ("seeds.0.methods.mixed.gated.calibration.guarantee", {}, None),
        (
            "seeds.0.methods.mixed.gated",
            {"feasible": False, "notice": "no subset keeps it"},
            "seed 0: no subset keeps it",
        ),
    ],
)
def test_what_a_reader_must_not_overlook(place: str, value: Any, said: str | None) -> None:
    if said is None:
        results = make_results()
        results["seeds"][0]["methods"]["mixed"]["gated"]["calibration"]["guarantee"] = {"text": "holds with 90 %"}
        assert any("MIX, seed 0: holds with 90 %" in line for line in summary.caveats(results))
        return
    results = weaken(place, value)
    assert any(said in line for line in summary.caveats(results)) and said in text_table(results)


def test_one_seed_is_said() -> None:
    assert summary.caveats(make_results(seeds=(0,)))[0] == "One seed only: the spread over trainings is not known."


def test_budgets() -> None:
    assert summary.budget_words({"kind": "risk", "epsilon": 0.01, "delta": 0.1}, "pruned") == (
        "at most 1 points of top-1 below the pruned network with probability 0.9"
    )
    assert summary.budget_words({"kind": "cost", "fraction": 0.5}, "ensemble") == "cost, fraction 0.5"
