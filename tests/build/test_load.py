"""import aep_ext beside a fitting, a foreign and no native module; build_info() in every case."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aep_ext
from aep_ext import _build_info, _load

_PACKAGE = Path(aep_ext.__file__).parent


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package's Python files alone, in a folder that a new process can import from."""
    ignore = shutil.ignore_patterns("*.so", "_build.*.json", "__pycache__")
    shutil.copytree(_PACKAGE, tmp_path / "aep_ext", ignore=ignore)
    return tmp_path


def _put_foreign_module(copy: Path, built_for: str = "1.2.3+cpu") -> None:
    """A module that the loader cannot open: whoever reads the record first never tries."""
    (copy / "aep_ext" / _load.MODULE_PATH.name).write_bytes(b"not a shared object")
    record = {"kind": "cpu", "torch": built_for, "notices": []}
    (copy / "aep_ext" / _load.RECORD_PATH.name).write_text(json.dumps(record), encoding="utf-8")


def _python(copy: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AEP_", "COV_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | {"PYTHONPATH": str(copy)} | env,
        cwd=copy,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_module_for_another_torch_is_refused_with_both_versions_and_the_remedy(copy):
    _put_foreign_module(copy)
    run = _python(copy, "-c", "import aep_ext")
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last.startswith("ImportError: aep_ext was built for torch 1.2.3+cpu, but torch ")
    assert torch.__version__ in last
    assert "pip install --no-build-isolation" in last


def test_the_reference_can_be_forced_beside_a_module_for_another_torch(copy):
    _put_foreign_module(copy)
    run = _python(copy, "-W", "error", "-c", "import aep_ext; print(aep_ext.build_info())", AEP_FORCE_REFERENCE="1")
    assert run.returncode == 0, run.stderr
    assert "AEP_FORCE_REFERENCE=1 chose the pure-torch reference" in run.stdout


def test_info_works_beside_a_module_for_another_torch(copy):
    _put_foreign_module(copy)
    run = _python(copy, "-m", "aep_ext", "info")
    assert run.returncode == 0, run.stderr
    assert re.search(r"missing +aep_ext was built for torch 1\.2\.3\+cpu, but torch", run.stdout)


def test_a_module_that_cannot_be_opened_is_refused_with_the_remedy_and_described_by_info(copy):
    _put_foreign_module(copy, built_for=torch.__version__)
    run = _python(copy, "-c", "import aep_ext")
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: aep_ext's native module cannot be loaded: ")
    assert "AEP_FORCE_REFERENCE=1" in last
    run = _python(copy, "-m", "aep_ext", "info")
    assert run.returncode == 0, run.stderr
    assert "native module cannot be loaded" in run.stdout


def test_importing_does_not_bring_in_the_compiler_or_optional_packages(copy):
    names = "'torch._dynamo', 'sympy', 'torchvision', 'timm', 'lightning', 'sklearn', 'matplotlib', 'safetensors'"
    code = f"import sys, torch; had = set(sys.modules); import aep_ext; print(({{{names}}} & set(sys.modules)) - had)"
    run = _python(copy, "-c", code, AEP_FORCE_REFERENCE="1")
    assert run.stdout.strip() == "set()", run.stdout + run.stderr


def test_a_module_that_was_removed_is_not_explained_by_another_notice(copy):
    _put_foreign_module(copy)
    (copy / "aep_ext" / _load.MODULE_PATH.name).unlink()
    run = _python(copy, "-W", "always", "-c", "import aep_ext")
    assert run.returncode == 0
    assert "was built, but is not there any more" in run.stderr


def test_without_a_module_there_is_one_warning_and_everything_works(copy):
    code = "import aep_ext.ops as ops, torch; print(ops.ensemble(torch.ones(2, 1, 3), torch.ones(2)).tolist())"
    run = _python(copy, "-W", "always", "-c", code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[[2.0, 2.0, 2.0]]"
    assert run.stderr.count("RuntimeWarning: aep_ext runs on its pure-torch reference") == 1


def test_a_module_without_a_record_is_refused():
    assert "no build record" in _load.mismatch({}, "2.13.0")
    assert _load.mismatch({"torch": "2.13.0"}, "2.13.0") is None
    assert _load.mismatch({"torch": "2.13.0+cpu"}, "2.13.0+cu130") is not None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["/x/bin/aep", "info"], True), (["-m", "info"], True), (["aep", "run"], False), (["train.py", "info"], False)],
)
def test_only_the_info_command_gets_around_the_refusal(argv, expected):
    assert _load.only_asks_for_info(argv) is expected


@pytest.mark.parametrize(("value", "forced"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_force_reference(monkeypatch, value, forced):
    monkeypatch.setenv("AEP_FORCE_REFERENCE", value)
    assert _load.reference_forced() is forced


def test_a_spoilt_record_is_a_notice_and_no_crash(tmp_path):
    file = tmp_path / "record.json"
    file.write_text("{", encoding="utf-8")
    assert "cannot be read" in _load.read_record(file)["notices"][0]
    file.write_text("[1]", encoding="utf-8")
    assert "cannot be read" in _load.read_record(file)["notices"][0]
    assert _load.read_record(tmp_path / "absent.json") == {}


def test_build_info_says_what_runs():
    info = aep_ext.build_info()
    assert info.version == aep_ext.__version__
    assert info.torch == torch.__version__
    assert (info.backend == "native") == (_load.extension is not None)
    assert json.loads(json.dumps(info.to_dict()))["version"] == info.version
    assert str(info).splitlines()[0].split()[1] == f"{info.version},"
    if info.backend == "native":
        assert info.isa_in_use in info.isa_built
        assert set(info.isa_supported) <= set(info.isa_built)


def test_build_info_shows_the_builds_notices_and_absent_packages(monkeypatch):
    record = {"kind": "cpu", "torch": "x", "notices": ["no CUDA kernels: nvcc was not found"]}
    monkeypatch.setattr(_load, "record", record)
    monkeypatch.setattr(_build_info.importlib.util, "find_spec", lambda name: None)
    info = _build_info.build_info()
    assert "no CUDA kernels: nvcc was not found" in info.missing
    assert any("pip install 'aep_ext[train]'" in line for line in info.missing)
    assert "missing" in str(info)


def test_build_info_describes_every_kind_of_build(monkeypatch):
    for record, text in [
        ({}, "not built for this Python"),
        ({"kind": "none"}, "as pure Python"),
        ({"kind": "cpu", "torch": "x"}, "with CPU kernels for torch x"),
        ({"kind": "cuda", "torch": "x", "cuda_compiler": "13.0", "cuda_arch": ["9.0"]}, "with CPU and CUDA kernels"),
    ]:
        monkeypatch.setattr(_load, "record", record)
        assert text in str(_build_info.build_info())
