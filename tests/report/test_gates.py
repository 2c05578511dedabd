"""The report's section on stopping early: what gates.json says is what the page shows, and what is weaker is said."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from made_gates import make_bench, make_examples, make_gates, spread
from page_reader import read

from aep_ext._io import write_arrays
from aep_ext.report import UserError, figures, gates_text, write_report
from aep_ext.report import write as writing
from aep_ext.report.gates_figures import cost_curve, exits_by_class
from aep_ext.report.gates_file import check_gates
from aep_ext.report.gates_page import gates_section
from aep_ext.report.gates_tables import bench_rows, calibration_rows, gate_rows, gates_rows
from aep_ext.report.gates_words import budget_words, gates_headlines, weaknesses

EVIL = "<script>alert('x')</script> & \"$\\bad$\" -->"
GATE_FIGURES = {"gates-cost.png", "gates-classes.png", "gates-examples.png"}


def put(folder: Path, gates: Any, *, examples: bool = True, bench: Any = None) -> Path:
    (folder / "gates.json").write_text(json.dumps(gates))
    if examples:
        write_arrays(folder / "gates_examples.npz", images=make_examples(gates, side=8))
    if bench is not None:
        (folder / "bench.json").write_text(json.dumps(bench))
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's other figures, which take the most time to draw, are left empty."""
    empty = b"\x89PNG", '<svg role="img" aria-label="nothing"></svg>'
    monkeypatch.setattr(writing, "draw", lambda results: dict.fromkeys(figures.FIGURES, empty))


def evil(gates: dict[str, Any]) -> dict[str, Any]:
    """Markup wherever the file holds free text."""
    gates["data"]["notices"] = [EVIL]
    for entry in gates["static"]:
        entry["name"] = EVIL
    first = next(iter(gates["methods"].values()))["seeds"][0]
    first.update(notice=EVIL, gated=False, guarantee={"text": EVIL})
    gates["settings"] = {"policy": EVIL, "budget": {"kind": EVIL, "points": 1}}
    return gates


@pytest.mark.parametrize(
    "options",
    [
        {"seeds": (0, 1, 2), "families": ("mixed", "descending"), "classes": 21},
        {"static": 0, "matched": None, "exits": (1, 3)},
    ],
)
def test_the_page_gains_a_section(folder: Path, plain: None, options: dict[str, Any]) -> None:
    gates = evil(make_gates(images=300, **options))
    path = write_report(put(folder, gates, bench=make_bench((1, 64))))
    text, reader = read(path)
    assert reader.open == [] and "stopping-early" in reader.ids and len(reader.ids) == len(set(reader.ids))
    assert reader.tags.count("svg") == 6 and text.count("aria-label=") == 6
    assert {file.name for file in (folder / "figures").iterdir()} >= GATE_FIGURES
    assert "<script" not in text and EVIL in reader.text
    assert "http://" not in text and "https://" not in text and {"script", "img", "iframe"}.isdisjoint(reader.tags)
    for reference in reader.references:
        assert reference.startswith("data:image/png;base64,") or reference[1:] in reader.ids
    for family in gates["methods"]:
        for row in gates_rows(gates, family)[0]:
            assert all(cell in reader.text for cell in row)


def test_without_the_file_nothing_changes(folder: Path, plain: None) -> None:
    text, reader = read(write_report(folder))
    assert "Stopping early" not in text and reader.tags.count("svg") == 3
    assert not {file.name for file in (folder / "figures").iterdir()} & GATE_FIGURES


