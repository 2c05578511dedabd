"""The operators' tests once more, through csrc/torch/cuda and the CUDA kernels, on CPU tensors: a module is built
whose kernels are run by an emulation (tests/cpp/emulated_cuda). It says nothing about time, streams or graphs.

``tests/support/emulated_package.py`` tells how to run any other tests with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_package
import pytest

from build_support.plan import why_no_compiler

ROOT = Path(__file__).resolve().parents[2]

# Only the CPU reads labels before it computes, has gate_one_, instruction sets and threads, and adds odd maps up alike.
DIFFERENCES = (
    "label_out_of_range_is_an_error", "finds_bad_labels_first",
    "gate_one_", "instruction_sets", "threads", "odd_map_on_the_cpu",
)  # fmt: skip
# What torch does around an operator does not depend on the backend, and takes most of the time.
LEFT_OUT = ("compile", "opcheck", "gradcheck", "any_")
FILES = (
    "ensemble", "gate", "head", "huge_strides", "linear_loss", "loss", "loss_memory", "multi_exit_loss", "pool",
    "subsets",
)  # fmt: skip


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the package with the emulated module."""
    if why_no_compiler(os.environ) or not (shutil.which("ninja") or Path(sys.executable).with_name("ninja").exists()):
        pytest.skip("no C++ compiler or no ninja")
    return emulated_package.build(tmp_path_factory.mktemp("emulated"))


def _pytest(package: Path, order: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"pythonpath={package} tests/support",
        *arguments,
    ]  # fmt: skip
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=540, check=False,
        env=environment | {"AEP_EMULATED_ORDER": order, "PYTHONPATH": os.fspath(package)},
    )  # fmt: skip
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-8000:]}\n{run.stderr[-2000:]}"
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_operators_through_the_cuda_path(package: Path, order: str) -> None:
    """In two orders of the threads: what a kernel forgets to wait for comes out differently in one of them."""
    chosen = " and ".join(f"not {name}" for name in (*DIFFERENCES, *LEFT_OUT))
    files = [f"tests/ops/test_{name}.py" for name in FILES]
    output = _pytest(package, order, "-m", "not slow and not gpu", "-k", chosen, *files)
    assert "cuda-emulated" in output and " passed" in output


@pytest.mark.slow
def test_what_only_the_cuda_path_does(package: Path) -> None:
    """Run in the other package: the checks of cuda_only.py."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cuda_only.py"))], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.fspath(package)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-4000:]}"
