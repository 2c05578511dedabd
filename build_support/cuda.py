"""Find the CUDA toolkit and choose the GPU architectures."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# A100; H100 and H200; B100 and B200. The newest also as PTX, which later GPUs compile for themselves.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its folder, its compiler and the compiler's version."""

    home: Path
    nvcc: Path
    version: str  # "13.0"


def _nvcc_candidates(env: dict[str, str], torch_folder: Path | None) -> list[Path]:
    found = [Path(env[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    if on_path:
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    if torch_folder is not None:  # the compiler as a wheel, beside torch
        found += sorted(torch_folder.parent.glob("nvidia/cu*/bin/nvcc"), reverse=True)
    return [path for path in found if path.is_file()]


def find_toolkit(env: dict[str, str] | None = None, torch_folder: Path | None = None) -> Toolkit | None:
    """The toolkit to use, or None. CUDA_HOME first, then `nvcc` on the PATH, the usual folder, a wheel beside torch.

    `nvcc` may be a wrapper script in a folder that is no toolkit, so the compiler itself is asked where it lives.
    """
    for nvcc in _nvcc_candidates(dict(os.environ) if env is None else env, torch_folder):
        toolkit = _ask(nvcc)
        if toolkit is not None:
            return toolkit
    return None


def _ask(nvcc: Path) -> Toolkit | None:
    version = re.search(r"release (\d+\.\d+)", _output([str(nvcc), "--version"]))
    if version is None:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", _output([str(nvcc), "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    home = Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent
    real = home / "bin" / "nvcc"
    return Toolkit(home, real if real.is_file() else nvcc, version[1])


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout + run.stderr


def gpu_architectures() -> list[str]:
    """The compute capabilities of this machine's GPUs, each once, as "9.0"; asked of the driver itself."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return []
    value = ctypes.c_int()

    def ask(function: str, *arguments: int) -> int:
        return 0 if getattr(driver, function)(ctypes.byref(value), *arguments) else value.value

    if driver.cuInit(0):
        return []
    major, minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; a device's handle is its number
    count = ask("cuDeviceGetCount")
    found = [tuple(ask("cuDeviceGetAttribute", part, gpu) for part in (major, minor)) for gpu in range(count)]
    return [f"{major}.{minor}" for major, minor in sorted(set(found))]


def default_architectures(toolkit: Toolkit, gpus: list[str]) -> str:
    """Those of the GPUs here, else our default list, as far as this nvcc knows them; as in TORCH_CUDA_ARCH_LIST."""
    numbers = re.findall(r"compute_(\d+)(?=\s|$)", _output([str(toolkit.nvcc), "--list-gpu-arch"]))
    known = [f"{number[:-1]}.{number[-1]}" for number in numbers]
    here = [arch for arch in gpus if arch in known]
    if here:
        return ";".join(here)
    chosen = [arch for arch in DEFAULT_ARCHITECTURES if arch in known or not known]
    return ";".join(chosen or sorted(known, key=float)) + "+PTX"


def cmake_architectures(arch_list: str) -> list[str]:
    """Translate TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", separated by ; , or blanks) into CMAKE_CUDA_ARCHITECTURES.

    Raises:
        ValueError: an entry is not of the form MAJOR.MINOR, with an optional letter and an optional +PTX.
    """
    result = []
    for entry in re.split(r"[;,\s]+", arch_list.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: entries must look like 9.0, 9.0a or 9.0+PTX, got '{entry}'")
        number = match[1] + match[2] + match[3]
        result.append(f"{number}-real")
        if match[4]:
            result.append(f"{number}-virtual")
    return list(dict.fromkeys(result))


def wheel_include_dirs(torch_folder: Path) -> list[str]:
    """Folders with CUDA headers that came as wheels beside torch: ATen includes some that a partial toolkit lacks."""
    return [str(path) for path in sorted(torch_folder.parent.glob("nvidia/*/include"), reverse=True)]
