"""Build the native module with CMake and ninja. Needs no setuptools, so that a script can call `build_into` too."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from build_support import cuda, target
from build_support.plan import NO_TORCH, ROOT, BuildError, Plan, make_plan

EXT_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MODULE_NAME = f"_C{EXT_SUFFIX}"
RECORD_NAME = f"_build{os.path.splitext(EXT_SUFFIX)[0]}.json"


def build_folder(plan: Plan) -> Path:
    """One CMake folder per Python, torch and kind, so that several environments can share a source tree."""
    version = plan.torch.version if plan.torch else "none"
    return ROOT / "build" / f"{EXT_SUFFIX.strip('.').split('.')[0]}-torch-{version}-{plan.kind}"


def find_tool(name: str) -> str:
    """`cmake` or `ninja`: from the PATH, else beside this Python (an environment may be used without being activated).

    Raises:
        BuildError: it is neither here nor there.
    """
    beside = shutil.which(name, path=os.path.dirname(sys.executable))
    found = shutil.which(name) or beside
    if found is None:
        raise BuildError(f"{name} was not found: pip install {name}, or use pip's build isolation, which brings it")
    return found


def cmake_options(plan: Plan, paths: dict[str, object], ninja: str) -> list[str]:
    """The -D options of a configuration. All are passed every time: an isolated build's paths change between runs."""
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "AEP_BUILD_TORCH": "ON",
        "AEP_CUDA": "ON" if plan.kind == "cuda" else "OFF",
        "AEP_TORCH_INCLUDE_DIRS": ";".join(paths["include_dirs"]),
        "AEP_TORCH_LIBRARY_DIRS": ";".join(paths["library_dirs"]),
        "AEP_TORCH_CXX11_ABI": str(paths["cxx11_abi"]),
        "AEP_PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
        "AEP_MODULE_SUFFIX": EXT_SUFFIX,
    }
    if plan.kind == "cuda":
        options |= {
            "CMAKE_CUDA_COMPILER": str(plan.toolkit.nvcc),
            "CMAKE_CUDA_ARCHITECTURES": ";".join(cuda.cmake_architectures(plan.architectures)),
            "AEP_CUDA_EXTRA_INCLUDE_DIRS": ";".join(cuda.wheel_include_dirs(plan.torch.folder)),
        }
    try:
        users = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise BuildError(f"CMAKE_ARGS cannot be understood ({error}): {os.environ['CMAKE_ARGS']}") from None
    return [f"-D{name}={value}" for name, value in options.items()] + users


def configure(cmake: str, folder: Path, options: list[str]) -> None:
    """Run CMake. It starts afresh where its cache is of another compiler or other CMAKE_ARGS, or of a run that failed.

    Its cache would keep them: a compiler that did not work, a sanitizer that is no longer asked for.
    """
    names = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "CMAKE_ARGS")
    wishes = {name: os.environ.get(name, "") for name in names}
    text, stamp = json.dumps(wishes), folder / "aep_configured.json"
    cached = (folder / "CMakeCache.txt").is_file()
    known = stamp.is_file() and stamp.read_text(encoding="utf-8") == text
    stamp.unlink(missing_ok=True)
    fresh = ["--fresh"] if cached and not known else []
    _run([cmake, *fresh, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *options])
    stamp.write_text(text, encoding="utf-8")


def build_jobs() -> int:
    """MAX_JOBS, else one job a core, but no more than memory allows: a file with torch's headers takes about 2 GB."""
    if os.environ.get("MAX_JOBS", "").isdecimal():
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        gigabytes = 8
    return max(1, min(os.cpu_count() or 1, int(gigabytes // 2)))


def compile_module(plan: Plan) -> tuple[Path, dict[str, object]]:
    """Run CMake and ninja. Returns the built module and the facts that CMake wrote down."""
    folder = build_folder(plan)
    folder.mkdir(parents=True, exist_ok=True)
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    options = cmake_options(plan, target.probe_paths(plan.torch), ninja)
    with _locked(folder):
        configure(cmake, folder, options)
        _run([cmake, "--build", str(folder), "--target", "_C", "--parallel", str(build_jobs())])
    return folder / MODULE_NAME, json.loads((folder / "aep_facts.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder: two ninjas in one would spoil it."""
    try:
        import fcntl
    except ImportError:  # no POSIX locks here: as before
        yield
        return
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    print("aep_ext:", shlex.join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise BuildError(f"aep_ext: {Path(command[0]).name} failed with status {status}; its output stands above")


def record_of(plan: Plan, facts: dict[str, object]) -> dict[str, object]:
    """What `_build.<SOABI>.json` holds: read by aep_ext._load before the module is opened, and by build_info()."""
    return {
        "kind": plan.kind,
        "torch": plan.torch.version if plan.torch and plan.kind != "none" else None,
        "torch_cuda": plan.torch.cuda if plan.torch else None,
        "python": sys.version.split()[0],
        "cuda_home": str(plan.toolkit.home) if plan.toolkit else None,
        "cuda_arch": [part for part in plan.architectures.replace(",", ";").replace(" ", ";").split(";") if part],
        "notices": list(plan.notices),
        **facts,
    }


def _put(source: Path | str, destination: Path) -> None:
    """Copy a file, or write a text, into place in one step: another process may have the old one open."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    if isinstance(source, Path):
        shutil.copyfile(source, temporary)
    else:
        temporary.write_text(source, encoding="utf-8")
    os.replace(temporary, destination)


def build_into(package: Path) -> Plan:
    """Decide, build, and put `_C` and its record into the folder `package`. Returns what was decided.

    Raises:
        BuildError, RuntimeError, ValueError: with a message for the user.
    """
    plan = make_plan()
    if plan.kind != "none" and plan.torch is None:
        raise BuildError(NO_TORCH)
    for notice in plan.notices:
        print(f"aep_ext: NOTICE: {notice}", flush=True)
    if plan.toolkit:
        print(f"aep_ext: CUDA {plan.toolkit.version} in {plan.toolkit.home}, {plan.architectures}", flush=True)
    facts: dict[str, object] = {}
    if plan.kind == "none":
        (package / MODULE_NAME).unlink(missing_ok=True)  # an editable tree may hold one of an earlier build
    else:
        module, facts = compile_module(plan)
        _put(module, package / MODULE_NAME)
    _put(json.dumps(record_of(plan, facts), indent=2) + "\n", package / RECORD_NAME)
    return plan
