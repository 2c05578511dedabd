"""The kernels without torch: builds tests/cpp with CMake in a temporary folder and runs it, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _program(name: str) -> str:
    """A build tool: beside this Python (pip's wheels), else on the PATH."""
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    pytest.skip("no C++ compiler")


def _run(command: list[str], **environment: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, **environment}, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}\n{result.stderr[-6000:]}"
    return result.stdout


def _can_link(flag: str, folder: Path) -> bool:
    """Whether this compiler has the sanitizer's run-time library."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [_compiler(), flag, str(source), "-o", str(folder / "empty")]
    built = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return built and subprocess.run([str(folder / "empty")], capture_output=True, check=False).returncode == 0


def _build(folder: Path, sanitize: str, *options: str) -> Path:
    """Configures, with further options for CMake. Without optimisation: it compiles four times as fast, and inline
    functions stay visible to nm."""
    if sanitize and not _can_link(f"-fsanitize={sanitize}", folder):
        pytest.skip(f"this compiler cannot build for -fsanitize={sanitize} on this machine")
    build = folder / "build"
    cmake, ninja = _program("cmake"), _program("ninja")
    _run(
        [
            cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={_compiler()}",
            "-S", str(ROOT), "-B", str(build), "-DAEP_BUILD_TORCH=OFF", "-DAEP_BUILD_TESTS=ON",
            "-DCMAKE_BUILD_TYPE=Debug", f"-DAEP_SANITIZE={sanitize}", *options,
        ]
    )  # fmt: skip
    return build


def _ctest(build: Path, *arguments: str, **environment: str) -> str:
    ctest = _program("ctest")
    return _run([ctest, "--test-dir", str(build), "--output-on-failure", "--timeout", "600", *arguments], **environment)


def test_kernels_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    build = _build(tmp_path, "address,undefined")
    _run([_program("cmake"), "--build", str(build), "--parallel", "2"])
    output = _ctest(build)
    assert "100% tests passed" in output
    for source in (ROOT / "tests" / "cpp").glob("test_*.cpp"):
        assert source.stem in output


def test_kernels_under_thread_sanitizer(tmp_path: Path) -> None:
    build = _build(tmp_path, "thread")
    _run([_program("cmake"), "--build", str(build), "--parallel", "2", "--target", "test_threads"])
    assert "100% tests passed" in _ctest(build, "-R", "test_threads")


def test_no_code_is_shared_between_instruction_sets(tmp_path: Path) -> None:
    """An inline function emitted for AVX-512 could be the one copy that the linker keeps for everybody."""
    nm = _program("nm")
    build = _build(tmp_path, "")
    listing = _run([_program("ninja"), "-C", str(build), "-t", "targets", "all"])
    objects = [line.split(":")[0] for line in listing.splitlines() if "kernels_avx" in line and ".o:" in line]
    if not objects:
        pytest.skip("no instruction set beyond the baseline is built for this processor")
    _run([_program("ninja"), "-C", str(build), "-j2", *objects])
    for name in objects:
        symbols = _run([nm, "-C", str(build / name)]).splitlines()
        # DW.ref.*: a pointer for the unwinder, data and no code.
        shared = [line for line in symbols if line[17:18] in "WVu" and " DW.ref." not in line]
        assert not shared, f"{name} defines {shared}"


def test_kernels_on_arm(tmp_path: Path) -> None:
    """The scalar kernels, cross-compiled and run under emulation: nothing in them needs an x86 processor."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no cross-compiler for aarch64 or no qemu-user (packages g++-aarch64-linux-gnu and qemu-user)")
    build = _build(
        tmp_path, "",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    _run([_program("cmake"), "--build", str(build), "--parallel", "2"])
    # test_dispatch starts itself anew, which the emulator does not follow.
    assert "100% tests passed" in _ctest(build, "-E", "test_dispatch")
    assert '"isa_built": ["scalar"]' in (build / "aep_facts.json").read_text(encoding="utf-8")
