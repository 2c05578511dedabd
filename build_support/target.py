"""Find the torch that the package will run with, also where build isolation hides it."""

from __future__ import annotations

import importlib.machinery
import json
import os
import re
import runpy
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

MINIMUM_TORCH = (2, 11)

# Runs in a process of its own, so that a broken torch cannot take setup.py down. The folders found here come last,
# behind the build environment's own packages.
_PROBE = """
import json, logging, os, sys, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
sys.path.extend(p for p in json.loads(sys.argv[1]) if p not in sys.path)
import torch
from torch.utils import cpp_extension
print("AEP" + json.dumps({
    "include_dirs": [p for p in cpp_extension.include_paths() if os.path.isdir(p)],
    "library_dirs": [p for p in cpp_extension.library_paths() if os.path.isdir(p)],
    "cxx11_abi": int(torch._C._GLIBCXX_USE_CXX11_ABI),
}))
"""


@dataclass(frozen=True)
class Torch:
    """A torch installation, as its version file tells it."""

    version: str  # torch.__version__, with the local part
    cuda: str | None  # CUDA version it was built with
    folder: Path  # site-packages/torch

    @property
    def public_version(self) -> str:
        """The version without its local part: `2.13.0+cpu` -> `2.13.0`."""
        return self.version.split("+")[0]

    @property
    def is_supported(self) -> bool:
        """Whether it is new enough to build against."""
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) >= MINIMUM_TORCH


def pip_isolated(path: list[str] | None = None) -> bool:
    """Whether this is pip's isolated build: the target's own Python with a temporary folder laid over its packages."""
    return any("pip-build-env-" in entry for entry in (sys.path if path is None else path))


def target_site_dirs() -> list[str]:
    """The package folders of the environment that this Python belongs to, named even where isolation hides them."""
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"]]
    if _sees_base_packages():
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        found += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
        found += site.getsitepackages([sys.base_prefix])
        found.append(site.getusersitepackages())
    return [entry for entry in dict.fromkeys(found) if os.path.isdir(entry)]


def _sees_base_packages() -> bool:
    """True outside a virtual environment, and in one made with --system-site-packages."""
    if sys.prefix == sys.base_prefix:
        return True
    config = Path(sys.prefix, "pyvenv.cfg")
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE | re.IGNORECASE) is not None


def search_path() -> list[str]:
    """Where torch is looked for: this process's path, then, in pip's isolated build, the target's folders."""
    entries = [entry for entry in sys.path if entry]
    return list(dict.fromkeys(entries + (target_site_dirs() if pip_isolated() else [])))


def find_torch(entries: list[str] | None = None) -> Torch | None:
    """The first torch on `entries` (default: `search_path()`), or None. Reads its version file; does not import it."""
    for entry in search_path() if entries is None else entries:
        spec = importlib.machinery.PathFinder.find_spec("torch", [entry])
        if spec is None or not spec.origin:
            continue
        folder = Path(spec.origin).parent
        if (folder / "version.py").is_file():
            facts = runpy.run_path(str(folder / "version.py"))
            return Torch(str(facts["__version__"]), facts.get("cuda"), folder)
    return None


def probe_paths(torch: Torch) -> dict[str, object]:
    """Include and library folders and the C++ ABI, from torch.utils.cpp_extension itself.

    Raises:
        RuntimeError: torch is there but cannot be imported; the message carries its last line.
    """
    extra = [str(torch.folder.parent), *search_path()]
    run = subprocess.run([sys.executable, "-c", _PROBE, json.dumps(extra)], capture_output=True, text=True, check=False)
    for line in run.stdout.splitlines():
        if line.startswith("AEP"):
            return json.loads(line[3:])
    last = (run.stderr.strip().splitlines() or ["no message"])[-1]
    raise RuntimeError(f"torch {torch.version} in {torch.folder} cannot be imported by the build: {last}")
