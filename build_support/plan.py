"""Decide what is built, from the environment variables and from what is installed. No side effects: easy to test."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from build_support import cuda, target

ROOT = Path(__file__).resolve().parent.parent
TORCH_REQUIREMENT = f"torch>={target.MINIMUM_TORCH[0]}.{target.MINIMUM_TORCH[1]}"
REQUIREMENTS = [TORCH_REQUIREMENT, "numpy>=2.4", "scipy>=1.17"]

NO_TORCH = (
    "aep_ext: no torch is visible to this build. uv and `python -m build` hide the one that is installed: install "
    "torch first and build with --no-build-isolation (setuptools, cmake and ninja must then be installed too). "
    "AEP_NO_EXTENSIONS=1 installs the package without native code."
)


class BuildError(Exception):
    """The build cannot be done as asked. The message is for the user: what is wrong and what to do."""


@dataclass(frozen=True)
class Plan:
    """What is to be built. `notices` say what is left out and why; aep_ext.build_info() shows them later."""

    kind: str  # "cpu", "cuda" or "none"
    torch: target.Torch | None
    toolkit: cuda.Toolkit | None = None
    architectures: str = ""  # as in TORCH_CUDA_ARCH_LIST
    notices: tuple[str, ...] = field(default=())

    @property
    def install_requires(self) -> list[str]:
        """The module fits one version of torch only, so a package with one asks for just that version.

        The public version is asked for, which an installed `2.13.0+cpu` satisfies: pip then leaves torch alone.
        """
        if self.kind == "none" or self.torch is None:
            return REQUIREMENTS
        return [f"torch=={self.torch.public_version}", *REQUIREMENTS[1:]]


def _switch(env: Mapping[str, str], name: str) -> bool | None:
    """An environment variable that is on, off, or not set (None)."""
    value = env.get(name, "").strip().lower()
    if value in {"1", "on", "true", "yes", "y"}:
        return True
    if value in {"0", "off", "false", "no", "n"}:
        return False
    if value:
        raise BuildError(f"{name} must be 0 or 1, got '{env[name]}'")
    return None


def why_no_compiler(env: Mapping[str, str]) -> str | None:
    """Why there is no C++ compiler to use, or None. CMake takes CXX, else the usual names on the PATH."""
    if env.get("CXX", "").strip():
        try:
            command = shlex.split(env["CXX"])
        except ValueError as error:
            return f"CXX cannot be understood ({error}): {env['CXX']}"
        path = shutil.which(command[0], path=env.get("PATH"))
        if path is None:
            return f"no C++ compiler was found: CXX={env['CXX']}"
        command[0] = path
    else:
        paths = (shutil.which(name, path=env.get("PATH")) for name in ("c++", "g++", "clang++"))
        command = [next((path for path in paths if path), "")]
        if not command[0]:
            return "no C++ compiler was found (CXX, c++, g++, clang++)"
    command += ["-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    source = "#include <string>\nint main() { return 0; }\n"
    try:
        run = subprocess.run(command, input=source, env=dict(env), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler does not run: {error}"
    if run.returncode:
        first = (run.stderr.strip().splitlines() or ["no message"])[0]
        return f"the C++ compiler {command[0]} does not compile C++20 (status {run.returncode}: {first})"
    return None


def _why_no_cuda(torch: target.Torch, toolkit: cuda.Toolkit | None) -> str | None:
    """The reason why CUDA kernels cannot be compiled, or None."""
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    if toolkit is None:
        return f"nvcc was not found (torch {torch.version} is built with CUDA {torch.cuda}; set CUDA_HOME to a toolkit)"
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {toolkit.version}, torch {torch.version} of CUDA {torch.cuda}: "
            "the major versions must agree"
        )
    return None


def make_plan(
    env: Mapping[str, str] | None = None,
    *,
    find_torch: Callable[[], target.Torch | None] = target.find_torch,
    find_toolkit: Callable[..., cuda.Toolkit | None] = cuda.find_toolkit,
    find_gpus: Callable[[], list[str]] = cuda.gpu_architectures,
) -> Plan:
    """Decide. The finders are arguments so that tests can put any machine in front of it.

    CUDA is compiled where there is a GPU, or with FORCE_CUDA=1; FORCE_CUDA=0 leaves it out in any case.

    Raises:
        BuildError: the wish cannot be fulfilled, or the installed torch is too old.
    """
    env = os.environ if env is None else env
    force_cuda = _switch(env, "FORCE_CUDA")
    torch = find_torch()
    if _switch(env, "AEP_NO_EXTENSIONS"):
        if force_cuda:
            raise BuildError("FORCE_CUDA=1 and AEP_NO_EXTENSIONS=1 contradict each other")
        return Plan("none", torch, notices=("built with AEP_NO_EXTENSIONS=1: no native code",))
    no_compiler = why_no_compiler(env)
    if no_compiler is not None:
        if force_cuda:
            raise BuildError(f"FORCE_CUDA=1 needs a C++ compiler, but {no_compiler}")
        return Plan("none", torch, notices=(f"no native code: when aep_ext was installed, {no_compiler}",))
    if torch is None:  # pip fetches one for the build; build_ext plans again beside it
        return Plan("cpu", None)
    if not torch.is_supported:
        raise BuildError(
            f"aep_ext needs {TORCH_REQUIREMENT}, torch {torch.version} is installed; update torch first "
            "(to a CPU or a CUDA build, as you want it)"
        )
    if torch.cuda is None and not force_cuda:
        return Plan("cpu", torch)
    gpus = find_gpus() if torch.cuda and force_cuda is not False else []
    if not gpus and not force_cuda:
        why_not = "built with FORCE_CUDA=0"
        if force_cuda is None:
            why_not = "no GPU was found when aep_ext was built; FORCE_CUDA=1 compiles them all the same"
        return Plan("cpu", torch, notices=(f"no CUDA kernels: {why_not}",))
    toolkit = find_toolkit(torch_folder=torch.folder) if torch.cuda else None
    unable = _why_no_cuda(torch, toolkit)
    if unable is None:
        assert toolkit is not None
        wanted = env.get("TORCH_CUDA_ARCH_LIST", "").strip()
        return Plan("cuda", torch, toolkit, wanted or cuda.default_architectures(toolkit, gpus))
    if force_cuda:
        raise BuildError(f"FORCE_CUDA=1 asks for CUDA kernels, but {unable}")
    return Plan("cpu", torch, notices=(f"no CUDA kernels: {unable}",))


def build_requires(env: Mapping[str, str] | None = None) -> list[str]:
    """What pip must fetch for an isolated build: torch, where the target has none.

    Else nothing. Beside an installed torch, a second one could be of another version or kind; and where another tool's
    isolation hides the target, nobody can say whether it has one: that build fails, with the remedy (NO_TORCH).
    """
    try:
        plan = make_plan(env)
    except BuildError:
        return []  # said again, and better, when the build itself starts
    wanted = plan.kind != "none" and plan.torch is None and target.pip_isolated()
    return [TORCH_REQUIREMENT] if wanted else []
