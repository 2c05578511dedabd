"""A copy of the package whose native module runs the CUDA operators on CPU tensors, by an emulation of the kernels.

By hand, to run any tests with it::

    python tests/support/emulated_package.py build/emulated
    pytest -o "pythonpath=build/emulated tests/support" tests/ops

What is expected to differ is listed in tests/emulated/test_cuda_operators.py. ``AEP_EMULATED_ORDER=reverse`` (or
``shuffled``) runs the threads of every kernel in another order.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path) -> Path:
    """Compiles the module in ``folder``/build and lays the package with it in ``folder``/aep_ext.

    Args:
        folder: where to build; one of an earlier build is used again.

    Returns:
        ``folder``: what has to stand on ``sys.path`` for ``import aep_ext`` to find the copy.

    Raises:
        BuildError, RuntimeError, subprocess.CalledProcessError: tools or torch are missing, or it does not compile.
    """
    from build_support import native, target
    from build_support.plan import NO_TORCH, BuildError, Plan

    torch = target.find_torch()
    if torch is None:
        raise BuildError(NO_TORCH)
    plan = Plan("cpu", torch)
    cmake, ninja = native.find_tool("cmake"), native.find_tool("ninja")
    options = [*native.cmake_options(plan, target.probe_paths(torch), ninja), "-DAEP_EMULATE_CUDA=ON"]
    tree = folder / "build"
    for command in (
        [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), *options],
        [cmake, "--build", str(tree), "--target", "emulated_C", "--parallel", str(min(2, native.build_jobs()))],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
    package = folder / "aep_ext"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "aep_ext", package, ignore=shutil.ignore_patterns("_C.*", "_build.*", "__pycache__"))
    for name in ("inference/executor.py", "ops/gate.py"):  # the operator that only the CPU has is passed by
        text = (package / name).read_text(encoding="utf-8")
        if "logits.is_cpu" not in text:
            raise BuildError(f"{name} does not ask for CPU tensors any more: emulated_package.py needs a look")
        (package / name).write_text(text.replace("logits.is_cpu", "logits.is_meta"), encoding="utf-8")
    shutil.copyfile(tree / "emulated_module" / native.MODULE_NAME, package / native.MODULE_NAME)
    facts = json.loads((tree / "aep_facts.json").read_text(encoding="utf-8"))
    record = native.record_of(plan, facts)
    (package / native.RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: emulated_package.py FOLDER")
    sys.path.insert(0, os.fspath(ROOT))
    print(build(Path(sys.argv[1]).resolve()))
