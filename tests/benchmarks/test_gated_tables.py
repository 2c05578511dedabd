"""The tables of gated networks: made of the files, and refused where the files are not what they should be."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="aep_ext.report needs the extra [train]")

from made_gates import make_bench, make_gates

from benchmarks import gated_tables, keep, report
from benchmarks.condense import ResultError, save
from benchmarks.gated_tables import made, unexplained


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes ``NAME.json`` into a folder that stands for benchmarks/results."""
    for module in (report, keep):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def write(name: str, content: Any):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    return write


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def make_peer() -> dict[str, Any]:
    """What benchmarks/peers/earlyon.py writes."""

    def spread(mean: float) -> dict[str, Any]:
        return {"mean": mean, "std": 0.004, "values": [mean, mean]}

    def figures(top1: float, ungated: float, macs: float) -> dict[str, Any]:
        values = {"top1": top1, "ungated_top1": ungated, "mean_macs": macs, "ungated_macs": 16e6}
        return {name: spread(value) for name, value in values.items()}

    def row(batch: int, theirs: str, whole: dict[str, float] | None) -> dict[str, Any]:
        times = {"p50_ms": 2.0 * batch, "p95_ms": 3.0 * batch, "p99_ms": 4.0 * batch, "images_per_s": 480.0}
        ratio = {"ratio": 1.25, "interval": [1.2, 1.31]}
        return {
            "batch": batch,
            "times": {"aep_ext": times, "ensemble": times, theirs: times},
            "ratios": {"ensemble": ratio, theirs: ratio},
            "quickest_earlyon": theirs,
            "earlyon_batched": whole,
        }

    return {
        "format": "aep_ext.peer",
        "version": 1,
        "peer": {"name": "earlyon", "version": "9.9"},
        "environment": {"torch": "2", "threads": 1},
        "network": "resnet_small",
        "exits": [0, 1],
        "exit_weights": "mixed",
        "drop_points": 0.5,
        "summary": {"aep_ext": figures(0.70, 0.71, 12e6), "earlyon": figures(0.69, 0.72, 8e6)},
        "seeds": [{"seed": 0}, {"seed": 1}],
        "timed": {
            "seed": 0,
            "samples": 64,
            "engine": None,
            "rows": [row(1, "earlyon_staged", None), row(64, "earlyon_batched", {"top1": 0.66, "mean_macs": 9e6})],
        },
    }


def make_overhead(make_case, make_result, *, met: bool = False) -> dict[str, Any]:
    """What benchmarks/matrix.py writes of benchmarks/test_gated.py."""
    about = {"network": "resnet50", "pixels": 224, "batch": 1, "engine": "eager"}
    nobody = make_case("gated_nobody_leaves", ungated=0.98)
    nobody["more"] = {**about, "overhead_percent": 2.041, "overhead_interval": [1.5, None]}
    nobody["more"] |= {"goal_percent": 1.0, "goal_met": met}
    half = make_case("gated_half_leave_at_the_first_exit", spread=0.2, ungated=1.5, mask=1.25)
    half["more"] = {**about, "batch": 64}
    return make_result({"a": half, "b": nobody, "c": make_case("gate", best_eager=2.0)})


def test_gates(put):
    found = make_gates(seeds=(0, 1, 2), budget=0.5)
    text = made("gates", put("run", found))
    rows = rows_of(text)
    summary = found["methods"]["mixed"]["summary"]
    assert [row[0] for row in rows[2:]] == [
        "MIX, gated",
        "MIX, pruned",
        "MIX, all exits",
        "baseline (single exit)",
        "resnet_small at width 0.5",
        "resnet_small at width 0.75 (matches)",
    ]
    assert len({len(row) for row in rows}) == 1
    assert rows[2][2].startswith(f"{100 * summary['gated_top1']['mean']:.2f} ± ")
    assert rows[2][4].startswith(f"{100 * summary['saving']['mean']:.1f} ± ")
    assert "judged once" in text and "thresholds were chosen by cross-validation" in text
    assert "differ on 0 of 6,000 answers" in text


