"""The report: one page that holds what results.json says, escaped, loading nothing; a damaged file is named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the report needs the extra [train]")
pytest.importorskip("jsonschema", reason="the report needs the extra [train]")

from made_results import make_images, make_results
from page_reader import read

from aep_ext._io import write_arrays
from aep_ext._utils import UserError
from aep_ext.report import check_results, read_results, write_report
from aep_ext.report.plots import Plot, exits_by_class, plots, subsets
from aep_ext.report.write import page

EVIL = "<script>alert('x')</script> & \"$\\bad$\" -->"
COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reported run whose free texts are all markup."""
    folder, results = tmp_path_factory.mktemp("run"), make_results(methods=("mixed", "descending"), classes=21)
    results["network"]["name"] = results["data"]["title"] = results["static"][0]["name"] = EVIL
    results["data"]["classes"][0] = results["config"]["data"] = results["delivered"]["notice"] = EVIL
    results["notices"], results["calibration"]["criterion"] = [EVIL], EVIL
    (folder / "results.json").write_text(json.dumps(results))
    write_arrays(folder / "examples.npz", images=make_images(results))
    assert write_report(folder) == folder / "report.html"
    return folder


def drawn(results: dict[str, Any]) -> str:
    """The page with an empty plot in every place, which is quick."""
    methods = results["summary"]["methods"]
    names = ["tradeoff", "examples", *(f"{kind}-{name}" for kind in ("subsets", "curves", "exits") for name in methods)]
    return page(results, {name: Plot(name, name, b"", b"<svg/>") for name in names})


def test_the_page_is_one_well_formed_file_that_loads_nothing(folder: Path) -> None:
    text, reader = read(folder / "report.html")
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    assert {"script", "link", "iframe", "object"}.isdisjoint(reader.tags) and "@import" not in text
    assert reader.references and all(one.startswith("data:image/svg+xml;base64,") for one in reader.references)
    assert 'name="viewport"' in text and "color-scheme: light" in text
    pictures = sorted(file.name for file in (folder / "figures").iterdir())
    kinds = [f"{kind}-{name}.png" for kind in ("curves", "exits", "subsets") for name in ("descending", "mixed")]
    assert pictures == sorted([*kinds, "examples.png", "tradeoff.png"])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (folder / "figures").iterdir())


def test_text_is_escaped(folder: Path) -> None:
    text, reader = read(folder / "report.html")
    assert "<script" not in text and "&lt;script&gt;" in text and EVIL in reader.text


def test_the_same_run_gives_the_same_files(folder: Path) -> None:
    before = {path: path.read_bytes() for path in [folder / "report.html", *(folder / "figures").iterdir()]}
    write_report(folder)
    assert {path: path.read_bytes() for path in before} == before


def test_sections_follow_what_the_run_has() -> None:
    whole, bare = drawn(make_results()), drawn(make_results(gates=False))
    for title in ("Stopping early", "Latency and throughput", "Thresholds and exits taken"):
        assert title in whole and title not in bare
    assert "Subsets of the exits" in bare and "MIX, pruned" in bare


def test_every_committed_run_can_be_read_and_shown() -> None:
    runs = [path for path in COMMITTED if json.loads(path.read_text()).get("format") == "aep_ext.run"]
    shown = 0
    for path in runs:
        if json.loads(path.read_text())["version"] == 2:
            text, shown = drawn(read_results(path)), shown + 1
            assert "Delivered: " in text and "baseline (single exit)" in text
    assert shown >= 4


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results: .*results.json is not there"):
        write_report(tmp_path)
    for content in ("[]", '{"format": "other"}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match="results.json is not a run's result file"):
            write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


GATED = "seeds.0.methods.mixed.gated"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("version", 1, "version must be 2, got 1: another version of aep_ext wrote it, run it again"),
        ("summary.baseline.macs", KeyError, "summary.baseline: 'macs' is a required property"),
        ("summary.methods.mixed.gated.saving.mean", None, "saving.mean: None is not of type 'number'"),
        ("delivered.kind", "full", "delivered.kind: 'full' is not one of"),
        ("delivered.seed", 9, r"delivered must name one of the trained models \(seed, method\)"),
        ("seeds.1.methods", {"uniform": 1}, "seeds"),
        (f"{GATED}.test.top1", 93.5, "gated.test.top1: 93.5 is greater than the maximum of 1"),
        (f"{GATED}.policy.thresholds", [0.5], r"gated.policy.thresholds must have 2 entries for 3 exits, got 1"),
        (f"{GATED}.per_class.3", [1], r"per_class\[3\] must have 3 entries"),
        (f"{GATED}.curve.2.mean_macs", "x", r"curve\[2\].mean_macs: 'x' is not of type 'number'"),
        ("bench.rows.0.ratio", "fast", r"bench.rows\[0\].ratio: 'fast' is not of type 'number'"),
        ("seeds.0.methods.mixed.gated", None, "delivered.kind is 'gated', but that model has no such entry"),
    ],
)
def test_a_damaged_file_is_refused_by_the_entry(place: str, value: Any, message: str) -> None:
    results = make_results()
    change(results, [int(part) if part.isdigit() else part for part in place.split(".")], value)
    with pytest.raises(UserError, match=message) as caught:
        check_results(results, "RUN/results.json")
    assert str(caught.value).startswith("RUN/results.json: ") and "\n" not in str(caught.value)


