"""Result files appear whole or not at all, and are read back as they were."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from aep_ext import _io
from aep_ext._utils import UserError


def test_json_knows_no_nan(tmp_path: Path) -> None:
    path = _io.write_json(
        tmp_path / "deep" / "x.json",
        {"a": float("nan"), 1: [np.float32(0.5), np.int64(3), float("inf")], "c": (None, True)},
    )
    assert json.loads(path.read_text()) == {"a": None, "1": [0.5, 3, None], "c": [None, True]}
    assert _io.read_json(path)["1"] == [0.5, 3, None]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = _io.write_text(tmp_path / "x.txt", "old")

    def fail(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("no space")

    with pytest.raises(RuntimeError, match="no space"):
        _io.write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")
def test_files_can_be_read_by_others_as_usual(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = _io.write_bytes(tmp_path / "x", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_arrays(tmp_path: Path) -> None:
    path = _io.write_arrays(tmp_path / "x.npz", a=np.arange(3), b=np.array([True]))
    read = _io.read_arrays(path)
    assert read["a"].tolist() == [0, 1, 2] and read["b"].dtype == bool


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*absent.json: No such file"):
        _io.read_json(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        _io.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("lost", [("sha256",), ("sha256", "files", "seed"), ("files",)])
def test_a_record_that_lost_entries_is_damaged(tmp_path: Path, lost: tuple[str, ...]) -> None:
    path = _io.write_record(tmp_path / "part.json", {"seed": 0})
    assert _io.read_record(path, "delete it") == {"seed": 0, "files": {}}
    left = {name: value for name, value in _io.read_json(path).items() if name not in lost}
    _io.write_json(path, left)
    with pytest.raises(UserError, match="part.json was changed since it was written: delete it"):
        _io.read_record(path, "delete it")


def test_a_record_of_an_earlier_version_has_no_digests(tmp_path: Path) -> None:
    path = _io.write_json(tmp_path / "part.json", {"seed": 0})
    assert _io.read_record(path, "delete it") == {"seed": 0, "files": {}}