def test_examples_and_measurements_are_optional(folder: Path, plain: None) -> None:
    text, reader = read(write_report(put(folder, make_gates(images=300), examples=False)))
    assert reader.tags.count("svg") == 5 and "Examples" not in text and "Latency and throughput" not in text


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?\d[\d,]*\.?\d*", text)]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_numbers_shown_are_those_of_the_file(seeds: tuple[int, ...]) -> None:
    gates = make_gates(seeds=seeds)
    rows, marked = gates_rows(gates, "mixed")
    summary = gates["methods"]["mixed"]["summary"]
    assert [row[0] for row in rows] == [
        "MIX, gated",
        "MIX, pruned",
        "MIX, all exits",
        "baseline (single exit)",
        "resnet_small at width 0.5",
        "resnet_small at width 0.75 (matches)",
    ]
    assert marked == [0] and rows[0][1] == "1+2+4" and rows[1][1] == "4"
    for row, top1 in zip(rows, (summary["gated_top1"], summary["pruned_top1"]), strict=False):
        shown = numbers(row[2])
        assert shown[0] == pytest.approx(100 * top1["mean"], abs=0.005) and len(shown) == (1 if len(seeds) == 1 else 2)
        if len(seeds) > 1:
            assert shown[1] == pytest.approx(100 * top1["std"], abs=0.005)
    macs = [summary["mean_macs"]["mean"], 40e6, 40.2e6, 39.9e6, 11e6, 22e6]
    for row, expected in zip(rows, macs, strict=True):
        assert row[3].endswith(" M") and 1e6 * numbers(row[3])[0] == pytest.approx(expected, rel=5e-3)
    assert numbers(rows[0][4])[0] == pytest.approx(100 * summary["saving"]["mean"], abs=0.05)
    assert [row[4] for row in rows[2:]] == ["-0.5 %", "0.2 %", "72.5 %", "45.0 %"]
    drop = summary["drop_points"]
    assert numbers(rows[0][5]) == pytest.approx([drop["mean"], *drop["interval"]], abs=0.005)


def test_tables_of_gates_calibration_and_measurements() -> None:
    method = make_gates(seeds=(0, 1))["methods"]["mixed"]
    method["seeds"][0]["enabled"][1] = False
    method["seeds"][1]["calibration"][0]["converged"] = False
    method["seeds"][1]["calibration"][0]["after"]["auroc"] = None
    rows = gate_rows(method)
    assert len(rows) == 6 and [row[2] for row in rows[:3]] == ["0.91", "off", "all the others"]
    first = method["seeds"][0]["right_by_exit"][0]
    assert numbers(rows[0][4])[0] == first[0] and numbers(rows[0][5])[0] == pytest.approx(
        100 * first[1] / first[0], abs=0.005
    )
    shown = calibration_rows(method)
    assert len(shown) == 6 and shown[3][2] == "1.210 (not converged)" and shown[3][-1] == "-"
    assert numbers(" ".join(shown[0][3:])) == pytest.approx([0.064, 0.021, 0.41, 0.38, 0.19, 0.18, 0.861, 0.861])
    bench = make_bench((1, 64))
    bench["rows"][1]["share_of_predicted_saving"] = None
    lines = bench_rows(bench)
    assert [line[0] for line in lines] == ["1", "", "64", ""] and lines[3][-1] == "-"
    row = bench["rows"][0]
    assert numbers(lines[1][6]) == pytest.approx([row["ratio"], *row["ratio_interval"]], abs=5e-4)
    assert numbers(lines[0][2])[0] == pytest.approx(row["ungated"]["p50_ms"], rel=1e-3)


def test_bars_hold_the_counts_of_the_file() -> None:
    method = make_gates(seeds=(0, 1), classes=30, images=900)["methods"]["mixed"]
    rows, used = exits_by_class(method, [f"c{k}" for k in range(29)])
    assert used == [0, 1, 3] and len(rows) == 21 and rows[0]["name"] == "all classes"
    assert any(row["name"] == "class 29" for row in rows)
    assert rows[11]["place"] - rows[10]["place"] == 2.0
    assert [row["cost"] for row in rows[1:]] == sorted(row["cost"] for row in rows[1:])
    for row in rows[1:]:
        number = int(row["name"].removeprefix("class ").removeprefix("c"))
        counts = np.sum([seed["per_class"][number] for seed in method["seeds"]], axis=0)
        assert [row["shares"][e] for e in used] == pytest.approx(counts / counts.sum())
    few, _ = exits_by_class(make_gates()["methods"]["mixed"], ["a"] * 10)
    assert len(few) == 11


