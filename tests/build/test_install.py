"""Real installations by pip, into an environment made for the test that borrows this one's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
setuptools = pytest.importorskip("setuptools", minversion="77", reason="a build without isolation needs setuptools 77")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a source tree"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the source tree, without what builds have left in it."""
    folder = tmp_path_factory.mktemp("source") / "aep_ext"
    ignore = shutil.ignore_patterns("*.so", "_build.*.json", "__pycache__")
    for name in ("aep_ext", "benchmarks", "build_support", "cmake", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy2(file, folder)
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a new virtual environment that sees this environment's packages, except an aep_ext in them."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def _run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AEP_", "COV_", "FORCE_CUDA", "PYTHONPATH"))}
    clean.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")  # where nvcc is: one architecture in place of four, several times
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )


def test_a_pure_python_wheel_installs_runs_and_says_what_it_is(source, python, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path]
    run = _run(*pip, "wheel", *options, source, cwd=tmp_path, AEP_NO_EXTENSIONS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert not any(name.endswith(".so") or name.startswith(("tests", "build_support")) for name in names)
    assert "Requires-Dist: torch>=2.11" in metadata
    run = _run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    run = _run(python, "-c", "import aep_ext; print(aep_ext.__file__); print(aep_ext.build_info())", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert str(python.parent.parent) in run.stdout.splitlines()[0]
    assert "built with AEP_NO_EXTENSIONS=1: no native code" in run.stdout
    assert run.stderr.count("RuntimeWarning") == 1


def test_a_source_distribution_holds_all_that_a_build_needs(source, tmp_path):
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    run = _run(sys.executable, "-c", code, tmp_path, cwd=source)
    assert run.returncode == 0, run.stdout + run.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = ["CMakeLists.txt", "LICENSE", "csrc/torch/module.cpp", "csrc/kernels/params.h", "cmake/AepModule.cmake"]
    assert set(wanted) | {"build_support/plan.py", "tests/build/test_install.py", "tests/conftest.py"} <= names
    assert {"benchmarks/report.py", "benchmarks/gpu_check.sh"} <= names  # README's figures are tested with them
    assert any(name.startswith("tests/cpp/") for name in names)


def test_an_impossible_wish_stops_the_installation_with_its_reason(source, tmp_path):
    code = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    run = _run(sys.executable, "-c", code, tmp_path, cwd=source, FORCE_CUDA="gpu")
    assert run.returncode != 0
    assert "FORCE_CUDA must be 0 or 1, got 'gpu'" in run.stderr


def test_torch_is_no_build_requirement_beside_a_torch(source, tmp_path):
    code = "from setuptools import build_meta; print('GOT', build_meta.get_requires_for_build_wheel())"
    run = _run(sys.executable, "-c", code, cwd=source)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "GOT []" in run.stdout