@pytest.mark.parametrize(
    "mean, interval, words",
    [
        (-0.2, [-0.4, 0.0], "-0.20 points, keeps the budget of 0.5."),
        (-0.4, [-0.6, -0.2], "keeps the budget of 0.5; its interval [-0.60, -0.20] leaves that open."),
        (-0.6, [-0.8, -0.4], "**exceeds** the budget of 0.5; its interval [-0.80, -0.40] leaves that open."),
        (-0.9, [-1.1, -0.7], "-0.90 points, **exceeds** the budget of 0.5."),
    ],
)
def test_the_budget_is_judged_by_the_test_images(put, mean, interval, words):
    found = make_gates()
    found["methods"]["mixed"]["summary"]["drop_points"].update(mean=mean, interval=interval)
    assert words in made("gates", put("run", found))


def test_what_speaks_against_a_gate_is_said(put):
    found = make_gates(matched=None)
    found["data"] |= {"shared": True, "judged": 3}
    found["methods"]["mixed"]["seeds"][0]["gated"] = False
    text = made("gates", put("run", found))
    assert "judged 3 times" in text and "figures are optimistic" in text
    assert "the pruned ensemble stays: seed 0" in text and "none matches it" in text


def test_bench(put):
    found = make_bench((1, 64)) | {"notices": ["stage times are of batch 64"]}
    found["rows"][0] |= {"subset_ratio": 1.111, "subset_ratio_interval": [1.1, 1.2]}
    text = made("bench", put("run-bench", found))
    rows = rows_of(text)
    assert [row[:2] for row in rows[2:]] == [["1", "ungated"], ["", "gated"], ["64", "ungated"], ["", "gated"]]
    assert rows[3][6] == "1.520 [1.500, 1.540]" and rows[3][7] == "1.560" and rows[3][8] == "95 %"
    assert "Engine: eager, 1 thread; 2,048 test images" in text and "Stage times are of batch 64." in text
    assert "1.111 [1.100, 1.200] at batch 1." in text


def test_peer(put):
    text = made("peer", put("peer", make_peer()))
    rows = rows_of(text)
    assert rows[2] == ["aep_ext, gated", "70.00 ± 0.40 %", "71.00 ± 0.40 %", "-1.00", "12 M", "16 M", "25.0 %"]
    assert rows[3][0] == "earlyon" and rows[3][3:] == ["-3.00", "8 M", "16 M", "50.0 %"]
    assert rows[6] == ["1", "aep_ext, gated", "2", "3", "480", ""]
    assert rows[8] == ["1", "earlyon, staged (its quickest)", "2", "3", "480", "1.25 [1.20, 1.31]"]
    assert "earlyon 9.9; resnet_small, exits 1+2, MIX, seeds 0, 1." in text
    assert "at batch 64, seed 0, 66.00 % with 9 M multiply-adds" in text


def test_overhead(put, make_case, make_result, monkeypatch, tmp_path):
    save(tmp_path / "gated.json", make_overhead(make_case, make_result))
    path, key = tmp_path / "gated.json", "gated_nobody_leaves resnet50 eager 1"
    monkeypatch.setattr(gated_tables, "load_notes", dict)
    rows = rows_of(made("overhead", path))
    about = ["nobody leaves", "resnet50", "224", "eager", "1"]
    assert rows[2] == [*about, "+2.04 [+1.50, ?]", "<= 1", "**missed**", "unexplained"]
    notch = 1.57 * 0.2 / math.sqrt(11)
    gain = [f"{ratio:.2f} [{ratio - notch:.2f}, {ratio + notch:.2f}]" for ratio in (1.5, 1.25)]
    assert rows[5] == ["half leave at the first exit", "resnet50", "224", "eager", "64", gain[0], "", gain[1], ""]
    assert unexplained("overhead", path) == [key]
    monkeypatch.setattr(gated_tables, "load_notes", lambda: {key: "the call"})
    assert rows_of(made("overhead", path))[2][-1] == "the call" and unexplained("overhead", path) == []
    save(path, make_overhead(make_case, make_result, met=True))
    assert rows_of(made("overhead", path))[2][-2:] == ["met", ""]


def test_the_tables_know_every_benchmark_of_gated_networks():
    from benchmarks import test_gated

    assert {f"test_{way}" for way in gated_tables._WAYS} == {name for name in vars(test_gated) if name[:5] == "test_"}


def test_an_old_result_of_overhead_is_refused(make_case, make_result, tmp_path):
    result = make_overhead(make_case, make_result)
    del result["cases"]["b"]["more"]["engine"]
    save(tmp_path / "gated.json", result)
    with pytest.raises(ResultError, match="gated_nobody_leaves does not say its engine"):
        made("overhead", tmp_path / "gated.json")


