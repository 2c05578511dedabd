"""The run folder: whose it is, whole or absent, what is damaged is named, and nothing that is not a run's is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the training needs lightning")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from aep_ext import _io, cli
from aep_ext.training import Progress, UserError, calibrate_run, run
from aep_ext.training import run as run_function
from aep_ext.training.folder import RunFolder, begin, open_run

job_module = __import__("sys").modules[run_function.__module__]
Finished = tuple[Path, dict[str, Any], list[str]]


@pytest.fixture
def copy(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run; its report, which is not tested here, is not made."""
    monkeypatch.setattr(job_module, "write_report", lambda folder: None)
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def begun(path: Path, **given: Any) -> RunFolder:
    config, folder = open_run({"output": str(path), **given})
    with begin(config, folder):
        pass
    return folder


def flip(path: Path) -> bytes:
    """One bit of the file is another now; returns what it held."""
    data = path.read_bytes()
    place = len(data) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    return data


# One at a time ----------------------------------------------------------------------------------------------------


def _hold(path: str, held: Any, release: Any) -> None:
    with RunFolder(path).locked():
        held.set()
        release.wait(30)


@pytest.mark.skipif(os.name != "posix", reason="locks are POSIX's")
def test_two_runs_in_one_folder_are_refused_and_a_kill_frees_it(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(folder.path), held, release))
    other.start()
    assert held.wait(30)
    for options in ({"resume": True}, {"overwrite": True}):
        config, same = open_run({"output": str(folder.path)}, **options)
        with pytest.raises(UserError, match="run is in use by another aep: wait until it is done, or choose"):
            with begin(config, same, **options):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    other.kill()
    other.join()
    with folder.locked():
        with pytest.raises(UserError, match="is in use"), folder.locked():
            pass
    with folder.locked():
        pass


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    (folder.path / "seed-0" / "mixed").mkdir(parents=True)
    left = [folder.path / ".results.json.x1.part", folder.path / "seed-0" / "mixed" / ".predictions.npz.ab.part"]
    for path in left:
        path.write_bytes(b"half")
    (tmp_path / ".new.abc.part").mkdir()  # of a run that was killed before its folder appeared
    (tmp_path / ".new.abc.part" / "config.json").write_text("{}")
    with folder.locked():
        assert not any(path.exists() for path in left)
    begun(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]


# Whole or absent --------------------------------------------------------------------------------------------------


def test_a_folder_appears_with_its_configuration_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        seen.append((tmp_path / "run").exists())
        real(source, target)
        seen.append((tmp_path / "run").exists())

    monkeypatch.setattr(os, "replace", replace)
    folder = begun(tmp_path / "run")
    assert seen == [False, False] and folder.config.is_file()
    assert folder.path.stat().st_mode & 0o777 == 0o777 & ~_io.umask()

    def killed(path: Path, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.undo()
    begun(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


def test_a_folder_that_is_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    for name, made in (("new", False), ("empty", True)):
        if made:
            (tmp_path / name).mkdir()
        config, folder = open_run({"output": str(tmp_path / name)})
        first = begun(tmp_path / name, epochs=3)
        before = first.config.read_bytes()
        with pytest.raises(UserError, match=f"{name} was taken by another run meanwhile"), begin(config, folder):
            pass
        assert first.config.read_bytes() == before


def test_overwriting_replaces_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", epochs=3)
    (folder.path / "seed-0" / "mixed").mkdir(parents=True)
    (folder.path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="holds another run .*--overwrite"):
        open_run({"output": str(folder.path), "epochs": 4})
    config, same = open_run({"output": str(folder.path), "epochs": 4}, overwrite=True)
    assert (folder.path / "results.json").exists()  # until the run begins
    with begin(config, same, overwrite=True):
        assert [path.name for path in folder.path.iterdir()] == ["config.json"]
    assert folder.stored().epochs == 4 and [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds more than a run \(notes.txt\): it is not overwritten"):
        open_run({"output": str(folder.path)}, overwrite=True)
    for name, text in (("notes.txt", "mine"), ("config.json", "{}")):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).write_text(text)
        with pytest.raises(UserError, match="holds no run|holds more than a run"):
            open_run({"output": str(tmp_path / name[0])}, overwrite=True)
    with pytest.raises(UserError, match="resumed or overwritten, not both"):
        open_run({"output": str(folder.path)}, resume=True, overwrite=True)
    begun(tmp_path / "new")  # with the option, where there is nothing to overwrite
    with begin(*open_run({"output": str(tmp_path / "newer")}, overwrite=True), overwrite=True):
        pass


# Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("seed-0/mixed/predictions.npz", "delete .*/seed-0/mixed to train that model again, or restore the file"),
        ("seed-0/mixed/full/model.json", "delete .*/seed-0/mixed to train"),
        ("seed-1/ascending/pruned/model.safetensors", "delete .*/seed-1/ascending to train"),
        ("seed-1/baseline/part.json", "delete .*/seed-1/baseline to train|is not a JSON file"),
        ("seed-0/mixed/gated.json", "delete .*gated.json to calibrate that model again|is not a JSON file"),
        ("gated/model.json", "delete .*gated.json to calibrate"),
        ("config.json", "run it again with --overwrite|is not a JSON file"),
    ],
)
def test_what_was_damaged_is_named_with_the_remedy(copy: Path, file: str, remedy: str) -> None:
    results = copy / "results.json"
    results.unlink()
    if file == "gated/model.json":  # of a model for which some gates keep the budget
        file = str(next(copy.glob("seed-*/*/gated/model.json")).relative_to(copy))
    good = flip(copy / file)
    with pytest.raises(UserError, match=f"^{copy / file}.*({remedy})"):
        run({"output": str(copy)}, resume=True)
    assert not results.exists()
    (copy / file).unlink()
    if file not in ("config.json",) and not file.endswith(("part.json", "gated.json")):
        with pytest.raises(UserError, match=f"^{copy / file} is not there: {remedy}"):
            run({"output": str(copy)}, resume=True)
    (copy / file).write_bytes(good)


