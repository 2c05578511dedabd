"""The CUDA toolkit is found behind wrapper scripts, and architectures are translated."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_support import cuda

_ANSWERS = """\
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88";;
  *--dryrun*) echo "#\\$ TOP={top}" >&2;;
esac
"""


@pytest.fixture
def real_toolkit(tmp_path) -> Path:
    """A toolkit folder whose nvcc answers as the real one does."""
    home = tmp_path / "cuda-13.0"
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n" + _ANSWERS.format(top=home / "bin" / ".."), encoding="utf-8")
    nvcc.chmod(0o755)
    return home


def test_a_wrapper_script_leads_to_the_real_toolkit(real_toolkit, make_script):
    wrapper = make_script("nvcc", f'exec {real_toolkit}/bin/nvcc "$@"')
    found = cuda.find_toolkit({"PATH": str(wrapper.parent)})
    assert (found.home, found.nvcc, found.version) == (real_toolkit, real_toolkit / "bin" / "nvcc", "13.0")


def test_cuda_home_comes_first(real_toolkit, make_script):
    other = make_script("nvcc", "exit 1")
    assert cuda.find_toolkit({"CUDA_HOME": str(real_toolkit), "PATH": str(other.parent)}).home == real_toolkit


def test_a_compiler_in_a_wheel_beside_torch_is_found(real_toolkit, tmp_path, monkeypatch):
    wheel = tmp_path / "site-packages" / "nvidia"
    wheel.mkdir(parents=True)
    (wheel / "cu13").symlink_to(real_toolkit)
    found = cuda._nvcc_candidates({"PATH": ""}, tmp_path / "site-packages" / "torch")
    assert wheel / "cu13" / "bin" / "nvcc" in found


def test_an_nvcc_that_does_not_answer_is_none(make_script):
    assert cuda._ask(make_script("nvcc", "exit 1")) is None
    assert cuda._ask(Path("no/such/nvcc")) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("8.0", ["80-real"]),
        ("8.0;9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("9.0a, 10.0", ["90a-real", "100-real"]),
        ("12.0 12.0", ["120-real"]),
        ("8.0;", ["80-real"]),
    ],
)
def test_architectures_are_translated_for_cmake(given, expected):
    assert cuda.cmake_architectures(given) == expected


@pytest.mark.parametrize("bad", ["Hopper", "90", "9.0+ptx", "native"])
def test_architectures_that_are_not_understood(bad):
    with pytest.raises(ValueError, match=f"TORCH_CUDA_ARCH_LIST: .* got '{bad.replace('+', '.')}'"):
        cuda.cmake_architectures(bad)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_75\ncompute_80\ncompute_90\ncompute_100\ncompute_120", "8.0;9.0;10.0+PTX"),
        ("compute_70\ncompute_80\ncompute_90", "8.0;9.0+PTX"),
        ("compute_110\ncompute_120", "11.0;12.0+PTX"),
        ("", "8.0;9.0;10.0+PTX"),
    ],
)
def test_the_default_architectures_are_those_this_nvcc_knows(monkeypatch, toolkit, listed, expected):
    monkeypatch.setattr(cuda, "_output", lambda command: listed)
    assert cuda.default_architectures(toolkit, []) == expected


def test_the_gpus_architectures_are_those_this_nvcc_knows(monkeypatch, toolkit):
    """One that is newer than the toolkit runs the default list's PTX."""
    monkeypatch.setattr(cuda, "_output", lambda command: "compute_80\ncompute_89\ncompute_90\ncompute_100")
    assert cuda.default_architectures(toolkit, ["8.0", "8.9"]) == "8.0;8.9"
    assert cuda.default_architectures(toolkit, ["13.0"]) == "8.0;9.0;10.0+PTX"


def test_the_driver_is_asked_for_the_gpus(monkeypatch):
    class Driver:
        """Two H200 and an A100."""

        cuInit = staticmethod(lambda flags: 0)

        def cuDeviceGetCount(self, out) -> int:
            out._obj.value = 3
            return 0

        def cuDeviceGetAttribute(self, out, attribute, gpu) -> int:
            out._obj.value = {75: (9, 8, 9), 76: (0, 0, 0)}[attribute][gpu]
            return 0

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    assert cuda.gpu_architectures() == ["8.0", "9.0"]
    monkeypatch.setattr(Driver, "cuInit", staticmethod(lambda flags: 100))  # CUDA_ERROR_NO_DEVICE
    assert cuda.gpu_architectures() == []


def test_headers_that_came_as_wheels(tmp_path):
    include = tmp_path / "nvidia" / "cu13" / "include"
    include.mkdir(parents=True)
    assert cuda.wheel_include_dirs(tmp_path / "torch") == [str(include)]
