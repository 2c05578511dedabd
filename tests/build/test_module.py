"""The built module: one OpenMP runtime, and no code of one instruction set that another could be linked to."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from aep_ext import _load
from build_support import native
from build_support.plan import BuildError, make_plan

pytestmark = pytest.mark.skipif(_load.extension is None, reason=f"no native module: {_load.reason}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_module_shares_torchs_openmp():
    """A second runtime would have threads of its own, and torch.set_num_threads would not reach it."""
    code = (
        "import torch, aep_ext\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "1"


def test_the_record_belongs_to_the_module():
    assert _load.mismatch(_load.record, _load.torch.__version__) is None
    assert _load.extension.isa_in_use() in _load.record["isa_built"]


def test_object_files_of_an_instruction_set_share_no_function():
    """The linker merges inline functions of one name: a machine without AVX-512 could be left with AVX-512 code."""
    try:
        folder = native.build_folder(make_plan())
    except BuildError as error:
        pytest.skip(f"the build folder is not known here: {error}")
    objects = sorted((folder / "CMakeFiles" / "aep_kernels.dir" / "csrc" / "kernels" / "cpu").glob("*_avx*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of this build here (or no nm)")
    for file in objects:
        isa = file.name.removesuffix(".cpp.o").rsplit("_", 1)[-1]
        run = subprocess.run(["nm", "-C", "--defined-only", str(file)], capture_output=True, text=True, check=True)
        weak = [line for line in run.stdout.splitlines() if line.split(" ", 2)[1] in {"W", "V", "u"}]
        shared = [line for line in weak if f"::{isa}::" not in line and "__gxx_personality" not in line]
        assert shared == [], file.name
