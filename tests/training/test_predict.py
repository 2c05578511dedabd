"""``aep predict`` on a run's folder: the answers of the run itself, in every form."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason="aep run needs lightning")

import aep_ext
from aep_ext import cli
from aep_ext.inference import GatedNet

FEW: dict[str, Any] = {"image_size": 8, "epochs": 1, "batch_size": 8, "device": "cpu", "threads": 1, "margin": 30.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> Iterator[tuple[Path, list[Path]]]:
    """The folder of a run on a folder of images, and its test images in the run's order."""
    from aep_ext.training import run

    folder = tmp_path_factory.mktemp("predict")
    tree(folder / "images", {"train": 12, "val": 6, "test": 11})
    run({**FEW, "data": str(folder / "images"), "output": str(folder / "run")})
    yield (
        folder / "run",
        [path for name in ("cat", "dog") for path in sorted((folder / "images/test" / name).glob("*.png"))],
    )


def test_answers_are_those_of_the_run(trained: tuple[Path, list[Path]]) -> None:
    run, files = trained
    net = aep_ext.load(run)
    assert isinstance(net, GatedNet) and net.classes == ("cat", "dog") and net.preprocessing.image_size == 8
    with np.load(run / "seed-0" / "best" / "predictions.npz") as stored:
        logits = torch.from_numpy(stored["test_logits"])
    expected = net.simulate(logits[list(net.net.exit_ids)])
    found = aep_ext.predict(net, files, batch_size=4)
    assert [one.label for one in found] == expected.prediction.tolist()
    assert [one.exit for one in found] == expected.exit.tolist()
    assert [one.confidence for one in found] == pytest.approx(expected.confidence.tolist(), abs=1e-5)
    full = aep_ext.load(run / "full")
    answers = (logits * full.output_weights[:, None, None]).sum(0)
    assert [one.label for one in aep_ext.predict(full, files)] == answers.argmax(1).tolist()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["predict", *arguments]) == code
    return capsys.readouterr().out


def test_forms(trained: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, files = trained
    net = aep_ext.load(run)
    found = aep_ext.predict(net, files)
    expected = [
        (one.file, one.class_name, pytest.approx(one.confidence, abs=1e-5), net.net.exit_ids[one.exit] + 1)
        for one in found
    ]
    given = [str(run), *map(str, files)]
    table = [tuple(line.split()) for line in printed(capsys, *given).splitlines()]
    assert table[0] == ("file", "class", "confidence", "exit")
    assert [(file, name, int(taken)) for file, name, _, taken in table[1:]] == [(a, b, d) for a, b, _, d in expected]
    assert [float(line[2]) for line in table[1:]] == pytest.approx([one.confidence for one in found], abs=1e-4)
    rows = list(csv.reader(io.StringIO(printed(capsys, *given, "--format", "csv", "--batch-size", "3"))))
    assert rows[0] == list(table[0])
    assert [(file, name, float(sure), int(taken)) for file, name, sure, taken in rows[1:]] == expected
    assert printed(capsys, *given, "--format", "json", "--output", str(tmp_path / "new" / "a.json")) == ""
    entries = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [tuple(entry.values()) for entry in entries] == expected and list(entries[0]) == rows[0]
    folder = printed(capsys, str(run), str(files[0].parents[1]))
    assert sorted(line.split()[0] for line in folder.splitlines()[1:]) == sorted(map(str, files))


def test_bad_images(trained: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, files = trained
    bad = tmp_path / "bad.png"
    bad.write_bytes(files[0].read_bytes()[:30])
    asked = ["predict", str(run), str(files[0]), str(bad), str(files[1])]
    assert cli.main(asked) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"aep: {bad} cannot be read as an image (")
    assert cli.main([*asked, "--skip-bad-images"]) == 0
    out, again = capsys.readouterr()
    assert again == err and [line.split()[0] for line in out.splitlines()[1:]] == [str(files[0]), str(files[1])]


def test_a_folder_that_save_wrote(
    trained: tuple[Path, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, files = trained
    net = aep_ext.load(run)
    aep_ext.save(aep_ext.prune(net.net, [0]), tmp_path / "mine")
    first = printed(capsys, str(tmp_path / "mine"), str(files[0])).splitlines()[1].split()
    assert first[1] in net.classes and first[3] == str(net.net.exit_ids[0] + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "nowhere"}, "aep: load: model.json must be in the folder, got none in 'nowhere'"),
        ({"image": "nowhere.png"}, "aep: no such image: nowhere.png"),
        ({"more": ["--output", f"{__file__}/answers.csv"]}, f"aep: cannot write {__file__}/answers.csv: "),
        ({"more": ["--batch-size", "0"]}, "aep: predict: batch_size must be at least 1, got 0"),
        ({"preprocessing": None}, "aep: predict: net.preprocessing must say how images become inputs, got None"),
    ],
)
def test_errors(
    change: dict[str, Any],
    message: str,
    trained: tuple[Path, list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, files = trained
    if "preprocessing" in change:
        net = aep_ext.load(run)
        net.preprocessing = None
        aep_ext.save(net, tmp_path)
        run = tmp_path
    image = change.get("image", str(files[0]))
    assert cli.main(["predict", change.get("folder", str(run)), image, *change.get("more", [])]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1
