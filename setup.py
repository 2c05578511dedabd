"""Build of aep_ext: static facts are in pyproject.toml, the native code in CMakeLists.txt, decisions in build_support/.

Switches (environment): FORCE_CUDA=1 (or 0), AEP_NO_EXTENSIONS=1, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CMAKE_ARGS.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.command import BuildNative  # noqa: E402  (build backends do not put this folder on the path)
from build_support.plan import REQUIREMENTS, BuildError, build_requires, make_plan  # noqa: E402


def install_requires() -> list[str]:
    """The run-time requirements. An impossible wish is reported by build_ext, not by a query of the metadata."""
    try:
        return make_plan().install_requires
    except BuildError:
        return REQUIREMENTS


setup(
    # No sources: CMake has them. The extension makes the wheel one of this Python and platform.
    ext_modules=[Extension("aep_ext._C", sources=[])],
    cmdclass={"build_ext": BuildNative},
    install_requires=install_requires(),
    setup_requires=build_requires(),
)
