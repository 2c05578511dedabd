"""Call overhead: what bounds small and large calls on this machine, which notes.toml refers to.

    python benchmarks/call_overhead.py --output benchmarks/results/cpu-call-overhead.json

Each number is the median time of one call in microseconds, one thread, of work that any operator through torch's
dispatcher has to do as well: a call that returns one small tensor, one that returns eight, the autograd engine's own
round trip, memory that is touched for the first time against memory that is reused, and the calls of the operators on
almost no data, which is what they cost beside their arithmetic.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from aep_ext import build_info, ops  # noqa: E402
from aep_ext._io import write_json  # noqa: E402
from benchmarks.baselines import with_gradient  # noqa: E402
from benchmarks.memory import bandwidth  # noqa: E402
from benchmarks.paired_timing import Rotation  # noqa: E402

ROUNDS, WARMUP = 31, 3
LARGE = 48 << 20  # bytes: above the 32 MB from which glibc's malloc always asks the system for fresh pages
REUSED = 16 << 20


def calls() -> dict[str, tuple[Callable[[], object], int]]:
    """By name: a function and how often a round calls it."""
    one, add = torch.ones(1), torch.ops.aten.add.Tensor
    many, logits = torch.ones(4, 64, 10, requires_grad=True), torch.randn(2, 1, 2)
    weights, target = torch.ones(2), torch.zeros(1, dtype=torch.int64)
    needs_grad = logits.clone().requires_grad_()
    features, running = torch.ones(1, 1), torch.zeros(1, 2)
    indices, state = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 0, dtype=torch.int64)
    maps, linear = [torch.ones(1, 1, 1, 1)] * 4, [torch.ones(2, 1)] * 4
    summed = with_gradient(lambda x: x.sum())
    loss = with_gradient(lambda x: ops.joint_cross_entropy(x, target, weights).loss)
    source = torch.ones(LARGE // 4)
    reused, small = torch.empty_like(source), torch.ones(REUSED // 4)
    return {
        "aten.add of one number": (lambda: add(one, one), 500),
        "torch.empty, eight times": (lambda: [torch.empty(1) for _ in range(8)], 200),
        "sum and its gradient": (lambda: summed(many), 100),
        "ensemble_stats of (2, 1, 2)": (lambda: ops.ensemble_stats(logits, weights), 300),
        "gate of one row, one feature": (
            lambda: ops.gate(features, running, 0.0, indices, state, logits[0], weight=1.0, threshold=2.0),
            200,
        ),
        "multi_exit_linear_head of four 1x1x1x1": (lambda: ops.multi_exit_linear_head(maps, linear, None), 200),
        "joint_cross_entropy of (2, 1, 2) and its gradient": (lambda: loss(needs_grad), 100),
        "copy of 48 MB into reused memory": (lambda: reused.copy_(source), 1),
        "copy of 48 MB into fresh memory": (lambda: source.clone(), 1),
        "copy of 16 MB into new memory below malloc's threshold": (lambda: small.clone(), 1),
    }


def median_us() -> dict[str, float]:
    """Of all of them, in turn."""
    rotations = {name: (Rotation(function, [()]), count) for name, (function, count) in calls().items()}
    times: dict[str, list[float]] = {name: [] for name in rotations}
    for _ in range(WARMUP + ROUNDS):
        for name, (rotation, count) in rotations.items():
            times[name].append(rotation.seconds(count) * 1e6)
    return {name: statistics.median(values[WARMUP:]) for name, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    info = build_info()
    machine = {"torch": torch.__version__, "backend": info.backend, "isa_in_use": info.isa_in_use}
    machine |= {"cores": os.cpu_count(), "threads": 1, "load_before": os.getloadavg()[0]}
    result = {"machine": machine, "median_us": median_us(), "bandwidth_gb_s": bandwidth()}
    write_json(arguments.output, result)
    for name, value in result["median_us"].items():
        print(f"{value:12.2f} us  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
