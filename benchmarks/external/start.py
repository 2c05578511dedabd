"""Runs a timm training script that can build aep_ext's multi-exit networks: ``python start.py SCRIPT [ITS OPTIONS]``.

The script itself is not touched: the networks are put into timm's registry before it starts.
"""

from __future__ import annotations

import runpy
import sys

import torch

from benchmarks.external.exit_models import register


def main(argv: list[str]) -> None:
    """Run ``argv[0]`` as ``__main__`` with the options that follow, on one thread."""
    torch.set_num_threads(1)  # the order of sums is then the same in every run
    register()
    if not torch.cuda.is_available():
        # Versions of timm's train.py of 2023 wait for the GPU after every validation batch, on a CPU too.
        torch.cuda.synchronize = lambda device=None: None
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
