"""Machines to build on, made up: what is found there is handed to the planner."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from build_support import cuda, target


@pytest.fixture
def make_site(tmp_path: Path) -> Callable[..., Path]:
    """A site-packages folder that holds a torch of the given version, as far as its version file goes."""

    def make(version: str = "2.13.0+cpu", cuda_version: str | None = None, name: str = "site-packages") -> Path:
        folder = tmp_path / name / "torch"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise AssertionError('must not be imported')\n", encoding="utf-8")
        (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda_version!r}\n", encoding="utf-8")
        return folder.parent

    return make


@pytest.fixture
def make_script(tmp_path: Path) -> Callable[[str, str], Path]:
    """An executable shell script in a folder of its own, made for a PATH."""

    def make(name: str, body: str) -> Path:
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        file.chmod(0o755)
        return file

    return make


@pytest.fixture
def compiler_env(make_script: Callable[[str, str], Path]) -> dict[str, str]:
    """An environment whose PATH holds a C++ compiler and nothing else."""
    return {"PATH": os.fspath(make_script("c++", "exit 0").parent)}


@pytest.fixture
def cpu_torch() -> target.Torch:
    return target.Torch("2.13.0+cpu", None, Path("site-packages/torch"))


@pytest.fixture
def cuda_torch() -> target.Torch:
    return target.Torch("2.15.0+cu132", "13.2", Path("site-packages/torch"))


@pytest.fixture
def toolkit() -> cuda.Toolkit:
    return cuda.Toolkit(Path("cuda"), Path("cuda/bin/nvcc"), "13.0")