def change(value: Any, place: list[Any], new: Any) -> None:
    for part in place[:-1]:
        value = value[part]
    if new is KeyError:
        del value[place[-1]]
    else:
        value[place[-1]] = new


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every entry of every object; of lists the first only."""
    if isinstance(value, list):
        return places(value[0], (*way, 0)) if value else []
    if not isinstance(value, dict):
        return []
    return [place for key in value for place in ((*way, key), *places(value[key], (*way, key)))]


@pytest.mark.parametrize("new", [KeyError, None])
def test_whatever_is_damaged_gives_a_page_or_one_line(new: Any) -> None:
    whole = make_results(seeds=(0,))
    for place in places(whole):
        results = copy.deepcopy(whole)
        change(results, list(place), new)
        try:
            check_results(results)
        except UserError:
            continue
        assert "</html>" in drawn(results), place


def test_example_images_must_fit(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text((folder / "results.json").read_text())
    write_arrays(tmp_path / "examples.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"images must be uint8 of shape \(5, H, W, 1 or 3\).*got uint8 of shape"):
        write_report(tmp_path)
    (tmp_path / "examples.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="examples.npz is damaged: it is no archive"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_bars_hold_the_counts_of_the_file() -> None:
    results = make_results(classes=30)
    rows = exits_by_class(results, "mixed")
    assert len(rows) == 21 and rows[0][0] == "all classes"
    parts = [seed["methods"]["mixed"]["gated"] for seed in results["seeds"]]
    for name, shares in rows[1:]:
        counts = np.sum([part["per_class"][int(name.removeprefix("class "))] for part in parts], axis=0)
        assert list(shares.values()) == pytest.approx(counts / counts.sum()) and list(shares) == [1, 2, 3]
    everything = np.sum([part["test"]["exit_counts"] for part in parts], axis=0)
    assert list(rows[0][1].values()) == pytest.approx(everything / everything.sum())


def test_plots_of_one_grey_seed() -> None:
    results = make_results(seeds=(3,))
    assert set(plots(results, make_images(results, channels=1))) == {
        "tradeoff",
        "subsets-mixed",
        "curves-mixed",
        "exits-mixed",
        "examples",
    }


def test_the_front_the_constraints_and_the_chosen_subset_are_drawn() -> None:
    results = make_results(seeds=(3,))
    method = results["summary"]["methods"]["mixed"]
    row = next(row for row in method["subsets"] if row["exits"] == [1])
    choice = {"objective": "macs", "exits": [1], "macs": row["macs"], "limits": {"top1": 0.68, "macs": 12e6}}
    results["seeds"][0]["methods"]["mixed"]["selected"] = {"exits": [1], "selection": choice}
    axis = subsets(results, "mixed").axes[0]
    assert axis.get_xlabel() == "multiply-adds (M)"
    lines = {line.get_label(): line for line in axis.lines}
    front = [(one["macs"] / 1e6, 100 * one["top1"]["mean"]) for one in method["subsets"] if one["front"]]
    assert lines["Pareto front"].get_xydata().tolist() == [list(point) for point in sorted(front)]
    limits = [line for line in axis.lines if line.get_label() == "constraint"]
    assert [limits[0].get_ydata()[0], limits[1].get_xdata()[0]] == [68, 12]
    ring = next(one for one in axis.collections if one.get_label() == "chosen: macs")
    assert ring.get_offsets().tolist() == [[row["macs"] / 1e6, pytest.approx(100 * row["top1"]["mean"])]]
    row["front"] = False
    del results["seeds"][0]["methods"]["mixed"]["selected"]
    assert "constraint" not in {line.get_label() for line in subsets(results, "mixed").axes[0].lines}


@pytest.mark.parametrize("package", ["matplotlib", "jinja2", "jsonschema"])
def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install 'aep_ext\[train\]'"):
        write_report(folder)
