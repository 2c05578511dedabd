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


def _build(folder: Path, sanitize: str, *options: str, compiler: str | None = None) -> Path:
    """Configures, with further options for CMake, of which the last one counts. Without optimisation: it compiles four
    times as fast, and inline functions stay visible to nm."""
    if sanitize and compiler is None and not _can_link(f"-fsanitize={sanitize}", folder):
        pytest.skip(f"this compiler cannot build for -fsanitize={sanitize} on this machine")
    build = folder / "build"
    cmake, ninja = _program("cmake"), _program("ninja")
    _run(
        [
            cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler or _compiler()}",
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
    # The CUDA kernels, run by an emulation on the host.
    for kernel in (ROOT / "csrc" / "kernels" / "cuda").glob("*.cu"):
        name = "test_gated_exit" if kernel.stem == "gated_exit" else f"cuda_{kernel.stem}"
        assert kernel.stem.startswith("graph") or name in output


def test_kernels_under_thread_sanitizer(tmp_path: Path) -> None:
    build = _build(tmp_path, "thread")
    _run([_program("cmake"), "--build", str(build), "--parallel", "2", "--target", "test_threads"])
    assert "100% tests passed" in _ctest(build, "-R", "test_threads")


def test_no_code_is_shared_between_instruction_sets(tmp_path: Path) -> None:
    """An inline function emitted for AVX-512 could be the one copy that the linker keeps for everybody."""
    nm = _program("nm")
    build = _build(tmp_path, "")
    listing = _run([_program("ninja"), "-C", str(build), "-t", "targets", "all"])
    names = (line.split(":")[0] for line in listing.splitlines())
    objects = [name for name in names if name.endswith(".o") and ("kernels_avx" in name or "contract_avx" in name)]
    if not objects:
        pytest.skip("no instruction set beyond the baseline is built for this processor")
    _run([_program("ninja"), "-C", str(build), "-j2", *objects])
    for name in objects:
        symbols = _run([nm, "-C", str(build / name)]).splitlines()
        # DW.ref.*: a pointer for the unwinder, data and no code.
        shared = [line for line in symbols if line[17:18] in "WVu" and " DW.ref." not in line]
        assert not shared, f"{name} defines {shared}"


def test_kernels_with_clang(tmp_path: Path) -> None:
    """Another compiler, optimised: it joins products and sums by default, where it is not told otherwise."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang++ is not installed")
    build = _build(tmp_path, "", "-DCMAKE_BUILD_TYPE=Release", compiler=clang)
    _run([_program("cmake"), "--build", str(build), "--parallel", "2"])
    assert "100% tests passed" in _ctest(build)


def _arm_tools() -> tuple[str, str, Path]:
    """The cross-compiler, the emulator, and the folder of the target's libraries."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no cross-compiler for aarch64 or no qemu-user (packages g++-aarch64-linux-gnu and qemu-user)")
    loader = Path(_run([compiler, "-print-file-name=ld-linux-aarch64.so.1"]).strip()).resolve()
    return compiler, emulator, loader.parent.parent


def _build_for_arm(folder: Path, sanitize: str, *options: str) -> Path:
    compiler, emulator, libraries = _arm_tools()
    build = _build(
        folder, sanitize, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CROSSCOMPILING_EMULATOR={emulator};-L;{libraries}", *options, compiler=compiler,
    )  # fmt: skip
    _run([_program("cmake"), "--build", str(build), "--parallel", "2"])
    assert '"isa_built": ["scalar", "neon"]' in (build / "aep_facts.json").read_text(encoding="utf-8")
    return build


def test_kernels_on_arm(tmp_path: Path) -> None:
    """Cross-compiled and run under emulation, scalar and NEON. Optimised, as delivered: a compiler that joins a product
    and a sum into one instruction shows here, since weighted sums are compared to the bit."""
    build = _build_for_arm(tmp_path, "", "-DCMAKE_BUILD_TYPE=Release")
    output = _ctest(build)
    assert "100% tests passed" in output
    for source in (ROOT / "tests" / "cpp").glob("test_*.cpp"):
        assert source.stem in output or "cuda" in source.stem or source.stem in ("test_gated_exit", "test_graph")


@pytest.mark.slow
def test_kernels_on_arm_under_address_and_undefined_sanitizers(tmp_path: Path) -> None:
    """The emulator shows no process's memory to the leak checker, which is left out."""
    compiler, emulator, libraries = _arm_tools()
    flawed = tmp_path / "flawed.cpp"
    flawed.write_text("int main(int n, char**) { volatile int a[2] = {}; return a[n + 1]; }\n")
    program = tmp_path / "flawed"
    built = subprocess.run([compiler, "-fsanitize=address", flawed, "-o", program], capture_output=True, check=False)
    if built.returncode:
        pytest.skip("the cross-compiler cannot build for -fsanitize=address")
    quiet = {"ASAN_OPTIONS": "detect_leaks=0"}
    seen = subprocess.run(
        [emulator, "-L", libraries, program], capture_output=True, text=True, env=os.environ | quiet, check=False
    )
    if "stack-buffer-overflow" not in seen.stderr:
        pytest.skip("the address sanitizer does not work under this emulator")
    build = _build_for_arm(tmp_path, "address,undefined")
    assert "100% tests passed" in _ctest(build, **quiet)
