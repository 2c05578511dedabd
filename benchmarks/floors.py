"""What bounds small and large calls on this machine: the floors that notes.toml refers to.

    python benchmarks/floors.py --output benchmarks/results/cpu-floors.json

Each figure is the median time of one call in microseconds, one thread, of work that any operator through torch's
dispatcher has to do as well: a call that returns one small tensor, one that returns eight, the autograd engine's own
round trip, memory that is touched for the first time against memory that is reused, and the calls of the operators on
almost no data, which is what they cost beside their arithmetic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext import build_info, ops  # noqa: E402
from aep_ext._io import write_json  # noqa: E402
from benchmarks.bandwidth import measure  # noqa: E402

ROUNDS = 31
LARGE = 48 << 20  # bytes: above the 32 MB from which glibc's malloc always asks the system for fresh pages
REUSED = 16 << 20


def _median_us(functions: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """All of them in turn, ROUNDS times: name -> (function, calls per round)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_ in range(ROUNDS + 3):
        for name, (function, calls) in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if round_ >= 3:  # without the warm-up
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def _calls() -> dict[str, tuple[Callable[[], object], int]]:
    one = torch.ones(1)
    add = torch.ops.aten.add.Tensor
    leaf = torch.ones(4, 64, 10, requires_grad=True)
    logits, weights, target = torch.randn(2, 1, 2), torch.ones(2), torch.zeros(1, dtype=torch.int64)
    needs_grad = logits.clone().requires_grad_()
    features, running = torch.ones(1, 1), torch.zeros(1, 2)
    indices, state = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)
    maps, linear = [torch.ones(1, 1, 1, 1)] * 4, [torch.ones(2, 1)] * 4

    def graded(function: Callable[[], Tensor], leaf: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), leaf)

    return {
        "aten.add of one number": (lambda: add(one, one), 500),
        "torch.empty, eight times": (lambda: [torch.empty(1) for _ in range(8)], 200),
        "sum and its gradient": (graded(lambda: leaf.sum(), leaf), 100),
        "ensemble_stats of (2, 1, 2)": (lambda: ops.ensemble_stats(logits, weights), 300),
        "gate of one row, one feature": (
            lambda: ops.gate(features, running, 0.0, indices, state, logits[0], weight=1.0, threshold=2.0),
            200,
        ),
        "multi_exit_linear_head of four 1x1x1x1": (lambda: ops.multi_exit_linear_head(maps, linear, None), 200),
        "joint_cross_entropy of (2, 1, 2) and its gradient": (
            graded(lambda: ops.joint_cross_entropy(needs_grad, target, weights).loss, needs_grad),
            100,
        ),
    }


def _memory() -> dict[str, tuple[Callable[[], object], int]]:
    source = torch.ones(LARGE // 4)
    reused, small = torch.empty_like(source), torch.ones(REUSED // 4)
    return {
        "copy of 48 MB into reused memory": (lambda: reused.copy_(source), 1),
        "copy of 48 MB into fresh memory": (lambda: source.clone(), 1),
        "copy of 16 MB into new memory below malloc's threshold": (lambda: small.clone(), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    info = build_info()
    result = {
        "machine": {
            "torch": torch.__version__,
            "backend": info.backend,
            "isa_in_use": info.isa_in_use,
            "cores": os.cpu_count(),
            "threads": 1,
            "load_before": os.getloadavg()[0],
        },
        "median_us": {**_median_us(_calls()), **_median_us(_memory())},
        "bandwidth_gb_s": measure(),
    }
    write_json(arguments.output, result)
    for name, value in result["median_us"].items():
        print(f"{value:12.2f} us  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
