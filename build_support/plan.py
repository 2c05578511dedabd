"""Decide what is built, from the environment variables and from what is installed. No side effects: easy to test."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from build_support import cuda, target

ROOT = Path(__file__).resolve().parent.parent
TORCH_REQUIREMENT = f"torch>={target.MINIMUM_TORCH[0]}.{target.MINIMUM_TORCH[1]}"

NO_TORCH = (
    "aep_ext: no torch is visible to this build. uv and `python -m build` hide the one that is installed: install "
    "torch first and build with --no-build-isolation (setuptools, cmake and ninja must then be installed too). "
    "AEP_BUILD=none installs the package without native code."
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
            return [TORCH_REQUIREMENT, "numpy>=2.0"]
        return [f"torch=={self.torch.public_version}", "numpy>=2.0"]


def requested_kind(env: Mapping[str, str]) -> str | None:
    """AEP_BUILD and FORCE_CUDA as one wish: "cpu", "cuda", "none", or None for the best that is possible."""
    kind = env.get("AEP_BUILD", "").strip().lower() or None
    if kind not in (None, "cpu", "cuda", "none"):
        raise BuildError(f"AEP_BUILD must be cpu, cuda or none, got '{env['AEP_BUILD']}'")
    if env.get("FORCE_CUDA", "").strip().lower() in {"1", "on", "true", "yes", "y"}:
        if kind not in (None, "cuda"):
            raise BuildError(f"FORCE_CUDA=1 and AEP_BUILD={kind} contradict each other")
        return "cuda"
    return kind


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


def has_cuda_sources(root: Path = ROOT) -> bool:
    """Whether this source tree holds CUDA kernels."""
    return any((root / "csrc" / "kernels" / "cuda").glob("*.cu"))


def _why_no_cuda(torch: target.Torch, toolkit: cuda.Toolkit | None, cuda_sources: bool) -> str | None:
    """The reason why CUDA kernels cannot be built, or None."""
    if torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    if toolkit is None:
        return f"nvcc was not found (torch {torch.version} is built with CUDA {torch.cuda}; set CUDA_HOME to a toolkit)"
    if toolkit.version.split(".")[0] != torch.cuda.split(".")[0]:
        return (
            f"nvcc is of CUDA {toolkit.version}, torch {torch.version} of CUDA {torch.cuda}: "
            "the major versions must agree"
        )
    if not cuda_sources:
        return "this version of aep_ext has no CUDA kernels; CUDA tensors run on the pure-torch reference"
    return None


def make_plan(
    env: Mapping[str, str] | None = None,
    *,
    find_torch=target.find_torch,
    find_toolkit=cuda.find_toolkit,
    cuda_sources: bool | None = None,
) -> Plan:
    """Decide. The two finders are arguments so that tests can put any machine in front of it.

    Raises:
        BuildError: the wish cannot be fulfilled, or the installed torch is too old.
    """
    env = os.environ if env is None else env
    wish = requested_kind(env)
    torch = find_torch()
    if wish == "none":
        return Plan("none", torch, notices=("built with AEP_BUILD=none: no native code",))
    no_compiler = why_no_compiler(env)
    if no_compiler is not None:
        if wish is not None:
            raise BuildError(f"AEP_BUILD={wish} needs a C++ compiler, but {no_compiler}")
        return Plan("none", torch, notices=(f"no native code: when aep_ext was installed, {no_compiler}",))
    if torch is None:  # pip fetches one for the build; build_ext plans again beside it
        return Plan(wish or "cpu", None)
    if not torch.is_supported:
        raise BuildError(
            f"aep_ext needs {TORCH_REQUIREMENT}, torch {torch.version} is installed; update torch first "
            "(to a CPU or a CUDA build, as you want it)"
        )
    if wish == "cpu":
        return Plan("cpu", torch, notices=("no CUDA kernels: built with AEP_BUILD=cpu",) if torch.cuda else ())
    toolkit = find_toolkit(torch_folder=torch.folder) if torch.cuda else None
    why_not = _why_no_cuda(torch, toolkit, has_cuda_sources() if cuda_sources is None else cuda_sources)
    if why_not is None:
        assert toolkit is not None
        archs = env.get("TORCH_CUDA_ARCH_LIST", "").strip() or cuda.default_architectures(toolkit)
        return Plan("cuda", torch, toolkit, archs)
    if wish == "cuda":
        raise BuildError(f"CUDA kernels were asked for (AEP_BUILD=cuda or FORCE_CUDA=1), but {why_not}")
    return Plan("cpu", torch, notices=(f"no CUDA kernels: {why_not}",) if torch.cuda else ())


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
    return [TORCH_REQUIREMENT, "numpy>=2.0"] if wanted else []
