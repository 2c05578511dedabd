"""The report: made from the result file alone, self-contained, and escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report needs matplotlib")

from page_reader import read

from aep_ext.report import UserError, figures, text_table, write_report
from aep_ext.report.page import headlines, training
from aep_ext.report.tables import HEAD, model_rows, seed_rows, subset_rows


def test_report_is_one_well_formed_page(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    _, reader = read(path)
    assert reader.open == [] and reader.tags.count("svg") == 3 and reader.tags.count("table") == 4
    assert len(reader.ids) == len(set(reader.ids))
    assert sorted(file.name for file in (folder / "figures").iterdir()) == [
        "accuracy.png",
        "curves.png",
        "tradeoff.png",
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (folder / "figures").iterdir())


def test_report_loads_nothing(folder: Path) -> None:
    text, reader = read(write_report(folder))
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(reader.tags)
    assert all(reference.startswith("#") and reference[1:] in reader.ids for reference in reader.references)
    assert all(name in reader.ids for name in re.findall(r"url\(#([^)]*)\)", text))


def test_text_is_escaped(folder: Path, results: dict[str, Any]) -> None:
    text, reader = read(write_report(folder))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert results["data"]["title"] in reader.text


def test_report_can_be_made_again(folder: Path) -> None:
    first = write_report(folder).read_text()
    pictures = {file.name: file.read_bytes() for file in (folder / "figures").iterdir()}
    (folder / "report.html").write_text("spoilt")
    assert write_report(folder).read_text() == first
    assert {file.name: file.read_bytes() for file in (folder / "figures").iterdir()} == pictures


def test_folders_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no results: .*results.json is not there"):
        write_report(tmp_path)
    for content in ("[]", '{"format": "other"}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(UserError, match="is not a run's result file"):
            write_report(tmp_path)


def test_table_of_models(results: dict[str, Any]) -> None:
    rows = model_rows(results)
    assert [row[0] for row in rows] == [
        "baseline (single exit)",
        "MIX, all exits",
        "MIX, pruned",
        "MIX, smallest within 1 pt",
        "DESC, all exits",
        "DESC, pruned",
    ]
    assert rows[0][1:6] == ("2", "95.00 ± 1.41 %", "100.00 ± 0.00 %", "", "299 k")
    assert rows[2][1] == "1, 2" and rows[2][4] == "+0.50 [+0.10, +0.90]" and rows[2][6] == "3 M (-25 %)"
    assert rows[3][1] == "2"
    lines = text_table(results).splitlines()
    assert len(lines) == 2 + len(rows) and lines[0].startswith(HEAD[0]) and set(lines[1]) == {"-"}


def test_tables_of_subsets_and_seeds(results: dict[str, Any]) -> None:
    rows, marked = subset_rows(results, "mixed")
    assert [row[0] for row in rows] == ["1", "2", "1+2"] and marked == [0, 1] and rows[0][-1] == "-"
    assert [row[:3] for row in seed_rows(results)][:2] == [("0", "baseline", "3 of 3"), ("0", "MIX", "3 of 3")]


def test_headlines(results: dict[str, Any]) -> None:
    first, second, third, fourth = headlines(results)
    assert (
        "pruned ensemble (exits 1 and 2, by seed) reaches 95.50 ± 0.00 %" in first
        and "25 % fewer multiply-adds" in first
    )
    assert "is exit 2, with 3.99 M" in second and "could not be confirmed: -1.00 [-1.40, -0.60] points" in second
    assert (
        third.startswith("DESC: the pruned")
        and fourth == "DESC: no subset is inside the margin of 1 point on the validation images."
    )
    results["summary"]["methods"]["mixed"]["compact"]["verdict"]["non_inferior"] = True
    assert "this holds" in list(headlines(results))[1]


def test_training_in_words(results: dict[str, Any]) -> None:
    text = training(results["recipe"])
    assert text.startswith(
        "Training (recipe quick): adam at 0.003, weight decay 0.01, cosine schedule, batches of 64, "
    )
    assert "up to 3 epochs, stopped after 12 without" in text
    results["recipe"].update(patience=None, weight_decay=0)
    assert "adam at 0.003, cosine schedule" in training(results["recipe"]) and "stopped" not in training(
        results["recipe"]
    )


def test_one_seed_has_no_spread(results: dict[str, Any]) -> None:
    one = json.loads(json.dumps(results))
    one["seeds"] = one["seeds"][:1]

    def cut(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"mean", "std", "values"}:
            return {"mean": value["values"][0], "std": None, "values": value["values"][:1]}
        if isinstance(value, dict):
            return {key: cut(entry) for key, entry in value.items()}
        return [cut(entry) for entry in value] if isinstance(value, list) else value

    one["summary"] = cut(one["summary"])
    for method in one["summary"]["methods"].values():
        method["pruned"]["exits"] = method["pruned"]["exits"][:1]
    assert "±" not in text_table(one)
    assert set(figures.draw(one)) == {"tradeoff", "curves", "accuracy"}


def test_missing_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"the report needs matplotlib: pip install 'aep_ext\[train\]'"):
        write_report(folder)
