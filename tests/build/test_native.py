"""What CMake is told, and what is recorded beside the module."""

from __future__ import annotations

import json

import pytest

from aep_ext import _load
from build_support import native
from build_support.plan import BuildError, Plan

_PATHS = {"include_dirs": ["a", "b"], "library_dirs": ["c"], "cxx11_abi": 1}


def test_module_and_record_have_the_names_that_the_package_looks_for():
    assert native.MODULE_NAME == _load.MODULE_PATH.name
    assert native.RECORD_NAME == _load.RECORD_PATH.name


def test_cmake_is_told_torchs_paths_and_the_users_arguments(monkeypatch, cpu_torch):
    monkeypatch.setenv("CMAKE_ARGS", "-DAEP_SANITIZE=address,undefined -DX='a b'")
    options = native.cmake_options(Plan("cpu", cpu_torch), _PATHS, "ninja")
    assert "-DAEP_TORCH_INCLUDE_DIRS=a;b" in options
    assert "-DAEP_CUDA=OFF" in options
    assert options[-2:] == ["-DAEP_SANITIZE=address,undefined", "-DX=a b"]


def test_cmake_is_told_the_resolved_compiler_and_architectures(cuda_torch, toolkit):
    options = native.cmake_options(Plan("cuda", cuda_torch, toolkit, "9.0+PTX"), _PATHS, "ninja")
    assert f"-DCMAKE_CUDA_COMPILER={toolkit.nvcc}" in options
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real;90-virtual" in options


def test_each_torch_and_kind_has_a_folder_of_its_own(cpu_torch, cuda_torch, toolkit):
    plans = [Plan("cpu", cpu_torch), Plan("cpu", cuda_torch), Plan("cuda", cuda_torch, toolkit)]
    assert len({native.build_folder(plan) for plan in plans}) == 3


def test_the_number_of_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native.build_jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert native.build_jobs() >= 1


@pytest.mark.parametrize("value", ["0", "abc", "-1", "²", ""])
def test_a_number_of_jobs_that_is_none(monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value)
    assert native.build_jobs() >= 1


def test_cmake_args_with_an_open_quote_are_named(monkeypatch, cpu_torch):
    monkeypatch.setenv("CMAKE_ARGS", "-DX='a")
    with pytest.raises(BuildError, match="CMAKE_ARGS cannot be understood"):
        native.cmake_options(Plan("cpu", cpu_torch), _PATHS, "ninja")


def test_a_cache_of_other_wishes_or_of_a_failure_is_not_used_again(monkeypatch, tmp_path):
    """Else a compiler that did not work, or a sanitizer asked for once, would stay for ever."""
    commands, fail = [], []

    def run(command):
        commands.append("--fresh" in command)
        (tmp_path / "CMakeCache.txt").touch()
        if fail:
            raise BuildError("failed")

    monkeypatch.setattr(native, "_run", run)
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    native.configure("cmake", tmp_path, [])
    native.configure("cmake", tmp_path, [])
    monkeypatch.setenv("CMAKE_ARGS", "-DAEP_SANITIZE=address")
    native.configure("cmake", tmp_path, [])
    fail.append(True)
    with pytest.raises(BuildError):
        native.configure("cmake", tmp_path, [])
    fail.clear()
    native.configure("cmake", tmp_path, [])
    assert commands == [False, False, True, False, True]


def test_a_missing_tool_is_named(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(BuildError, match="cmake was not found: pip install cmake"):
        native.find_tool("cmake")


def test_no_torch_in_the_build_gives_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "make_plan", lambda: Plan("cpu", None))
    with pytest.raises(BuildError, match="--no-build-isolation"):
        native.build_into(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_none_writes_the_record_and_removes_an_old_module(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "make_plan", lambda: Plan("none", None, notices=("why",)))
    (tmp_path / native.MODULE_NAME).write_bytes(b"old")
    native.build_into(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [native.RECORD_NAME]
    record = json.loads((tmp_path / native.RECORD_NAME).read_text(encoding="utf-8"))
    assert (record["kind"], record["torch"], record["notices"]) == ("none", None, ["why"])


def test_the_record_holds_what_build_info_shows(cuda_torch, toolkit):
    record = native.record_of(Plan("cuda", cuda_torch, toolkit, "8.0, 9.0+PTX"), {"compiler": "GNU 12.2.0"})
    assert record["torch"] == "2.15.0+cu132"
    assert record["cuda_arch"] == ["8.0", "9.0+PTX"]
    assert record["compiler"] == "GNU 12.2.0"


def test_a_failing_command_stops_the_build():
    with pytest.raises(BuildError, match="sh failed with status 3"):
        native._run(["sh", "-c", "exit 3"])