def test_labels_of_the_curve_do_not_overlap() -> None:
    figure = cost_curve(make_gates(seeds=(0, 1, 2), families=("mixed", "descending")))
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.texts]
        assert len(boxes) == 6  # four exits, two static networks
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def change(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Puts a value at a place like ``data.shared``; a number is an index; ``None`` as a value of ``del`` removes."""
    *way, last = [int(part) if part.isdigit() else part for part in place.split(".")]

    def apply(gates: dict[str, Any]) -> None:
        for part in way:
            gates = gates[part]
        if value is KeyError:
            del gates[last]  # type: ignore[arg-type]
        else:
            gates[last] = value  # type: ignore[index]

    return apply


SEED = "methods.mixed.seeds.0"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("format", "other", "is not a file of gates"),
        ("version", 2, "version must be 1, the one this version of aep_ext reads, got 2"),
        ("methods", {}, "methods must be an object with at least one entry, got {}"),
        ("methods.mixed.seeds", [], "methods.mixed.seeds must be a list with at least one entry"),
        ("data.shared", "no", "data.shared must be true or false, got 'no'"),
        ("settings.budget", KeyError, "is not complete: settings.budget is missing"),
        (f"{SEED}.report.gated.top1", 93.5, r"seeds\[0\].report.gated.top1 must be a number within 0..1, got 93.5"),
        (f"{SEED}.report.drop_interval", [1, 0], r"drop_interval must be \[low, high\] with low <= high"),
        (f"{SEED}.report.drop_points", 0.2, "drop_points must be -0.2, the points of top-1 of gated minus pruned"),
        (f"{SEED}.thresholds", [0.5], "thresholds must be 2 entries for 3 gated exits"),
        (f"{SEED}.report.gated.exit_counts", [1, 2, 3], "3 counts that add up to the 2000 test images"),
        (f"{SEED}.per_class.3", [1], r"per_class\[3\] must be 3 counts"),
        (f"{SEED}.per_class.3", [0, 0, 0], "per_class must be counts that add up to"),
        (f"{SEED}.right_by_exit.1", [3, 4], r"right_by_exit\[1\] must be \[images, right ones among them\]"),
        ("methods.mixed.summary.saving.values", [1, 2], "saving.values must be 1 numbers, one a seed"),
        ("methods.mixed.matched", 7, "methods.mixed.matched must be null or the index of one of the 2 static"),
        ("delivered.seed", 9, "delivered must be one of the seeds of one of the methods"),
    ],
)
def test_broken_files(folder: Path, place: str, value: Any, message: str) -> None:
    gates = make_gates()
    put(folder, gates)
    change(place, value)(gates)
    (folder / "gates.json").write_text(json.dumps(gates))
    with pytest.raises(UserError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists() and not (folder / "figures").exists()


def test_every_entry_that_is_needed_is_asked_for() -> None:
    """Whatever is cut out, the outcome is a section or a UserError, never another exception."""
    whole = make_gates(images=300)

    def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if not isinstance(value, dict):
            return [place for place in places(value[0], (*way, 0))] if isinstance(value, list) and value else []
        return [place for key in value for place in [(*way, key), *places(value[key], (*way, key))]]

    kept = []
    for way in places(whole):
        gates = copy.deepcopy(whole)
        part: Any = gates
        for key in way[:-1]:
            part = part[key]
        del part[way[-1]]
        try:
            check_gates(gates)
        except UserError:
            continue
        made = gates_section(gates, None, dict.fromkeys(("gates-cost", "gates-classes"), ""))
        assert "MIX, gated" in made and "MIX, gated" in gates_text(gates), way
        kept.append(".".join(map(str, way)))
    assert "delivered" in kept and f"{SEED}.curve" not in kept


def test_broken_neighbours(folder: Path) -> None:
    gates = make_gates(images=300)
    put(folder, gates, bench={"format": "other"})
    with pytest.raises(UserError, match="bench.json is not a file of measurements"):
        write_report(folder)
    put(folder, gates, bench={**make_bench(), "rows": [{"batch": 1}]})
    with pytest.raises(UserError, match=r"bench.json is not complete: rows\[0\].ungated is missing"):
        write_report(folder)
    (folder / "bench.json").unlink()
    (folder / "gates_examples.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="is not an archive with an array 'images'"):
        write_report(folder)
    write_arrays(folder / "gates_examples.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"uint8 of shape \(16, H, W, 1 or 3\).*got uint8 of shape \(3, 8, 8, 3\)"):
        write_report(folder)


def test_a_run_where_nothing_is_gated(folder: Path, plain: None, results: dict[str, Any]) -> None:
    gates = make_gates(images=300, exits=(3,), matched=None)
    seed = gates["methods"]["mixed"]["seeds"][0]
    seed.update(gated=False, notice="nothing keeps the budget", curve=[])
    seed["examples"]["first"] = []
    gates["delivered"] = None
    results["delivered"] = {"seed": 0, "exit_weights": "mixed", "exits": [3]}
    (folder / "results.json").write_text(json.dumps(results))
    _, reader = read(write_report(put(folder, gates)))
    assert "MIX: nothing is gated, the pruned ensemble stays as it is." in reader.text
    assert "seed 0 is not gated: nothing keeps the budget." in reader.text


WEAKER: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (change("data.shared", True), "Roles are shared: images that the gate was chosen on are also reported on"),
    (change("data.judged", 3), "The test images were judged 3 times"),
    (change("methods.mixed.summary.saving", spread([0.001] * 2)), "MIX: nothing is saved: 0.1 % of its"),
    (change("methods.mixed.summary.saving", spread([-0.1] * 2)), "costs more than the pruned ensemble: -10.0 %"),
    (
        change("methods.mixed.summary.drop_points", {"mean": -0.3, "interval": [-0.7, 0.1]}),
        "the budget of 0.5 points is kept on average (-0.30) but not confirmed: the interval of the difference reaches "
        "-0.70 points",
    ),
    (
        change("methods.mixed.summary.drop_points", {"mean": -0.6, "interval": [-0.7, -0.5]}),
        "the budget of 0.5 points is exceeded on the test images: -0.60 points",
    ),
    (change("methods.mixed.matched", None), "MIX: no static network that was trained is as accurate as the gated one"),
    (change("static.1.macs", 1_000_000), "a static network of at least the same accuracy is no dearer"),
    (change("static", []), "No smaller static network was trained"),
    (change(f"{SEED}.report.baseline.top1", 1.0), "points below the single-exit baseline"),
    (change(f"{SEED}.agreement.differing_elsewhere", 4), "differ on 4 images that are near no threshold"),
    (change(f"{SEED}.calibration.0.converged", False), "the temperature fit did not converge at exit 1"),
    (change(f"{SEED}.calibration.2.after.ece", 0.5), "seed 0: the temperature made the ECE worse up to exit 4"),
    (change(f"{SEED}.calibration.2.after.auroc", 0.5), "made the failure AUROC worse up to exit 4"),
]


@pytest.mark.parametrize(("weaken", "said"), WEAKER)
def test_what_is_weaker_is_said(weaken: Callable[[dict[str, Any]], None], said: str) -> None:
    gates = make_gates(seeds=(0, 1))
    assert weaknesses(gates, make_bench()) == []
    weaken(gates)
    if not gates["static"]:
        gates["methods"]["mixed"]["matched"] = gates["matched"] = None
    assert any(said in line for line in weaknesses(gates)) and said in gates_text(gates)


def test_what_is_weaker_in_measurements_and_rivals() -> None:
    gates = make_gates(seeds=(0, 1))
    for seed in gates["methods"]["mixed"]["seeds"]:
        seed["report"]["each_exit"][0]["top1"] = 0.999
    assert "MIX: exit 1 alone is as accurate (99.90 %) and needs 9 M" in weaknesses(gates)[0]
    bench = make_bench()
    bench["rows"][0].update(ratio=1.01, ratio_interval=[0.99, 1.03], share_of_predicted_saving=0.4)
    bench["rows"][1].update(ratio=0.9, ratio_interval=[0.88, 0.92])
    assert weaknesses(make_gates(seeds=(0, 1)), bench) == [
        "Measured at batch 1, no gain is shown: the interval of the ratio, [0.990, 1.030], holds 1.",
        "Measured at batch 1, 40 % of the predicted saving is there, less than 90 %.",
        "Measured at batch 8, the gated network is slower than the ungated one: ratio 0.900.",
    ]
    assert "one seed only" in weaknesses(make_gates())[0]


def test_words() -> None:
    gates = make_gates(seeds=(0, 1, 2))
    gates["methods"]["mixed"]["seeds"][1].update(gated=False, notice="")
    saving = 100 * gates["methods"]["mixed"]["summary"]["saving"]["mean"]
    (line,) = gates_headlines(gates)
    assert line.startswith("MIX, stopping early (in 2 of 3 seeds), reaches ")
    assert f"with {saving:.1f} % fewer multiply-adds on average" in line
    text = gates_text(gates)
    assert "differ on 0 of 6,000 answers to test images of 3 seeds; 9 are within 1e-05 of a threshold" in text
    assert "1,000 for the temperatures, 4,000 for the exits and thresholds, 2,000 to report on, judged once" in text
    assert "Policy: confidence of the ensemble of the exits so far. Budget: at most 0.5 points" in text
    assert budget_words({"kind": "risk", "epsilon": 0.01, "delta": 0.1}) == (
        "a loss of top-1 of at most 1 points against the pruned ensemble with probability 0.9"
    )
    assert budget_words({"kind": "cost", "mean": 2e6}) == "at most 2 M multiply-adds on average"
    assert budget_words({"kind": "cost", "fraction": 0.5}) == "at most 50.0 % of the multiply-adds on average"
    assert budget_words({"kind": "own", "size": 3}) == "own, size 3"