def test_the_remedies_help(copy: Path, finished: Finished) -> None:
    before = (copy / "model.safetensors").read_bytes()
    flip(copy / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors was changed since it was written: delete .*results.json"):
        run({"output": str(copy)}, resume=True)
    (copy / "results.json").unlink()
    results = run({"output": str(copy)}, resume=True)
    assert (copy / "model.safetensors").read_bytes() == before and results["delivered"] == finished[1]["delivered"]
    flip(copy / "full" / "model.json")
    assert calibrate_run(copy)["delivered"] == results["delivered"]  # delivers again by itself
    run({"output": str(copy)}, resume=True)


def test_damage_while_the_run_goes_on_is_found_before_it_is_finished(
    copy: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    (copy / "results.json").unlink()
    chosen = finished[1]["delivered"]
    real = job_module.Job.latencies

    def latencies(job: Any, *rest: Any) -> Any:
        found = real(job, *rest)
        flip(copy / f"seed-{chosen['seed']}" / chosen["method"] / "full" / "model.json")
        return found

    monkeypatch.setattr(job_module.Job, "latencies", latencies)
    with pytest.raises(UserError, match="full/model.json was changed since it was written"):
        run({"output": str(copy)}, resume=True)
    assert not (copy / "results.json").exists()


def test_a_kill_between_a_gated_network_and_its_record_is_harmless(
    copy: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    real = job_module.write_record

    def killed(path: Path, values: Any, files: Any = ()) -> Any:
        if path.name == "gated.json" and values["gated"]:
            raise KeyboardInterrupt
        return real(path, values, files)

    monkeypatch.setattr(job_module, "write_record", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate_run(copy, {"budget": 20.0})
    monkeypatch.setattr(job_module, "write_record", real)
    for budget in (8.0, 20.0):
        results = calibrate_run(copy, {"budget": budget})
        assert results["calibration"]["budget"]["points"] == budget


# Disk and permission ----------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_that_names_the_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "results.json").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["run", "--output", str(copy), "--resume", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"aep: cannot write {copy}") and error.rstrip().endswith("No space left on device")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is permitted to root")
def test_no_permission_is_one_line(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run")
    folder.config.chmod(0)
    with pytest.raises(UserError, match="cannot read .*config.json: Permission denied"):
        open_run({"output": str(folder.path)}, resume=True)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot (make|write) .*: Permission denied"):
            begun(tmp_path / "other")
    finally:
        tmp_path.chmod(0o700)


def test_a_place_where_no_folder_can_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    given = ["--image-size", "8", "--device", "cpu", "--quiet"]
    assert cli.main(["run", "--output", str(tmp_path / "file" / "run"), *given]) == 2
    assert re.fullmatch(
        f"aep: cannot make {tmp_path}/file/run: (File exists|Not a directory)\n", capsys.readouterr().err
    )


def test_a_resumed_run_says_nothing_where_nothing_is_wrong(copy: Path) -> None:
    lines: list[str] = []
    run({"output": str(copy)}, resume=True, progress=Progress(lines.append))
    assert lines == []
