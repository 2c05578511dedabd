"""A rehearsal of the GPU check without a GPU: pretend_cuda, and cases so small that a CPU is through in seconds.

PYTHONPATH=.:tests/support python -m rehearse -m pytest benchmarks/gpu/test_operators.py -m gpu
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pretend_cuda

SIZES = {
    "global_avg_pool": (2, 8, 5),
    "multi_exit_linear_head": (1,),
    "ensemble": (3, 4, 11),
    "ensemble_stats": (3, 4, 11),
    "joint_cross_entropy": (3, 4, 11),
    "linear_joint_cross_entropy": (2, 4, 11),
    "subset_correct": (3, 20, 11),
    "gate": (6,),
}


def shrink() -> None:
    """Small cases, few rounds."""
    from benchmarks.gpu import ceilings, clock, end_to_end, operators

    every_operator = {case.operator for case in operators.all_cases()}
    assert every_operator == set(SIZES)

    def small() -> Iterator[operators.Case]:
        for operator, size in SIZES.items():
            yield operators.Case(operator, size, "bfloat16" if operator == "joint_cross_entropy" else "float32")

    def networks() -> Iterator[end_to_end.Case]:
        yield end_to_end.Case("resnet_small", 2)

    operators.all_cases, operators.HEADS = small, ((16, 4), (33, 2))
    ceilings.COPY_MEGABYTES, ceilings.NODES = (1,), (1, 3)
    clock.ROUND_MS, clock.MOST_SETS = 0.01, 4
    clock.race.__kwdefaults__["rounds"], clock.latency.__defaults__ = 2, (2,)
    end_to_end.all_cases, end_to_end.SETS, end_to_end.build.__defaults__ = networks, 4, (16, 7)


if __name__ == "__main__":
    shrink()
    if sys.argv[1:3] == ["-m", "benchmarks.gpu.ceilings"]:  # run as a script it would have its own sizes again
        from benchmarks.gpu import ceilings

        pretend_cuda.install()
        ceilings.main(Path(sys.argv[3]))
    else:
        pretend_cuda.main()