def test_the_markers_in_a_document(put):
    put("run", make_gates())
    text = "a\n<!-- gated: run gates -->\nold\n<!-- /gated -->\nb\n"
    after = report.rendered(text)
    assert re.search(r"a\n<!-- gated: run gates -->\n\| network .*\n<!-- /gated -->\nb\n", after, re.DOTALL)
    assert report.rendered(after) == after and report.unexplained(after) == []
    with pytest.raises(ResultError, match="no such table of gates: nothing; there are gates, bench, peer, overhead"):
        report.rendered(text.replace("run gates", "run nothing"))
    with pytest.raises(ResultError, match=r"other\.json: no such file"):
        report.rendered(text.replace("run", "other"))


@pytest.mark.parametrize("table", list(gated_tables.TABLES))
def test_another_file_is_refused(put, table):
    other = make_bench() if table != "bench" else make_gates()
    with pytest.raises(ResultError, match=r"run\.json"):
        made(table, put("run", other))


@pytest.mark.parametrize("table, content", [("gates", make_gates()), ("bench", make_bench()), ("peer", make_peer())])
def test_an_incomplete_file_is_refused(put, table, content):
    content = {name: value for name, value in content.items() if name not in ("methods", "rows", "timed")}
    with pytest.raises(ResultError, match="methods|rows|timed"):
        made(table, put("run", content))


def test_check_sees_the_gates_and_an_unexplained_miss(put, monkeypatch, tmp_path, make_case, make_result, capsys):
    put("run", make_gates())
    save(tmp_path / "cost.json", make_overhead(make_case, make_result))
    document = tmp_path / "R.md"
    document.write_text("<!-- gated: run gates -->\n<!-- /gated -->\n<!-- gated: cost overhead -->\n<!-- /gated -->\n")
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    monkeypatch.setattr(gated_tables, "load_notes", dict)
    assert report.main(["--check"]) == 1
    said = capsys.readouterr().err
    assert "R.md does not say" in said and "what bounds it: gated_nobody_leaves resnet50 eager 1" in said
    report.main([])
    monkeypatch.setattr(gated_tables, "load_notes", lambda: {"gated_nobody_leaves resnet50 eager 1": "the call"})
    assert report.main([]) == 0 and report.main(["--check"]) == 0


def test_keep(put, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    found = make_gates(seeds=(0, 1, 2))
    for seed in found["methods"]["mixed"]["seeds"]:
        seed |= {"fingerprint": "f" * 64, "choice": {"exits": [0], "candidates": [{}] * 9}}
    (run / "gates.json").write_text(json.dumps(found))
    (run / "bench.json").write_text(json.dumps(make_bench()))
    assert keep.main([str(run), "kept"]) == 0
    kept = json.loads((tmp_path / "kept.json").read_text())
    for before, after in zip(*(part["methods"]["mixed"]["seeds"] for part in (found, kept)), strict=True):
        assert "fingerprint" not in after and after["choice"] == {"exits": [0]}
        assert after["examples"] == {"first": [], "last": []} and len(after["curve"]) == keep.POINTS
        assert [after["curve"][k] for k in (0, -1)] == [before["curve"][k] for k in (0, -1)]
    assert json.loads((tmp_path / "kept-bench.json").read_text()) == make_bench()
    assert (tmp_path / "kept.json").stat().st_size < 60_000
    for table, name in (("gates", "kept"), ("bench", "kept-bench")):
        assert made(table, tmp_path / f"{name}.json")
    assert made("gates", tmp_path / "kept.json") == made("gates", run / "gates.json")


@pytest.mark.parametrize("text", ["/srv/data", "cifar10-jpeg:/x/y.npz", "~/runs/a", "see 'C:\\data'"])
def test_paths_are_not_kept(put, tmp_path, capsys, text):
    found = make_gates()
    found["settings"]["data"] = text
    put("gates", found)
    assert keep.main([str(tmp_path), "kept"]) == 2
    assert "settings.data" in capsys.readouterr().err and not (tmp_path / "kept.json").exists()


def test_a_run_without_gates_has_nothing_to_keep(put, tmp_path, capsys):
    assert keep.main([str(tmp_path), "kept"]) == 2
    assert "holds no gates.json" in capsys.readouterr().err


def test_ordinary_text_is_not_private():
    assert not list(keep.private({"a": ["1 / 2", "a/b", "gated: 3 and/or 4", {"b": "confidence"}]}))
