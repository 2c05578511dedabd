"""The HTML writer, the way figures are written, and atomic files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from aep_ext.report import UserError, files, numbers
from aep_ext.report.html import Markup, render, table, tag


def test_strings_are_text() -> None:
    assert tag("p", "<b>", 3, None, class_="a\"b'") == '<p class="a&quot;b&#x27;">&lt;b&gt;3</p>'
    assert tag("p", tag("b", "x"), [tag("i"), "&"]) == "<p><b>x</b><i></i>&amp;</p>"
    assert (
        tag("meta", name="viewport", data_x="1", hidden=True, off=False, none=None)
        == '<meta name="viewport" data-x="1" hidden>'
    )
    assert render(Markup("<hr>")) == "<hr>" and render(["a", ("b",)]) == "ab"


def test_table() -> None:
    made = table(("a", "b"), [("x", "1"), ("<y>", "2")], marked=[1])
    assert (
        '<th class="number">b</th>' in made
        and '<tr class="marked"><td>&lt;y&gt;</td><td class="number">2</td></tr>' in made
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (77_800, "77.8 k"),
        (3_971_424, "3.97 M"),
        (999_900, "1000 k"),
        (4.1e9, "4.1 G"),
    ],
)
def test_amounts(value: float, text: str) -> None:
    assert numbers.amount(value) == text


def test_words() -> None:
    assert numbers.exits((0, 2)) == "1+3"
    assert numbers.exits_of_seeds([[0], [0]]) == "1" and numbers.exits_of_seeds([[0], [1, 2]]) == "1, 2+3"
    assert numbers.kept([[2]]) == "exit 3" and numbers.kept([[1, 2]]) == "exits 2+3"
    assert numbers.kept([[1], [1, 2], [1]]) == "exits 2, 2+3 and 2, by seed"
    assert numbers.fewer(75, 100, "x") == "25 % fewer x" and numbers.fewer(125, 100, "x") == "25 % more x"
    assert numbers.fewer(100, 100, "x") == "as many x"
    assert numbers.relative(75, 100) == "-25 %" and numbers.relative(1, 0) == "-"
    assert numbers.method_name("mixed") == "MIX" and numbers.method_name("learned") == "learned"
    assert numbers.percent_spread({"mean": 0.5, "std": None}) == "50.00 %"


def test_json_knows_no_nan(tmp_path: Path) -> None:
    path = files.write_json(
        tmp_path / "deep" / "x.json",
        {"a": float("nan"), 1: [np.float32(0.5), np.int64(3), float("inf")], "c": (None, True)},
    )
    assert json.loads(path.read_text()) == {"a": None, "1": [0.5, 3, None], "c": [None, True]}
    assert files.read_json(path)["1"] == [0.5, 3, None]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "x.txt", "old")

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")
def test_files_can_be_read_by_others_as_usual(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = files.write_bytes(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_arrays(tmp_path: Path) -> None:
    path = files.write_arrays(tmp_path / "x.npz", a=np.arange(3), b=np.array([True]))
    read = files.read_arrays(path)
    assert read["a"].tolist() == [0, 1, 2] and read["b"].dtype == bool


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        files.read_json(tmp_path / "x.json")
